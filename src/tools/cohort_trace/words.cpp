// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>

#include "findings.hpp"

namespace cohort::trace {

std::string listed(std::vector<int> ranks) {
  std::sort(ranks.begin(), ranks.end());
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    text += fmt::format("{}{}", i == 0 ? "" : i + 1 == ranks.size() ? " and " : ", ", ranks[i]);
  }
  return text;
}

std::string verb(const std::vector<int>& ranks, const char* one, const char* more) {
  return ranks.size() == 1 ? one : more;
}

std::string describe(const Ring& ring, const Record& record) {
  const std::string name =
      record.captured ? record.call : fmt::format("{} #{}", record.call, record.number);
  if (record.call == "agreement") {
    const auto note = ring.notes.find(record.variant);
    return note == ring.notes.end() ? name : fmt::format("{} on {}", name, note->second);
  }
  if (record.call == "launch") {
    return record.where == 0 ? fmt::format("{} of a graph", name)
                             : fmt::format("{} of graph {}", name, record.where);
  }
  if (record.call == "barrier") {
    return name;
  }
  std::string extents;
  for (const std::uint32_t extent : record.extents) {
    extents += fmt::format("{}{}", extents.empty() ? "" : ",", extent);
  }
  const bool more = record.ndim > static_cast<int>(record.extents.size());
  return fmt::format("{} of {}({}{})", name, record.dtype, extents, more ? ",..." : "");
}

}  // namespace cohort::trace
