// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "cohort/dtype.hpp"
#include "cohort/error.hpp"
#include "cohort/merge_plan.hpp"

/// \file
/// How a group is to merge partial attentions, and which plan a merge takes. Pure.

namespace cohort {

/// In which precision the staged plan corrects and reduces.
enum class StagedPrecision : std::uint8_t {
  f32,      ///< Corrected partials in fp32: the reduction adds fp32 and rounds once.
  partial,  ///< Corrected partials in their own type: half the bytes, rounded before the sum.
};

/// How a group merges.
struct MergeOptions {
  MergePlan plan = MergePlan::automatic;                    ///< Which plan merges take.
  StagedPrecision staged_precision = StagedPrecision::f32;  ///< What `staged` adds up in.

  /// What `staged` adds up partials of this type in.
  [[nodiscard]] constexpr DType staged_dtype(DType partial) const noexcept {
    return staged_precision == StagedPrecision::f32 ? DType::f32 : partial;
  }
};

/// Throws `ConfigError` for numbers that are no plan or precision.
inline void validate(const MergeOptions& options) {
  if (options.plan > MergePlan::one_kernel) {
    throw ConfigError(fmt::format("MergeOptions.plan: expected a MergePlan, got number {}",
                                  static_cast<int>(options.plan)));
  }
  if (options.staged_precision > StagedPrecision::partial) {
    throw ConfigError(
        fmt::format("MergeOptions.staged_precision: expected f32 or partial, got number {}",
                    static_cast<int>(options.staged_precision)));
  }
}

/// Which plan a merge takes, and why.
struct MergeChoice {
  MergePlan plan = MergePlan::packed;  ///< The plan that was taken.
  std::string reason;                  ///< Why.
};

namespace detail {

/// The plan of a merge, and why. The text is made where someone asks for it, not in each merge.
struct ChosenMerge {
  /// What decided.
  enum class Why : std::uint8_t {
    nothing_merged,  ///< Nothing has yet.
    single_rank,     ///< There is nobody to merge with.
    by_user,         ///< The options force the plan.
    in_reach,        ///< One kernel can do it.
    no_map,          ///< No kernel can address the peers.
    obstacle         ///< The kernels cannot take these arguments.
  };

  MergePlan plan = MergePlan::packed;  ///< Never `automatic`.
  Why why = Why::nothing_merged;       ///< What decided.
  std::string obstacle;                ///< The kernels' own words, for `obstacle`.

  /// In words; `no_map` says why the group has no peer mapping.
  [[nodiscard]] std::string reason(std::string_view no_map) const {
    switch (why) {
      case Why::nothing_merged:
        return {};
      case Why::single_rank:
        return "single rank: a local copy";
      case Why::by_user:
        return "chosen by the user";
      case Why::in_reach:
        return "every rank can address every other";
      case Why::no_map:
        return fmt::format("no peer mapping: {}", no_map);
      case Why::obstacle:
        return obstacle;
    }
    return {};
  }
};

/// Chooses for a group of so many ranks. `obstacle()` is asked only where it matters: nothing where
/// no kernel can address the peers, otherwise what keeps the kernels from this merge, empty where
/// nothing does. Throws `ConfigError` where the plan is forced and cannot run.
template <class Obstacle>
[[nodiscard]] ChosenMerge choose_merge(MergePlan wanted, int ranks, const Obstacle& obstacle,
                                       std::string_view no_map) {
  using Why = ChosenMerge::Why;
  if (ranks == 1) {
    return {MergePlan::packed, Why::single_rank, {}};
  }
  if (wanted == MergePlan::staged || wanted == MergePlan::packed) {
    return {wanted, Why::by_user, {}};
  }
  ChosenMerge refused{MergePlan::packed, Why::no_map, {}};
  if (std::optional<std::string> found = obstacle()) {
    refused = {MergePlan::packed, Why::obstacle, *std::move(found)};
  }
  const bool can_run = refused.why == Why::obstacle && refused.obstacle.empty();
  if (wanted == MergePlan::one_kernel) {
    if (!can_run) {
      throw ConfigError(fmt::format("merge plan one_kernel: {}", refused.reason(no_map)));
    }
    return {MergePlan::one_kernel, Why::by_user, {}};
  }
  return can_run ? ChosenMerge{MergePlan::one_kernel, Why::in_reach, {}} : refused;
}

}  // namespace detail

}  // namespace cohort
