// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "analysis.hpp"

namespace cohort::trace {
namespace {

using nlohmann::json;

Record record_of(const json& j) {
  constexpr unsigned kCaptured = 1;  // as in flight_ring.hpp
  constexpr unsigned kFailed = 4;
  Record record;
  record.sequence = j.at(0);
  record.ns = j.at(1);
  record.call = j.at(2);
  record.number = j.at(3);
  record.signature = j.at(4);
  record.dtype = j.at(5);
  record.path = j.at(6);
  const auto flags = j.at(7).get<unsigned>();
  record.captured = (flags & kCaptured) != 0;
  record.failed = (flags & kFailed) != 0;
  record.inbox = j.at(8);
  record.steps = j.at(9);
  record.where = j.at(10);
  record.variant = j.at(11);
  record.ndim = j.at(12);
  record.extents = j.at(13).get<std::vector<std::uint32_t>>();
  const std::size_t least = record.call == "launch" ? 3 : record.call == "agreement" ? 1 : 0;
  record.extents.resize(std::max(record.extents.size(), least));
  return record;
}

Ring ring_of(const json& j) {
  Ring ring;
  ring.rank = j.at("rank");
  ring.own = j.at("own");
  ring.gone = j.at("gone");
  ring.ended = j.at("ended");
  ring.open = j.at("open");
  // What is asked of a device was true when its own rank looked, not when another wrote.
  ring.device_known =
      j.at("live").get<bool>() || (ring.own && j.at("looked").get<std::int64_t>() != 0);
  for (const auto& one : j.at("progress")) {
    ring.progress[one.at(0)] = {one.at(1), one.at(2), one.at(3), one.at(4)};
  }
  for (const auto& one : j.at("counters")) {
    ring.counters.push_back({one.at(0), one.at(1), one.at(2), one.at(3)});
  }
  for (const auto& one : j.at("notes")) {
    ring.notes[one.at(0)] = one.at(1);
  }
  for (const auto& one : j.at("records")) {
    ring.records.push_back(record_of(one));
  }
  for (const auto& one : j.at("captured")) {
    ring.captured.push_back(record_of(one));
  }
  return ring;
}

/// A group as one file has it.
struct GroupView {
  std::string name;
  std::vector<int> ranks;
  int rank = 0;
  bool failed = false;
  Failure failure;
  std::vector<Ring> rings;
};

/// One file.
struct File {
  std::string run;
  bool agreed = true;
  int rank = 0;
  int ranks = 0;
  std::vector<int> hosts;
  std::string machine;
  std::int64_t written = 0;
  bool late = false;
  bool failed = false;  ///< It was written because a call failed.
  std::string reason;
  std::vector<GroupView> groups;
};

GroupView group_of(const json& j, const File& file) {
  GroupView group;
  group.name = j.at("name");
  group.ranks = j.at("ranks").get<std::vector<int>>();
  group.rank = j.at("rank");
  const auto size = static_cast<int>(group.ranks.size());
  const auto check = [size](int rank) {
    if (rank < 0 || rank >= size) {
      throw std::runtime_error(fmt::format("rank {} in a group of {}", rank, size));
    }
  };
  check(group.rank);
  if (const json& failure = j.at("failure"); !failure.is_null()) {
    group.failed = true;
    group.failure = {.why = failure.at("why"),
                     .late = failure.at("late"),
                     .over = failure.at("over"),
                     .missing = failure.at("missing").get<std::vector<int>>()};
    std::for_each(group.failure.missing.begin(), group.failure.missing.end(), check);
  }
  for (const auto& one : j.at("rings")) {
    Ring ring = ring_of(one);
    check(ring.rank);
    ring.written = file.written;
    ring.machine = file.machine;
    ring.writer = file.rank;
    ring.late = file.late;
    group.rings.push_back(std::move(ring));
  }
  return group;
}

File file_of(const std::string& text) {
  const json j = json::parse(text);
  if (!j.is_object() || j.value("cohort_trace", 0) != 3) {
    throw std::runtime_error("no trace of a version that this program knows");
  }
  File file;
  file.run = j.at("run");
  file.agreed = file.run.find_first_not_of('0') != std::string::npos;
  file.rank = j.at("rank");
  file.ranks = j.at("ranks");
  file.hosts = j.at("hosts").get<std::vector<int>>();
  file.written = j.at("written");
  file.machine = j.at("machine");
  if (file.machine.empty()) {
    file.machine = fmt::format("that of rank {}", file.rank);
  }
  file.late = j.at("late");
  file.reason = j.at("reason");
  if (file.rank < 0 || file.rank >= file.ranks) {
    throw std::runtime_error(fmt::format("rank {} of {}", file.rank, file.ranks));
  }
  for (const auto& group : j.at("groups")) {
    file.groups.push_back(group_of(group, file));
    file.failed = file.failed || file.groups.back().failed;
  }
  return file;
}

/// When what a machine's ranks did ceases to matter: at their first time-out, or where none of them
/// failed, at the first file, so that all are seen at one moment. Nothing for others.
std::map<std::string, std::int64_t> ends_of(const std::vector<File>& files) {
  std::map<std::string, std::int64_t> late;
  std::map<std::string, std::int64_t> first;
  std::map<std::string, bool> failed;
  const auto least = [](auto& map, const std::string& key, std::int64_t value) {
    const auto [found, fresh] = map.emplace(key, value);
    found->second = std::min(found->second, value);
  };
  for (const File& file : files) {
    if (file.late) {
      least(late, file.machine, file.written);
    }
    least(first, file.machine, file.written);
    failed[file.machine] = failed[file.machine] || file.failed;
  }
  for (const auto& [machine, written] : first) {
    if (!failed[machine]) {
      late.emplace(machine, written);
    }
  }
  return late;
}

/// Leaves out what came after the end on its machine.
void cut(Ring& ring, const std::map<std::string, std::int64_t>& ends) {
  const auto end = ends.find(ring.machine);
  if (end == ends.end()) {
    return;
  }
  const auto later = std::find_if(ring.records.begin(), ring.records.end(),
                                  [end](const Record& record) { return record.ns > end->second; });
  ring.afterwards.assign(std::make_move_iterator(later),
                         std::make_move_iterator(ring.records.end()));
  ring.records.erase(later, ring.records.end());
}

/// Of the views of one ring that which shows most of its end, of equal ones the rank's own. Whether
/// its process was there is what the first file says: ranks that failed leave, and those that write
/// later see that.
Ring best_of(std::vector<Ring> views) {
  std::int64_t first = 0;
  bool late = false;
  bool gone = false;
  bool wrote = false;
  std::int64_t left = -1;
  std::sort(views.begin(), views.end(),
            [](const Ring& a, const Ring& b) { return a.written < b.written; });
  for (const Ring& view : views) {
    wrote = wrote || view.own;
    if (first == 0 && !view.own) {
      first = view.written;
      late = view.late;
      gone = view.gone;
      left = gone ? 0 : -1;
    } else if (view.gone && left < 0) {
      left = view.written - first;
    }
  }
  // Connections close a moment before a process has ended.
  constexpr std::int64_t kMoment = 1'000'000'000;
  gone = gone || (!late && !wrote && left >= 0 && left < kMoment);
  const auto last = [](const Ring& one) {
    return one.records.empty() ? 0 : one.records.back().sequence;
  };
  const auto worth = [&last](const Ring& one) {
    return std::tuple(last(one), one.own, one.written);
  };
  const auto best = std::max_element(views.begin(), views.end(), [&](const Ring& a, const Ring& b) {
    return worth(a) < worth(b);
  });
  // A rank that wrote later was elsewhere by then.
  const auto at_the_end = std::find_if(views.begin(), views.end(),
                                       [&](const Ring& one) { return last(one) == last(*best); });
  const std::uint64_t open = best->afterwards.empty() ? best->open : at_the_end->open;
  Ring ring = std::move(*best);
  ring.open = open;
  ring.gone = gone;
  ring.left = gone ? 0 : left;
  ring.own = wrote;
  return ring;
}

State state_of(std::vector<File> files) {
  // Of several files of one rank the newest.
  std::sort(files.begin(), files.end(), [](const File& a, const File& b) {
    return std::pair(a.rank, -a.written) < std::pair(b.rank, -b.written);
  });
  files.erase(std::unique(files.begin(), files.end(),
                          [](const File& a, const File& b) { return a.rank == b.rank; }),
              files.end());
  State state;
  state.run = files.front().run;
  state.agreed = files.front().agreed;
  state.ends = ends_of(files);
  using Key = std::pair<std::string, std::vector<int>>;
  std::vector<Key> order;
  std::map<Key, std::map<int, std::vector<Ring>>> views;
  std::map<Key, Group> groups;
  for (File& file : files) {
    state.written = std::max(state.written, file.written);
    state.reasons[file.rank] = file.reason;
    state.hosts = file.hosts.empty() ? state.hosts : file.hosts;
    for (GroupView& view : file.groups) {
      const Key key(view.name, view.ranks);
      if (groups.emplace(key, Group{view.name, view.ranks, {}, {}, {}}).second) {
        order.push_back(key);
      }
      if (view.failed) {
        groups[key].failures[view.rank] = view.failure;
      }
      for (Ring& ring : view.rings) {
        cut(ring, state.ends);
        views[key][ring.rank].push_back(std::move(ring));
      }
    }
  }
  for (const Key& key : order) {
    Group& group = groups[key];
    for (auto& [rank, all] : views[key]) {
      group.rings.emplace(rank, best_of(std::move(all)));
    }
    for (int rank = 0; rank < static_cast<int>(group.ranks.size()); ++rank) {
      if (group.rings.count(rank) == 0) {
        group.forsaken.insert(rank);
      }
    }
    state.groups.push_back(std::move(group));
  }
  return state;
}

}  // namespace

Reading read(const std::vector<std::pair<std::string, std::string>>& files) {
  Reading reading;
  std::map<std::string, std::vector<File>> runs;
  for (const auto& [name, text] : files) {
    try {
      File file = file_of(text);
      runs[file.run].push_back(std::move(file));
    } catch (const std::exception& error) {
      reading.notes.push_back(fmt::format("left out: {}: {}", name, error.what()));
    }
  }
  for (auto& [run, of_run] : runs) {
    reading.states.push_back(state_of(std::move(of_run)));
  }
  std::sort(reading.states.begin(), reading.states.end(),
            [](const State& a, const State& b) { return a.written < b.written; });
  return reading;
}

}  // namespace cohort::trace
