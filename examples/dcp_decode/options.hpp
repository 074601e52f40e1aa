// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cohort/dcp/lse_merge.hpp"
#include "cohort/merge_plan.hpp"
#include "cohort/topology.hpp"
#include "support/machine.hpp"

/// \file
/// What the command line of dcp_decode says.

namespace dcp_decode {

using example::BackendChoice;

struct Options {
  cohort::ParallelLayout layout;
  std::int64_t batch = 8;
  std::int64_t heads = 16;  ///< of the whole model
  std::int64_t latent_dim = 128;
  std::int64_t rope_dim = 32;
  std::int64_t value_dim = 128;
  std::int64_t context = 512;  ///< tokens of the longest sequence before the first step
  std::int64_t steps = 16;
  cohort::MergePlan merge = cohort::MergePlan::automatic;
  bool symmetric = true;
  cohort::LseBase lse_base = cohort::LseBase::e;
  BackendChoice backend = BackendChoice::automatic;
  bool graph = false;
  std::uint64_t seed = 1;
  std::string json;  ///< file to write, or empty

  /// Elements of a row of the KV cache and of the hidden state.
  [[nodiscard]] std::int64_t width() const { return latent_dim + rope_dim; }
};

/// The command line asks for something that is not a run: help, or what cannot be understood.
struct EarlyExit {
  int status = 0;
  std::string text;
};

/// Options for a world of `ranks` ranks; `exit` is set where the program should end instead.
/// Without
/// --tp all ranks that the stages leave are one TP group, without --dcp one DCP group as well.
/// @throw cohort::ConfigError for sizes that do not fit each other.
[[nodiscard]] Options parse_options(int argc, char** argv, int ranks,
                                    std::optional<EarlyExit>& exit);

}  // namespace dcp_decode
