// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <ctime>
#include <iterator>
#include <limits>
#include <map>

#include "findings.hpp"

namespace cohort::trace {
namespace {

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

const Record* numbered(const Ring& ring, std::uint32_t number) {
  const auto found =
      std::find_if(ring.records.rbegin(), ring.records.rend(),
                   [number](const Record& record) { return record.number == number; });
  return found == ring.records.rend() ? nullptr : &*found;
}
const Record* last_numbered(const Ring& ring) {
  const auto found = std::find_if(ring.records.rbegin(), ring.records.rend(),
                                  [](const Record& record) { return record.number != 0; });
  return found == ring.records.rend() ? nullptr : &*found;
}
std::uint32_t last_number(const Ring& ring) {
  const Record* const last = last_numbered(ring);
  return last == nullptr ? 0 : last->number;
}
const Record* open_record(const Ring& ring) {
  const auto found =
      std::find_if(ring.records.begin(), ring.records.end(),
                   [&ring](const Record& record) { return record.sequence == ring.open; });
  return ring.open == 0 || found == ring.records.end() ? nullptr : &*found;
}

/// The calls of a graph, in order.
std::vector<const Record*> list_of(const Ring& ring, std::uint64_t graph) {
  std::vector<const Record*> list;
  for (const Record& record : ring.captured) {
    if (record.where == graph) {
      list.push_back(&record);
    }
  }
  return list;
}

/// Steps that a record takes of an inbox.
std::uint64_t steps_of(const Record& record) {
  return record.call == "launch" && record.extents.size() > 1 ? record.extents[1] : record.steps;
}

/// Where the device, or the host in a replay, is: "" where all has run.
std::string place_on_device(const Ring& ring) {
  for (const auto& [inbox, progress] : ring.progress) {
    if (progress.left >= progress.issued) {
      continue;
    }
    const std::uint64_t pending = progress.issued - progress.left;
    std::uint64_t seen = 0;
    for (auto record = ring.records.rbegin(); record != ring.records.rend(); ++record) {
      const std::uint64_t steps = record->inbox == inbox ? steps_of(*record) : 0;
      if (steps == 0 || (seen += steps) < pending) {
        continue;
      }
      if (record->call != "launch") {
        return describe(ring, *record);
      }
      std::uint64_t done = seen - pending;
      const auto list = list_of(ring, record->where);
      for (const Record* const call : list) {
        if (call->inbox == inbox && call->steps > done) {
          return fmt::format("call {} of {} of graph {}, {}", call->number,
                             std::max<std::uint64_t>(list.size(), record->extents.at(0)),
                             record->where, describe(ring, *call));
        }
        done -= call->inbox == inbox ? call->steps : 0;
      }
      return fmt::format("graph {}", record->where);
    }
  }
  return "";
}

std::string whereabouts(const State& state, const Group& group, int world) {
  for (const Group& other : state.groups) {
    for (const auto& [rank, ring] : other.rings) {
      if (other.ranks.at(static_cast<std::size_t>(rank)) != world) {
        continue;
      }
      if (ring.gone) {
        return "its process is gone";
      }
      const Record* const open = open_record(ring);
      if (open != nullptr && &other != &group) {
        return fmt::format("it is in {} of {}", describe(ring, *open), other.name);
      }
    }
  }
  return "it is in no call of the library";
}

}  // namespace

std::set<int> waiting_in(const Group& group) {
  std::uint32_t least = std::numeric_limits<std::uint32_t>::max();
  for (const auto& [rank, ring] : group.rings) {
    least = std::min(least, last_number(ring));
  }
  std::set<int> waiting;
  for (const auto& [rank, ring] : group.rings) {
    if (last_number(ring) > least) {
      waiting.insert(group.ranks.at(static_cast<std::size_t>(rank)));
    }
  }
  return waiting;
}

std::optional<Finding> behind(const State& state, const Group& group, const std::set<int>& waits) {
  std::uint32_t furthest = 0;
  std::uint32_t least = std::numeric_limits<std::uint32_t>::max();
  for (const auto& [rank, ring] : group.rings) {
    furthest = std::max(furthest, last_number(ring));
    least = std::min(least, last_number(ring));
  }
  if (group.rings.size() < 2 || least == furthest) {
    return std::nullopt;
  }
  Finding found{.kind = Finding::Kind::behind,
                .group = group.name,
                .since = std::numeric_limits<std::int64_t>::max()};
  const Record* next = nullptr;
  const Ring* came = nullptr;
  const Ring* late = nullptr;
  for (const auto& [rank, ring] : group.rings) {
    const int world = group.ranks.at(static_cast<std::size_t>(rank));
    if (last_number(ring) == least) {
      found.ranks.push_back(world);
      late = late == nullptr ? &ring : late;
      continue;
    }
    found.waiting.push_back(world);
    if (const Record* const record = numbered(ring, least + 1)) {
      if (next == nullptr || record->ns < next->ns) {
        next = record;
        came = &ring;
      }
      found.since = std::min(found.since, record->ns);
    }
  }
  // Whoever waits in another group is late for a reason that is told there.
  std::vector<int> excused;
  const auto waits_too = [&waits](int rank) { return waits.count(rank) > 0; };
  if (!std::all_of(found.ranks.begin(), found.ranks.end(), waits_too)) {
    std::copy_if(found.ranks.begin(), found.ranks.end(), std::back_inserter(excused), waits_too);
    std::erase_if(found.ranks, waits_too);
    for (const auto& [rank, ring] : group.rings) {
      late = group.ranks.at(static_cast<std::size_t>(rank)) == found.ranks.front() ? &ring : late;
    }
  }
  const Record* const last = last_numbered(*late);
  found.text = fmt::format("{} {} behind in {}", listed(found.ranks),
                           verb(found.ranks, "is", "are"), group.name);
  if (next != nullptr) {
    std::string inside = next->call == "launch" ? place_on_device(*came) : "";
    found.text += fmt::format(": {} not come to {}, to which {} came at {}, {} before the end{}",
                              verb(found.ranks, "it has", "they have"), describe(*came, *next),
                              listed(found.waiting), clock_time(found.since),
                              duration(state.end - found.since),
                              inside.empty() ? "" : ", and wait in " + inside);
  } else {
    found.since = state.end;
  }
  found.text += fmt::format("; {} last call there is {}", verb(found.ranks, "its", "their"),
                            last == nullptr ? "none" : describe(*late, *last));
  if (found.ranks.size() == 1) {
    found.text += fmt::format(", and {}", whereabouts(state, group, found.ranks.front()));
  }
  if (!excused.empty()) {
    found.text += fmt::format("; {} {} not come either, but {} in another group", listed(excused),
                              verb(excused, "has", "have"), verb(excused, "waits", "wait"));
  }
  return found;
}

std::optional<Finding> behind_on_device(const State& state, const Group& group) {
  std::map<int, std::uint64_t> done;
  for (const auto& [rank, ring] : group.rings) {
    for (const auto& [inbox, progress] : ring.progress) {
      done[rank] += progress.left;
    }
  }
  if (done.size() < 2) {
    return std::nullopt;
  }
  const auto order = [](const auto& a, const auto& b) { return a.second < b.second; };
  const auto [least, most] = std::minmax_element(done.begin(), done.end(), order);
  if (least->second == most->second) {
    return std::nullopt;
  }
  Finding found{.kind = Finding::Kind::behind_on_device, .group = group.name, .since = state.end};
  for (const auto& [rank, steps] : done) {
    (steps == least->second ? found.ranks : found.waiting)
        .push_back(group.ranks.at(static_cast<std::size_t>(rank)));
  }
  const std::string at = place_on_device(group.rings.at(least->first));
  found.text = fmt::format(
      "{} {} behind in {}: {} made the same calls as {}, but ended {} {} fewer{}",
      listed(found.ranks), verb(found.ranks, "is", "are"), group.name,
      verb(found.ranks, "it has", "they have"), listed(found.waiting), most->second - least->second,
      most->second - least->second == 1 ? "step" : "steps",
      at.empty() ? "" : fmt::format(", and {} in {}", verb(found.ranks, "is", "are"), at));
  return found;
}

}  // namespace cohort::trace
