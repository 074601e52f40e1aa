// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <utility>

#include "findings.hpp"

namespace cohort::trace {
namespace {

std::string variant_name(const std::string& call) {
  return call == "broadcast"                ? "root"
         : call == "send" || call == "recv" ? "peer"
         : call == "merge_attention"        ? "base"
         : call == "gather_query"           ? "extent of q_pe"
                                            : "op";
}

/// What differs between two calls of one kind.
std::string differences(const Record& mine, const Record& theirs) {
  std::string text;
  const auto add = [&](const std::string& what) { text += (text.empty() ? "" : ", ") + what; };
  if (mine.dtype != theirs.dtype) {
    add(fmt::format("the type, {} and {}", mine.dtype, theirs.dtype));
  }
  if (mine.ndim != theirs.ndim) {
    add(fmt::format("the number of dimensions, {} and {}", mine.ndim, theirs.ndim));
  }
  for (std::size_t d = 0; d < std::min(mine.extents.size(), theirs.extents.size()); ++d) {
    if (mine.extents[d] != theirs.extents[d] && mine.call != "launch" && mine.call != "agreement") {
      add(fmt::format("extent {} of x, {} and {}", d, mine.extents[d], theirs.extents[d]));
    }
  }
  if (mine.call == "agreement" && mine.extents != theirs.extents) {
    add(fmt::format("the bytes, {} and {}", mine.extents.at(0), theirs.extents.at(0)));
  }
  if (mine.variant != theirs.variant && mine.call != "launch" && mine.call != "agreement") {
    add(fmt::format("the {}, {} and {}", variant_name(mine.call), mine.variant, theirs.variant));
  }
  return text;
}

std::string with_differences(const Ring& mine, const Record& a, const Ring& theirs,
                             const Record& b) {
  const std::string what = a.call == b.call ? differences(a, b) : "";
  return fmt::format("{} where the others made {}{}", describe(mine, a), describe(theirs, b),
                     what.empty() ? "" : "; what differs: " + what);
}

/// The rank whose signature most have, the lowest of them.
int majority(const std::map<int, const Record*>& records) {
  int best = records.begin()->first;
  std::ptrdiff_t most = 0;
  for (const auto& [rank, record] : records) {
    const std::uint32_t wanted = record->signature;
    const auto votes = std::count_if(records.begin(), records.end(), [wanted](const auto& other) {
      return other.second->signature == wanted;
    });
    if (votes > most) {
      most = votes;
      best = rank;
    }
  }
  return best;
}

/// Calls of one place that are not alike; nothing where they are.
std::optional<Finding> compare(const Group& group, const std::map<int, const Record*>& records) {
  if (records.size() < 2) {
    return std::nullopt;
  }
  const int like = majority(records);
  Finding found{.kind = Finding::Kind::differs, .group = group.name};
  const Record* other = nullptr;
  int other_rank = 0;
  for (const auto& [rank, record] : records) {
    const auto world = group.ranks.at(static_cast<std::size_t>(rank));
    if (record->signature == records.at(like)->signature) {
      found.waiting.push_back(world);
    } else {
      found.ranks.push_back(world);
      other = other == nullptr ? record : other;
      other_rank = other == record ? rank : other_rank;
    }
  }
  if (other == nullptr) {
    return std::nullopt;
  }
  found.since = other->ns;
  const std::string in_graph =
      other->captured ? fmt::format(", in the list of graph {}", other->where) : "";
  found.text = fmt::format("{} {} in {}{}: {} made {}", listed(found.ranks),
                           verb(found.ranks, "differs", "differ"), group.name, in_graph,
                           verb(found.ranks, "it", "they"),
                           with_differences(group.rings.at(other_rank), *other,
                                            group.rings.at(like), *records.at(like)));
  return found;
}

}  // namespace

std::optional<Finding> difference(const Group& group) {
  std::map<std::pair<std::uint64_t, std::uint32_t>, std::map<int, const Record*>> lists;
  std::map<std::uint32_t, std::map<int, const Record*>> calls;
  for (const auto& [rank, ring] : group.rings) {
    for (const Record& record : ring.captured) {
      if (record.call != "send" && record.call != "recv") {
        lists[{record.where, record.number}][rank] = &record;
      }
    }
    for (const Record& record : ring.records) {
      if (record.number != 0) {
        calls[record.number][rank] = &record;
      }
    }
  }
  for (const auto& [place, records] : lists) {
    if (auto found = compare(group, records)) {
      return found;
    }
  }
  for (const auto& [number, records] : calls) {
    if (auto found = compare(group, records)) {
      return found;
    }
  }
  return std::nullopt;
}

}  // namespace cohort::trace
