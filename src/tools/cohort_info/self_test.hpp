// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cohort/parallel_state.hpp>
#include <vector>

#include "device.hpp"
#include "report.hpp"

namespace cohort::info {

/// Collective. Every collective of the TP group, a query gather, a merge and a captured step, each
/// with every element checked on every rank and timed. A check that fails on one rank fails on all;
/// one that breaks the group is the last.
[[nodiscard]] std::vector<Check> self_test(ParallelState& state, Device& device);

}  // namespace cohort::info
