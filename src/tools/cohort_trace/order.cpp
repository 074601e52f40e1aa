// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "analysis.hpp"
#include "findings.hpp"
#include "place.hpp"

namespace cohort::trace {
namespace {

/// The call in which a rank failed; 0 where it was in none, as far as is known.
std::uint64_t failed_in(const Ring& ring, const Stand& stand) {
  if (const Record* const open = open_record(ring)) {
    return open->number;
  }
  const auto& on_device = stand.unsure ? stand.unsure : stand.pending;
  return on_device ? on_device->record.number : 0;
}

/// What a device counts are calls that no rank ends before all have begun them: where one has not,
/// the others are still in it.
void make_sure(Stands& stands) {
  for (auto& [rank, stand] : stands.by_rank) {
    const bool is_in =
        stand.unsure && std::any_of(stands.by_rank.begin(), stands.by_rank.end(),
                                    [&unsure = stand.unsure_place](const auto& other) {
                                      return other.second.place < unsure;
                                    });
    if (is_in) {
      stand.place = stand.unsure_place;
      stand.pending = std::exchange(stand.unsure, std::nullopt);
      stand.waits = true;
    }
  }
}

/// What a time-out says of those that it missed holds whatever they did later: they had not come.
Stands stands_in(const Group& group) {
  Stands stands;
  for (const auto& [rank, ring] : group.rings) {
    stands.by_rank[rank] = stand_of(group, ring);
  }
  for (const auto& [rank, failure] : group.failures) {
    const auto ring = group.rings.find(rank);
    if (ring == group.rings.end() || failure.over) {
      continue;
    }
    Stand& stand = stands.by_rank.at(rank);
    stand.waits = true;
    const std::uint64_t call = failed_in(ring->second, stand);
    for (const int missing : failure.missing) {
      if (call != 0 && missing != rank) {
        stands.late[missing] = std::max(stands.late[missing], call);
      }
    }
  }
  for (const auto& [rank, call] : stands.late) {
    const auto stand = stands.by_rank.find(rank);
    if (stand != stands.by_rank.end() && stand->second.place.number >= call) {
      stand->second.place = {.number = call - 1};
      stand->second.host = std::min(stand->second.host, call - 1);
      stand->second.pending.reset();
      stand->second.unsure.reset();
      stand->second.waits = false;
    } else if (stand == stands.by_rank.end()) {
      stands.by_rank[rank] = {.host = call - 1, .place = {.number = call - 1}};
    }
  }
  make_sure(stands);
  return stands;
}

/// Those whose peer is not in the other half of the same exchange.
std::vector<PairWait> pair_waits(const State& state, const Group& group, const Stands& stands) {
  std::vector<PairWait> waits;
  for (const auto& [rank, ring] : group.rings) {
    const Stand& stand = stands.by_rank.at(rank);
    const Record* const record = pair_call(stand, ring);
    if (record == nullptr || record->variant < 0 ||
        record->variant >= static_cast<int>(group.ranks.size())) {
      continue;
    }
    const int peer = record->variant;
    const auto theirs = group.rings.find(peer);
    const Record* const other =
        theirs == group.rings.end() ? nullptr : pair_call(stands.by_rank.at(peer), theirs->second);
    if (other != nullptr && other->variant == rank && other->call != record->call) {
      continue;
    }
    const std::int64_t since = stand.pending ? stand.pending->record.ns : record->ns;
    const auto failure = group.failures.find(rank);
    const bool failed = failure != group.failures.end() && !failure->second.over;
    if (const std::int64_t for_ns = end_of(state, ring) - since; failed || for_ns >= kPatience) {
      waits.push_back({rank, peer, *record, for_ns});
    }
  }
  return waits;
}

Order order_of(const State& state, const Group& group, const Stands& stands) {
  Order order;
  if (stands.by_rank.empty()) {
    return order;
  }
  order.least =
      std::min_element(stands.by_rank.begin(), stands.by_rank.end(),
                       [](const auto& a, const auto& b) { return a.second.place < b.second.place; })
          ->second.place;
  for (const auto& [rank, stand] : stands.by_rank) {
    if (!stand.may_be_at(order.least)) {
      (stand.place == order.least ? order.behind : order.ahead).push_back(rank);
    }
  }
  order.waited = std::any_of(order.ahead.begin(), order.ahead.end(), [&](int rank) {
    return group.failures.count(rank) > 0 && !group.failures.at(rank).over;
  });
  const Ring* came = nullptr;
  if (const Record* const next = next_record(group, order, &came)) {
    order.waited = order.waited || end_of(state, *came) - next->ns >= kPatience;
  }
  for (const int rank : order.ahead) {
    const Stand& stand = stands.by_rank.at(rank);
    if (stand.waits && stand.pending) {
      order.waited = order.waited ||
                     end_of(state, group.rings.at(rank)) - stand.pending->record.ns >= kPatience;
    }
  }
  order.waited = order.waited && !order.ahead.empty();
  return order;
}

}  // namespace

const Record* pair_call(const Stand& stand, const Ring& ring) {
  const Record* record = open_record(ring);
  if (stand.pending) {
    record = stand.pending->inner ? &*stand.pending->inner : &stand.pending->record;
  }
  return record != nullptr && (record->call == "send" || record->call == "recv") ? record : nullptr;
}

int world_rank(const Group& group, int rank) {
  return group.ranks.at(static_cast<std::size_t>(rank));
}

std::vector<int> world_ranks(const Group& group, const std::vector<int>& ranks) {
  std::vector<int> all;
  for (const int rank : ranks) {
    all.push_back(world_rank(group, rank));
  }
  return all;
}

/// The end of what a ring shows.
std::int64_t end_of(const State& state, const Ring& ring) {
  const auto end = state.ends.find(ring.machine);
  return end == state.ends.end() ? ring.written : end->second;
}

/// The record to which some of the ranks came and others did not: of the rank that came first.
const Record* next_record(const Group& group, const Order& order, const Ring** of) {
  const Record* next = nullptr;
  for (const int rank : order.ahead) {
    const auto ring = group.rings.find(rank);
    const Record* const record =
        ring == group.rings.end() ? nullptr : numbered(ring->second, order.least.number + 1);
    if (record != nullptr &&
        (next == nullptr || ((*of)->machine == ring->second.machine && record->ns < next->ns))) {
      next = record;
      *of = &ring->second;
    }
  }
  return next;
}

Judged judge(const State& state, const Group& group) {
  Judged judged{.group = &group, .stands = stands_in(group), .order = {}, .pairs = {}};
  judged.order = order_of(state, group, judged.stands);
  judged.pairs = pair_waits(state, group, judged.stands);
  return judged;
}

/// Ranks that wait for others: in some group they came to a call, and others did not or are
/// unknown.
std::set<int> waiting_in(const Judged& judged) {
  std::set<int> waiting;
  const Group& group = *judged.group;
  for (const PairWait& wait : judged.pairs) {
    waiting.insert(world_rank(group, wait.rank));
  }
  const auto& ranks = judged.order.ahead;
  if (judged.order.waited) {
    for (const int rank : ranks) {
      waiting.insert(world_rank(group, rank));
    }
  } else if (!group.forsaken.empty()) {
    for (const auto& [rank, stand] : judged.stands.by_rank) {
      if (stand.waits) {
        waiting.insert(world_rank(group, rank));
      }
    }
  }
  return waiting;
}

}  // namespace cohort::trace
