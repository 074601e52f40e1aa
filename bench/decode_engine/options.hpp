// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cohort/merge_plan.hpp"
#include "cohort/transport.hpp"
#include "sizes.hpp"

/// \file
/// The command line of decode_engine, and the ways that it knows. Pure.

namespace decode_engine {

/// A way to communicate. `path` and `plan` are what its rows are called.
struct Way {
  std::string_view name;
  std::string_view path;
  std::string_view plan;
  bool raw = false;  ///< By the bare library.
  bool dcp = false;  ///< With a cache that the ranks of a DCP group share.
  cohort::MergePlan merge = cohort::MergePlan::automatic;
  /// Ways with the same text here promise the same bits.
  std::string_view order;
};
inline constexpr std::array kWays = {
    Way{"tp-raw", "raw", "tp_only", true, false, cohort::MergePlan::automatic, "the library's"},
    Way{"tp-cohort", "own", "tp_only", false, false, cohort::MergePlan::automatic, "tp"},
    Way{"dcp-raw", "raw", "staged", true, true, cohort::MergePlan::staged, "the library's, dcp"},
    Way{"dcp-staged", "own", "staged", false, true, cohort::MergePlan::staged, "staged"},
    Way{"dcp-packed", "own", "packed", false, true, cohort::MergePlan::packed, "ranks in turn"},
    Way{"dcp-cohort", "own", "automatic", false, true, cohort::MergePlan::automatic,
        "ranks in turn"},
};

struct Options {
  Sizes sizes;
  bool copies = false;  ///< The weights are those of the copying model.
  cohort::BackendKind backend = cohort::BackendKind::host;
  int tp = 0, pp = 1, dcp = 0;
  std::vector<const Way*> ways;
  bool graph = true;
  std::uint64_t seed = 1;

  std::int64_t prompts = 16;
  std::int64_t tokens = 256;  ///< Teacher-forced behind each prompt; 0: no accuracy.
  std::int64_t fp64 = 64;     ///< Positions that are compared with fp64: none of a large model.
  const Way* spoilt = nullptr;

  std::vector<std::int64_t> contexts;
  std::vector<std::int64_t> batches = {1, 8};
  std::vector<std::int64_t> fill;              ///< Contexts with as many sequences as fit.
  std::int64_t steps = 4;                      ///< Of a sample.
  std::int64_t iters = 20;                     ///< Samples; 0: no times.
  std::int64_t room = std::int64_t{64} << 30;  ///< Bytes for the cache on a rank.
  std::string json;
  bool help = false;
};

[[nodiscard]] std::string usage();

/// The arguments behind the program's name, in a world of `ranks` ranks. Without --tp all ranks
/// that the stages leave are one TP group, without --dcp one DCP group as well.
/// @throw cohort::ConfigError naming the option, what was expected and what came.
[[nodiscard]] Options parse_options(std::span<const std::string> arguments, int ranks);

}  // namespace decode_engine
