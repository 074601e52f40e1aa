// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "cohort/parallel_state.hpp"
#include "decoder.hpp"
#include "options.hpp"

/// \file
/// What the ranks tell each other about a run, and what the first of them prints.

namespace dcp_decode {

/// One rank's figures; travels as bytes.
struct RankResult {
  Deviation deviation;
  std::array<double, kPhases> seconds{};
  std::uint64_t hash = 0;
  std::int64_t tokens = 0;
  std::int64_t own_tokens = 0;
  std::int64_t empty_shards = 0;
};

/// The same on every rank.
struct Summary {
  Deviation deviation;
  Bounds bound;
  std::array<double, kPhases> seconds{};  ///< the slowest rank's
  std::uint64_t hash = 0;                 ///< of all ranks' outputs, in rank order
  std::int64_t tokens = 0;
  std::int64_t least_own_tokens = 0;
  std::int64_t most_own_tokens = 0;
  std::int64_t empty_shards = 0;  ///< summed over the ranks
  bool passed = false;
};

/// Collective over the world.
[[nodiscard]] Summary summarize(const Options& options, cohort::ControlPlane& world,
                                const Decoder& decoder);

/// Collective over the world. One line for each group: ranks, decisions, reasons.
[[nodiscard]] std::vector<std::string> describe_groups(cohort::ParallelState& state,
                                                       cohort::ControlPlane& world);

/// What rank 0 prints at the end; the last line is the verdict.
void print(const Options& options, const Summary& summary);

/// @throw cohort::ConfigError where the file cannot be written.
void write_json(const Options& options, const std::vector<std::string>& groups,
                const std::string& backend, const cohort::MergeChoice& choice,
                const Summary& summary);

}  // namespace dcp_decode
