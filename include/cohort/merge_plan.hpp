// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>

/// \file
/// The ways to merge partial attentions, as a value that options, environment and messages share.

namespace cohort {

/// How partial attentions are combined.
enum class MergePlan : std::uint8_t {
  automatic,   ///< Picked by size and topology; the choice and its reason can be read back.
  staged,      ///< All-gather the LSEs, correct locally, reduce-scatter the outputs.
  packed,      ///< One all-to-all of outputs with their LSEs, then a local merge; any topology.
  one_kernel,  ///< One launch through the library's inboxes; needs the peer mapping.
};

/// All plans.
inline constexpr std::array kMergePlans = {MergePlan::automatic, MergePlan::staged,
                                           MergePlan::packed, MergePlan::one_kernel};

/// Such as "one_kernel".
[[nodiscard]] constexpr std::string_view to_string(MergePlan plan) noexcept {
  switch (plan) {
    case MergePlan::automatic:
      return "automatic";
    case MergePlan::staged:
      return "staged";
    case MergePlan::packed:
      return "packed";
    case MergePlan::one_kernel:
      return "one_kernel";
  }
  return "unknown";
}

/// The plan with this name (`to_string`), or nothing.
[[nodiscard]] constexpr std::optional<MergePlan> merge_plan_from_string(
    std::string_view name) noexcept {
  for (const MergePlan plan : kMergePlans) {
    if (name == to_string(plan)) {
      return plan;
    }
  }
  return std::nullopt;
}

}  // namespace cohort
