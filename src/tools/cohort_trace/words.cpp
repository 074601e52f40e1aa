// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <string>
#include <vector>

#include "analysis.hpp"
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

std::string clock_time(std::int64_t ns) {
  const std::time_t seconds = ns / 1'000'000'000;
  std::tm broken{};
  gmtime_r(&seconds, &broken);
  return fmt::format("{:02}:{:02}:{:02}.{:03} UTC", broken.tm_hour, broken.tm_min, broken.tm_sec,
                     ns / 1'000'000 % 1000);
}

std::string duration(std::int64_t ns) {
  return ns < 1'000'000'000 ? fmt::format("{} ms", ns / 1'000'000)
                            : fmt::format("{:.1f} s", static_cast<double>(ns) / 1e9);
}

std::string describe(const Ring& ring, const Record& record) {
  const std::string name =
      fmt::format("{}{}{}", record.failed ? "failed " : "", record.call,
                  record.captured || record.number == 0 ? "" : fmt::format(" #{}", record.number));
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
