// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <set>
#include <string>
#include <vector>

#include "analysis.hpp"

/// \file
/// What can be found in one group, each kind in a file of its own, and the words for it.

namespace cohort::trace {

/// "rank 3", or "ranks 1, 2 and 3".
[[nodiscard]] std::string listed(std::vector<int> ranks);
/// `one` for one rank, `more` for more.
[[nodiscard]] std::string verb(const std::vector<int>& ranks, const char* one, const char* more);

/// The first calls that differ, of graphs' lists first, because launches differ where they do.
[[nodiscard]] std::optional<Finding> difference(const Group& group);

/// Ranks that have come to a call of a group to which others have not: they wait.
[[nodiscard]] std::set<int> waiting_in(const Group& group);
/// Ranks that have not made a call which others have; of those first that wait for nobody.
[[nodiscard]] std::optional<Finding> behind(const State& state, const Group& group,
                                            const std::set<int>& waits);
/// Ranks whose device has done less than that of others, all of which have made the same calls.
[[nodiscard]] std::optional<Finding> behind_on_device(const State& state, const Group& group);

}  // namespace cohort::trace
