// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "analysis.hpp"
#include "findings.hpp"
#include "place.hpp"

namespace cohort::trace {
namespace {

std::string variant_name(const std::string& call) {
  return call == "broadcast"                ? "root"
         : call == "send" || call == "recv" ? "peer"
         : call == "merge_attention"        ? "base"
         : call == "gather_query"           ? "extent of q_pe"
         : call == "all_reduce_rms_norm"    ? "type of out"
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

/// The signature that more than half have, or nothing.
std::optional<std::uint32_t> majority(const std::map<int, const Record*>& records) {
  std::map<std::uint32_t, std::size_t> votes;
  for (const auto& [rank, record] : records) {
    ++votes[record->signature];
  }
  for (const auto& [signature, count] : votes) {
    if (2 * count > records.size()) {
      return signature;
    }
  }
  return std::nullopt;
}

/// Of two launches whose graphs' lists differ, the first calls that do.
std::optional<std::pair<Record, Record>> first_in_lists(const Group& group, const Ring& a,
                                                        const Record& launch_a, const Ring& b,
                                                        const Record& launch_b) {
  const auto list_a = list_of(group, a, launch_a);
  const auto list_b = list_of(group, b, launch_b);
  std::map<std::uint64_t, const Record*> by_number;
  for (const Record* const record : list_b) {
    by_number[record->number] = record;
  }
  for (const Record* const record : list_a) {
    const auto other = by_number.find(record->number);
    if (record->number != 0 && other != by_number.end() &&
        other->second->signature != record->signature) {
      return std::pair(*record, *other->second);
    }
  }
  return std::nullopt;
}

/// "it made A where the others made B; what differs: ..."
std::string contrast(const Group& group, int rank, const Record& mine, int other,
                     const Record& theirs, const std::string& who, const std::string& others) {
  const Ring& ring = group.rings.at(rank);
  const Ring& other_ring = group.rings.at(other);
  Record a = mine;
  Record b = theirs;
  std::string in_graphs;
  if (a.call == "launch" && b.call == "launch") {
    if (const auto calls = first_in_lists(group, ring, a, other_ring, b)) {
      in_graphs = fmt::format(" in {}", describe(ring, mine));
      std::tie(a, b) = *calls;
    }
  }
  std::string what = a.call == b.call ? differences(a, b) : "";
  if (what.empty() && a.call == "launch" && b.call == "launch") {
    what = fmt::format("the graphs' lists, of {} and {} calls", a.extents[0], b.extents[0]);
  }
  return fmt::format("{} made {}{} where {} made {}{}", who, describe(ring, a), in_graphs, others,
                     describe(other_ring, b), what.empty() ? "" : "; what differs: " + what);
}

/// Calls of one number that are not alike; nothing where they are.
std::optional<Finding> compare(const Group& group, const std::map<int, const Record*>& records) {
  const auto alike = [](const auto& a, const auto& b) {
    return a.second->signature == b.second->signature;
  };
  const auto odd = std::find_if(records.begin(), records.end(),
                                [&](const auto& one) { return !alike(one, *records.begin()); });
  if (odd == records.end()) {
    return std::nullopt;
  }
  Finding found{.kind = Finding::Kind::differs, .group = group.name, .since = odd->second->ns};
  const auto most = majority(records);
  if (!most) {  // nobody knows who is right
    for (const auto& [rank, record] : records) {
      found.ranks.push_back(world_rank(group, rank));
    }
    const auto& [first, record] = *records.begin();
    const auto who = [&](const Record& like) {
      std::vector<int> same;
      for (const auto& [rank, one] : records) {
        if (one->signature == like.signature) {
          same.push_back(world_rank(group, rank));
        }
      }
      return listed(same);
    };
    found.text = fmt::format(
        "{} make different calls in {}: {}", listed(found.ranks), group.name,
        contrast(group, first, *record, odd->first, *odd->second, who(*record), who(*odd->second)));
    return found;
  }
  std::optional<int> other;
  std::optional<int> like;
  for (const auto& [rank, record] : records) {
    const bool same = record->signature == *most;
    (same ? found.waiting : found.ranks).push_back(world_rank(group, rank));
    auto& example = same ? like : other;
    example = example ? *example : rank;
  }
  found.text = fmt::format("{} {} in {}: {}", listed(found.ranks),
                           verb(found.ranks, "differs", "differ"), group.name,
                           contrast(group, *other, *records.at(*other), *like, *records.at(*like),
                                    verb(found.ranks, "it", "they"), "the others"));
  return found;
}

}  // namespace

std::optional<Finding> difference(const Group& group) {
  std::map<std::uint64_t, std::map<int, const Record*>> calls;
  for (const auto& [rank, ring] : group.rings) {
    for (const Record& record : ring.records) {
      if (record.number != 0) {
        calls[record.number][rank] = &record;
      }
    }
  }
  std::optional<Finding> first;
  int differ = 0;
  bool alike_later = false;
  for (const auto& [number, records] : calls) {
    if (records.size() < 2) {
      continue;
    }
    auto found = compare(group, records);
    differ += found ? 1 : 0;
    alike_later = alike_later || (first && !found && records.size() == group.rings.size());
    if (!first) {
      first = std::move(found);
    }
  }
  if (first && differ == 1 && alike_later) {
    first->kind = Finding::Kind::differed;
    first->text += "; later calls are alike";
  }
  return first;
}

}  // namespace cohort::trace
