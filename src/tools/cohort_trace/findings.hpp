// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "analysis.hpp"
#include "place.hpp"

/// \file
/// What can be found in one group, each kind in a file of its own, and the words for it.

namespace cohort::trace {

/// "rank 3", or "ranks 1, 2 and 3".
[[nodiscard]] std::string listed(std::vector<int> ranks);
/// `one` for one rank, `more` for more.
[[nodiscard]] std::string verb(const std::vector<int>& ranks, const char* one, const char* more);

/// Of a rank in the group.
[[nodiscard]] int world_rank(const Group& group, int rank);
/// Of each of them.
[[nodiscard]] std::vector<int> world_ranks(const Group& group, const std::vector<int>& ranks);
/// The end of what a ring shows, by the clock of its machine.
[[nodiscard]] std::int64_t end_of(const State& state, const Ring& ring);

/// Where the ranks of a group stand, as far as is known.
struct Stands {
  std::map<int, Stand> by_rank = {};       ///< Of those whose rings are known.
  std::map<int, std::uint64_t> late = {};  ///< Calls for which time-outs missed ranks.
};

/// Ranks of a group by how far they came.
struct Order {
  Place least;
  std::vector<int> behind = {};  ///< Ranks in the group that came no further.
  std::vector<int> ahead = {};   ///< The others, but those that may have come no further.
  bool waited = false;           ///< Somebody waits for somebody.
};

/// A rank that waits for its peer in a send or recv.
struct PairWait {
  int rank = 0;  ///< In the group, as the peer.
  int peer = 0;
  Record record;
  std::int64_t for_ns = 0;
};

/// A group with what is known of it.
struct Judged {
  const Group* group;
  Stands stands;
  Order order;
  std::vector<PairWait> pairs;
};

/// How long calls may be apart before a rank is behind in them.
inline constexpr std::int64_t kPatience = 500'000'000;

/// The send or recv in which a rank is, or null.
[[nodiscard]] const Record* pair_call(const Stand& stand, const Ring& ring);
/// How far the ranks of a group came.
[[nodiscard]] Judged judge(const State& state, const Group& group);
/// The record to which some of the ranks came and others did not: of the rank that came first,
/// whose ring goes to `of`. Null where no ring reaches back so far.
[[nodiscard]] const Record* next_record(const Group& group, const Order& order, const Ring** of);
/// Ranks that wait for others: in some group they came to a call, and others did not or are
/// unknown.
[[nodiscard]] std::set<int> waiting_in(const Judged& judged);

/// The first calls that differ. Where only one pair does and later ones are alike, ranks went on
/// from there.
[[nodiscard]] std::optional<Finding> difference(const Group& group);
/// Ranks that have not come to what others have, by their devices or hosts; of those first that
/// wait for nobody.
[[nodiscard]] std::optional<Finding> behind(const State& state, const Judged& judged,
                                            const std::set<int>& waits);
/// A rank that has not come to a send or recv in which its peer waits.
[[nodiscard]] Finding unmatched(const State& state, const Judged& judged, const PairWait& wait);
/// Ranks of which only steps can be counted, because graphs were launched of which nothing is
/// known.
[[nodiscard]] std::optional<Finding> fewer_steps(const Group& group);
/// Ranks of which nothing is known, for which others are likely to wait.
[[nodiscard]] std::optional<Finding> unknown(const State& state, const Judged& judged);
/// Ranks that are all in one call, which nobody ends, as far as is known.
[[nodiscard]] std::optional<Finding> together(const State& state, const Judged& judged);

}  // namespace cohort::trace
