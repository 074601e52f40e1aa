// SPDX-License-Identifier: Apache-2.0
#include "place.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace cohort::trace {
namespace {

bool is_launch(const Record& record) { return record.call == "launch"; }

std::vector<const Record*> own_list(const Ring& ring, std::uint64_t graph) {
  std::vector<const Record*> list;
  for (const Record& record : ring.captured) {
    if (record.where == graph) {
      list.push_back(&record);
    }
  }
  return list;
}

/// Steps of a launch that one inbox counts; nothing where that is not known.
std::optional<std::uint64_t> launch_steps(const Group& group, const Ring& ring,
                                          const Record& launch, int inbox) {
  if (launch.extents[2] <= 1) {
    return launch.inbox == inbox ? launch.extents[1] : 0;
  }
  const auto list = list_of(group, ring, launch);
  if (list.size() < launch.extents[0]) {
    return std::nullopt;
  }
  std::uint64_t steps = 0;
  for (const Record* const call : list) {
    steps += call->inbox == inbox ? call->steps : 0;
  }
  return steps;
}

/// Where in a launch the device of an inbox is that has done so many of its steps.
void look_into_launch(const Group& group, const Ring& ring, int inbox, std::uint64_t done,
                      Pending& pending) {
  const auto list = list_of(group, ring, pending.record);
  std::uint64_t listed = 0;
  for (const Record* const call : list) {
    listed += call->inbox == inbox ? call->steps : 0;
  }
  // Of a list that lost its beginning.
  const std::size_t lost =
      pending.record.extents[0] - std::min<std::size_t>(list.size(), pending.record.extents[0]);
  const std::uint64_t before =
      lost == 0
          ? 0
          : pending.record.extents[1] - std::min<std::uint64_t>(listed, pending.record.extents[1]);
  pending.done = done;
  if (done < before) {
    return;
  }
  done -= before;
  for (std::size_t i = 0; i < list.size(); ++i) {
    const std::uint64_t steps = list[i]->inbox == inbox ? list[i]->steps : 0;
    if (steps > done) {
      pending.inner = *list[i];
      pending.position = lost + i + 1;
      return;
    }
    done -= steps;
  }
}

/// Eager calls and launches, the newest first.
std::vector<const Record*> newest_first(const Ring& ring) {
  std::vector<const Record*> all;
  for (const auto* const part : {&ring.records, &ring.afterwards}) {
    for (const Record& record : *part) {
      all.push_back(&record);
    }
  }
  std::reverse(all.begin(), all.end());
  return all;
}

/// The work of an inbox that begins with the last `open` of its steps; nothing where the ring does
/// not tell.
std::optional<Pending> work_at(const Group& group, const Ring& ring, int inbox,
                               std::uint64_t open) {
  std::uint64_t seen = 0;
  for (const Record* const record : newest_first(ring)) {
    std::optional<std::uint64_t> steps = record->inbox == inbox ? record->steps : 0;
    if (is_launch(*record)) {
      steps = launch_steps(group, ring, *record, inbox);
    }
    if (!steps) {
      return std::nullopt;
    }
    seen += *steps;
    if (*steps == 0 || seen < open) {
      continue;
    }
    Pending found{.record = *record};
    if (is_launch(found.record)) {
      look_into_launch(group, ring, inbox, seen - open, found);
    }
    return found;
  }
  return std::nullopt;  // it is further behind than the ring reaches back
}

bool comes_before(const Pending& a, const Pending& b) {
  return std::pair(a.record.sequence, a.position) < std::pair(b.record.sequence, b.position);
}

/// Takes over what the device has not ended of an inbox, where that is earlier, and of what nobody
/// knows whether it has, where that is later. False where the first is not known.
bool look_at_inbox(const Group& group, const Ring& ring, int inbox, const Progress& progress,
                   Stand& stand) {
  if (progress.perhaps_left > progress.issued || progress.entered > progress.issued) {
    // Steps of a call under way are counted at its end; others are of launches of which nothing is
    // known.
    return open_record(ring) != nullptr || ring.open != 0;
  }
  if (progress.issued > progress.perhaps_left) {
    auto found = work_at(group, ring, inbox, progress.issued - progress.perhaps_left);
    if (!found) {
      return false;
    }
    found->begun = progress.entered > progress.perhaps_left;
    if (!stand.pending || comes_before(*found, *stand.pending)) {
      stand.pending = std::move(found);
    }
  }
  if (progress.perhaps_left > progress.left) {
    auto found = work_at(group, ring, inbox, progress.issued - progress.left);
    if (found && (!stand.unsure || comes_before(*stand.unsure, *found))) {
      found->begun = true;
      stand.unsure = std::move(found);
    }
  }
  return true;
}

/// The last number before a record.
std::uint64_t number_before(const Ring& ring, const Record& record) {
  std::uint64_t number = 0;
  for (const auto* const part : {&ring.records, &ring.afterwards}) {
    for (const Record& one : *part) {
      number = one.sequence < record.sequence && one.number != 0 ? one.number : number;
    }
  }
  return number;
}

/// The place of a device that has not ended this.
Place place_of(const Group& group, const Ring& ring, const Pending& pending) {
  const Place before{.number = number_before(ring, pending.record)};
  if (pending.record.number == 0) {
    return before;
  }
  if (!is_launch(pending.record)) {
    return pending.begun ? Place{.number = pending.record.number, .part = 1} : before;
  }
  std::uint64_t part = pending.done + (pending.begun ? 1 : 0);  // as good as any, without a list
  if (pending.inner) {
    const auto list = list_of(group, ring, pending.record);
    part = 0;
    for (const Record* const call : list) {
      const bool earlier = call->sequence < pending.inner->sequence;
      const bool itself = call->sequence == pending.inner->sequence && pending.begun;
      part = call->number != 0 && (earlier || itself) ? call->number : part;
    }
  }
  return part == 0 ? before : Place{.number = pending.record.number, .part = part};
}

}  // namespace

const Record* last_numbered(const Ring& ring) {
  const auto found = std::find_if(ring.records.rbegin(), ring.records.rend(),
                                  [](const Record& record) { return record.number != 0; });
  return found == ring.records.rend() ? nullptr : &*found;
}

const Record* numbered(const Ring& ring, std::uint64_t number) {
  const auto found =
      std::find_if(ring.records.rbegin(), ring.records.rend(),
                   [number](const Record& record) { return record.number == number; });
  return found == ring.records.rend() ? nullptr : &*found;
}

const Record* open_record(const Ring& ring) {
  const auto found =
      std::find_if(ring.records.begin(), ring.records.end(),
                   [&ring](const Record& record) { return record.sequence == ring.open; });
  return ring.open == 0 || found == ring.records.end() ? nullptr : &*found;
}

std::vector<const Record*> list_of(const Group& group, const Ring& ring, const Record& launch) {
  auto best = own_list(ring, launch.where);
  const std::size_t whole = launch.extents[0];
  for (const auto& [rank, other] : group.rings) {
    const Record* const same =
        best.size() >= whole || launch.number == 0 ? nullptr : numbered(other, launch.number);
    if (same == nullptr || same->signature != launch.signature || !is_launch(*same) ||
        same->extents[0] != whole) {
      continue;
    }
    if (auto theirs = own_list(other, same->where); theirs.size() > best.size()) {
      best = std::move(theirs);
    }
  }
  return best;
}

Stand stand_of(const Group& group, const Ring& ring) {
  Stand stand;
  const Record* const last = last_numbered(ring);
  const Record* const open = open_record(ring);
  stand.host = last == nullptr ? 0 : last->number;
  stand.place.number = stand.host;
  stand.waits = open != nullptr;
  bool counted = false;
  bool known = ring.device_known;
  for (const auto& [inbox, progress] : ring.progress) {
    counted = counted || progress.issued != 0 || progress.entered != 0;
    if (known && !look_at_inbox(group, ring, inbox, progress, stand)) {
      known = false;
      stand.steps_differ = true;
      stand.waits = stand.waits || progress.entered > progress.perhaps_left;
    }
  }
  stand.by_device = known && counted;
  // The host is in something definite, to which it came later.
  const bool host_is_in = !stand.pending && open != nullptr;
  if (!stand.by_device) {
    stand.pending.reset();
  }
  if (!stand.by_device || host_is_in) {
    stand.unsure.reset();
  }
  if (stand.pending) {
    stand.place = place_of(group, ring, *stand.pending);
    stand.waits = true;
  } else if (open != nullptr && open->number == stand.host && stand.host != 0) {
    stand.place.part = 1;
  }
  // What came too late to matter was begun later still.
  const Place end{.number = stand.host};
  const std::uint64_t newest = ring.records.empty() ? 0 : ring.records.back().sequence;
  if (stand.place > end || (stand.pending && stand.pending->record.sequence > newest)) {
    stand.place = end;
    stand.pending.reset();
    stand.waits = open != nullptr;
  }
  if (stand.unsure && stand.unsure->record.sequence > newest) {
    stand.unsure.reset();
  }
  if (stand.unsure) {
    stand.unsure_place = place_of(group, ring, *stand.unsure);
    // Where it has ended, work that has not begun waits for nobody.
    stand.waits = open != nullptr || (stand.pending && stand.pending->begun);
  }
  return stand;
}

std::string describe(const Ring& ring, const Pending& pending) {
  if (!pending.inner) {
    const bool lost = is_launch(pending.record) && pending.record.extents[0] != 0;
    return describe(ring, pending.record) +
           (lost
                ? fmt::format(" behind {} of its {} steps, in a part of its list of calls that was "
                              "not kept",
                              pending.done, pending.record.extents[1])
                : "");
  }
  return fmt::format("call {} of {} of graph {}, {}", pending.position, pending.record.extents[0],
                     pending.record.where, describe(ring, *pending.inner));
}

}  // namespace cohort::trace
