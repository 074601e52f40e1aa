// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "analysis.hpp"
#include "findings.hpp"
#include "place.hpp"

namespace cohort::trace {
namespace {

/// What a rank's device does in a group, or "" for nothing that is known.
std::string device_text(const Group& group, const Ring& ring) {
  const Stand stand = stand_of(group, ring);
  if (stand.unsure) {
    return fmt::format("its device has begun {} of {}, the end of which is not recorded",
                       describe(ring, *stand.unsure), group.name);
  }
  return stand.pending
             ? fmt::format("its device is in {} of {}", describe(ring, *stand.pending), group.name)
             : "";
}

/// What is known of a rank that ranks wait for.
std::string whereabouts(const State& state, const Group& group, int rank) {
  const auto mine = group.rings.find(rank);
  if (mine == group.rings.end()) {
    return "it left no trace, nor did another rank of its machine";
  }
  if (mine->second.gone) {
    return "its process is gone";
  }
  std::string text;
  bool wrote = false;
  const int world = world_rank(group, rank);
  for (const Group& other : state.groups) {
    for (const auto& [r, ring] : other.rings) {
      if (world_rank(other, r) != world) {
        continue;
      }
      wrote = wrote || ring.own;
      if (const Record* const open = open_record(ring)) {
        text = fmt::format("it is in {} of {}", describe(ring, *open), other.name);
      } else if (text.empty() && &other != &group) {
        text = device_text(other, ring);
      }
    }
  }
  if (text.empty()) {
    text = wrote ? "it is in no call of the state"
                 : "as it wrote no trace itself, nothing else is known of it";
  }
  if (mine->second.left >= 0) {
    text += fmt::format("; its process was there when the first rank wrote, and gone within {}",
                        duration(mine->second.left));
  }
  return text;
}

/// Of ranks those that wait for nobody come first: whoever waits in another group is late for a
/// reason that is told there. Gives the others.
std::vector<int> excuse(const Group& group, std::vector<int>& ranks, const std::set<int>& waits) {
  const auto waits_too = [&](int rank) { return waits.count(world_rank(group, rank)) > 0; };
  std::vector<int> excused;
  if (!std::all_of(ranks.begin(), ranks.end(), waits_too)) {
    std::copy_if(ranks.begin(), ranks.end(), std::back_inserter(excused), waits_too);
    std::erase_if(ranks, waits_too);
  }
  return excused;
}

std::string excuse_text(const Group& group, const std::vector<int>& excused) {
  const auto ranks = world_ranks(group, excused);
  return excused.empty()
             ? ""
             : fmt::format("; {} {} not come either, but {} in another group", listed(ranks),
                           verb(ranks, "has", "have"), verb(ranks, "waits", "wait"));
}

/// Ranks whose device has not come as far as that of others, although their hosts enqueued the
/// work.
Finding behind_on_device(const State& state, const Judged& judged, const std::vector<int>& ranks,
                         const std::vector<int>& excused) {
  const Group& group = *judged.group;
  const int rank = ranks.front();
  const Ring& ring = group.rings.at(rank);
  const Stand& stand = judged.stands.by_rank.at(rank);
  Finding found{.kind = Finding::Kind::behind_on_device,
                .group = group.name,
                .ranks = world_ranks(group, ranks),
                .waiting = world_ranks(group, judged.order.ahead),
                .since = stand.pending->record.ns};
  const int further = judged.order.ahead.front();
  const Stand& other = judged.stands.by_rank.at(further);
  const auto other_ring = group.rings.find(further);
  const bool one = judged.order.ahead.size() == 1;
  std::string theirs = one ? "has ended it" : "have ended it";
  if (other.unsure && other_ring != group.rings.end()) {
    theirs = fmt::format("{} begun {}", one ? "has" : "have",
                         describe(other_ring->second, *other.unsure));
  } else if (other.pending && other_ring != group.rings.end()) {
    const char* const come = one ? "has come to" : "have come to";
    const char* const in = one ? "is in" : "are in";
    theirs = fmt::format("{} {}", other.pending->begun ? in : come,
                         describe(other_ring->second, *other.pending));
  }
  const Record* const last = last_numbered(ring);
  found.text = fmt::format(
      "the {} of {} {} behind in {}: {} {} {}, while {} of {} {}; {} made all calls up to {}",
      ranks.size() == 1 ? "device" : "devices", listed(found.ranks), verb(found.ranks, "is", "are"),
      group.name, verb(found.ranks, "it", "they"),
      stand.pending->begun ? verb(found.ranks, "is in", "are in")
                           : verb(found.ranks, "has not begun", "have not begun"),
      describe(ring, *stand.pending), one ? "that" : "those", listed(found.waiting), theirs,
      verb(found.ranks, "its host has", "their hosts have"),
      last == nullptr ? "none" : describe(ring, *last));
  found.text += excuse_text(group, excused);
  static_cast<void>(state);
  return found;
}

/// Ranks whose host has not made a call which others have.
Finding behind_on_host(const State& state, const Judged& judged, const std::vector<int>& ranks,
                       const std::vector<int>& excused) {
  const Group& group = *judged.group;
  Finding found{.kind = Finding::Kind::behind,
                .group = group.name,
                .ranks = world_ranks(group, ranks),
                .waiting = world_ranks(group, judged.order.ahead)};
  const Ring* came = nullptr;
  const Record* const next = next_record(group, judged.order, &came);
  const auto late = group.rings.find(ranks.front());
  found.text = fmt::format("{} {} behind in {}", listed(found.ranks),
                           verb(found.ranks, "is", "are"), group.name);
  if (next != nullptr) {
    found.since = next->ns;
    std::string inside;
    if (const Stand& stand = judged.stands.by_rank.at(came->rank);
        next->call == "launch" && stand.unsure) {
      inside =
          ", of which the last that is known to have begun is " + describe(*came, *stand.unsure);
    } else if (next->call == "launch" && stand.pending) {
      inside = ", and wait in " + describe(*came, *stand.pending);
    }
    found.text += fmt::format(": {} not come to {}, to which {} came at {}, {} before the end{}",
                              verb(found.ranks, "it has", "they have"), describe(*came, *next),
                              listed(found.waiting), clock_time(found.since),
                              duration(end_of(state, *came) - found.since), inside);
  }
  if (late == group.rings.end()) {
    found.text += "; " + verb(found.ranks, "it", "they") +
                  " left no trace, nor did another rank of " +
                  verb(found.ranks, "its machine", "their machines");
    return found;
  }
  const std::uint64_t number = judged.stands.by_rank.at(ranks.front()).host;
  const Record* const last = numbered(late->second, number);
  found.text +=
      fmt::format("; {} last call there is {}", verb(found.ranks, "its", "their"),
                  last == nullptr || number == 0 ? "none" : describe(late->second, *last));
  if (found.ranks.size() == 1) {
    found.text += fmt::format(", and {}", whereabouts(state, group, ranks.front()));
  }
  found.text += excuse_text(group, excused);
  return found;
}

}  // namespace

std::optional<Finding> behind(const State& state, const Judged& judged,
                              const std::set<int>& waits) {
  if (!judged.order.waited) {
    return std::nullopt;
  }
  const Group& group = *judged.group;
  std::vector<int> ranks = judged.order.behind;
  const auto excused = excuse(group, ranks, waits);
  const auto on_device = [&](int rank) {
    const Stand& stand = judged.stands.by_rank.at(rank);
    return stand.pending && group.rings.count(rank) > 0;
  };
  // Devices first: what a host enqueues behind them does not help.
  std::vector<int> devices;
  std::copy_if(ranks.begin(), ranks.end(), std::back_inserter(devices), on_device);
  if (!devices.empty() && devices.size() == ranks.size()) {
    return behind_on_device(state, judged, devices, excused);
  }
  std::erase_if(ranks, on_device);
  return behind_on_host(state, judged, ranks, excused);
}

Finding unmatched(const State& state, const Judged& judged, const PairWait& wait) {
  const Group& group = *judged.group;
  const int waits = world_rank(group, wait.rank);
  const int peer = world_rank(group, wait.peer);
  return {.kind = Finding::Kind::behind,
          .group = group.name,
          .ranks = {peer},
          .waiting = {waits},
          .since = wait.record.ns,
          .text = fmt::format(
              "rank {} is behind in {}: rank {} has waited for it in {} {} it for {}; {}", peer,
              group.name, waits, describe(group.rings.at(wait.rank), wait.record),
              wait.record.call == "send" ? "to" : "from", duration(wait.for_ns),
              whereabouts(state, group, wait.peer))};
}

std::optional<Finding> fewer_steps(const Group& group) {
  std::map<int, std::uint64_t> done;
  bool graphs = false;
  for (const auto& [rank, ring] : group.rings) {
    const auto pairs = [](const Record& record) {
      return record.call == "send" || record.call == "recv";
    };
    if (!ring.device_known || std::any_of(ring.records.begin(), ring.records.end(), pairs) ||
        std::any_of(ring.captured.begin(), ring.captured.end(), pairs)) {
      return std::nullopt;
    }
    graphs = graphs || stand_of(group, ring).steps_differ;
    for (const auto& [inbox, progress] : ring.progress) {
      done[rank] += progress.entered;
    }
  }
  if (!graphs || done.size() < 2) {
    return std::nullopt;
  }
  const auto order = [](const auto& a, const auto& b) { return a.second < b.second; };
  const auto [least, most] = std::minmax_element(done.begin(), done.end(), order);
  if (least->second == most->second) {
    return std::nullopt;
  }
  Finding found{.kind = Finding::Kind::behind_on_device, .group = group.name};
  for (const auto& [rank, steps] : done) {
    (steps == least->second ? found.ranks : found.waiting).push_back(world_rank(group, rank));
  }
  const std::uint64_t fewer = most->second - least->second;
  found.text = fmt::format(
      "{} {} behind in {}: {} made the same calls as {}, as far as is known, but begun {} {} "
      "fewer, "
      "in graphs whose launches the engine does not number",
      listed(found.ranks), verb(found.ranks, "is", "are"), group.name,
      verb(found.ranks, "it has", "they have"), listed(found.waiting), fewer,
      fewer == 1 ? "step" : "steps");
  return found;
}

namespace {

/// Where ranks are that have all come equally far.
struct Waiting {
  std::vector<int> ranks = {};   ///< World ranks that wait.
  std::vector<int> unsure = {};  ///< Those of which it is known alone that they began the call.
  std::string text = {};         ///< "all_reduce #5 of f32(16)"
  std::int64_t since = 0;
  std::int64_t for_ns = 0;

  [[nodiscard]] std::vector<int> all() const {
    std::vector<int> both = ranks;
    both.insert(both.end(), unsure.begin(), unsure.end());
    return both;
  }
};

/// Whether a device that is known would show that the call is under way.
bool device_counts(const Record& record) {
  return (record.call == "launch" ? record.extents[1] : record.steps) > 0;
}

std::optional<Waiting> waiting_together(const State& state, const Judged& judged) {
  const Group& group = *judged.group;
  std::optional<Waiting> waiting;
  for (const auto& [rank, stand] : judged.stands.by_rank) {
    const auto found = group.rings.find(rank);
    if (found == group.rings.end() || !(stand.waits || stand.unsure) ||
        pair_call(stand, found->second) != nullptr) {
      continue;
    }
    const Ring& ring = found->second;
    const auto& on_device = stand.unsure ? stand.unsure : stand.pending;
    const Record* const open = open_record(ring);
    const Record* const record = on_device         ? &on_device->record
                                 : open != nullptr ? open
                                                   : last_numbered(ring);
    if (record == nullptr || (on_device == std::nullopt && open == nullptr && stand.by_device &&
                              device_counts(*record))) {
      continue;
    }
    if (!waiting) {
      waiting = Waiting{.text = on_device ? describe(ring, *on_device) : describe(ring, *record),
                        .since = record->ns};
    }
    (stand.unsure ? waiting->unsure : waiting->ranks).push_back(world_rank(group, rank));
    waiting->for_ns = std::max(waiting->for_ns, end_of(state, ring) - record->ns);
  }
  const bool failed =
      std::any_of(group.failures.begin(), group.failures.end(),
                  [](const auto& one) { return one.second.late && !one.second.over; });
  return waiting && (failed || waiting->for_ns >= kPatience) ? waiting : std::nullopt;
}

}  // namespace

std::optional<Finding> unknown(const State& state, const Judged& judged) {
  const Group& group = *judged.group;
  const auto waiting = waiting_together(state, judged);
  if (group.forsaken.empty() || !waiting) {
    return std::nullopt;
  }
  Finding found{.kind = Finding::Kind::unknown,
                .group = group.name,
                .ranks = world_ranks(group, {group.forsaken.begin(), group.forsaken.end()}),
                .waiting = waiting->all(),
                .since = waiting->since};
  const std::string come =
      waiting->ranks.empty()
          ? fmt::format("{} {} begun {} {} before the end, the end of which is not recorded",
                        listed(found.waiting), verb(found.waiting, "has", "have"), waiting->text,
                        duration(waiting->for_ns))
          : fmt::format("{} {} in {} for {}", listed(found.waiting),
                        verb(found.waiting, "has waited", "have waited"), waiting->text,
                        duration(waiting->for_ns));
  found.text = fmt::format(
      "nothing is known of {} in {}, of which no trace was found, nor one of another rank of {}: "
      "{}, to which no other rank is known to be late",
      listed(found.ranks), group.name, verb(found.ranks, "its machine", "their machines"), come);
  return found;
}

std::optional<Finding> together(const State& state, const Judged& judged) {
  const Group& group = *judged.group;
  const auto waiting = waiting_together(state, judged);
  if (!waiting || waiting->all().size() < group.ranks.size() || !judged.order.ahead.empty()) {
    return std::nullopt;
  }
  Finding found{.kind = Finding::Kind::together,
                .group = group.name,
                .ranks = waiting->all(),
                .since = waiting->since};
  const auto& unsure = waiting->unsure;
  if (waiting->ranks.empty()) {
    found.kind = Finding::Kind::begun;
    found.text = fmt::format(
        "{} have all begun {} of {}, {} before the end, and its end is not "
        "recorded",
        listed(found.ranks), waiting->text, group.name, duration(waiting->for_ns));
  } else if (!unsure.empty()) {
    found.text = fmt::format(
        "{} {} in {} of {} for {}, which {} {} begun as well, and its end is "
        "not recorded there",
        listed(waiting->ranks), verb(waiting->ranks, "is", "are"), waiting->text, group.name,
        duration(waiting->for_ns), listed(unsure), verb(unsure, "has", "have"));
  } else {
    found.text =
        fmt::format("{} are all in {} of {} for {}, and none has come to its end",
                    listed(found.ranks), waiting->text, group.name, duration(waiting->for_ns));
  }
  return found;
}

}  // namespace cohort::trace
