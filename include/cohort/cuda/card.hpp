// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <string>
#include <string_view>

/// \file
/// What follows from a card's compute capability and the driver. Pure.

namespace cohort::cuda {

/// A compute capability, such as 8.6.
struct Capability {
  int major = 0;
  int minor = 0;

  [[nodiscard]] constexpr int code() const noexcept { return 10 * major + minor; }
};

/// Whether kernels may be launched with programmatic stream serialization: the card and the driver
/// have it, by the rule that NCCL goes by (v2.29.7-1, src/enqueue.cc), and the kernels were
/// compiled for it. `compiled_for` is the PTX version of `cudaFuncGetAttributes`: code for an older
/// card that runs on a newer one lacks the wait, and must not start early.
[[nodiscard]] constexpr bool launches_programmatically(Capability card, int driver_version,
                                                       int compiled_for) noexcept {
  return card.code() >= 90 && driver_version >= 12030 && compiled_for >= 90;
}

/// Whether stores of whole lines are known to arrive whole between cards of these capabilities,
/// over NVLink or on one card: the rule by which NCCL allows its LL128 protocol (v2.30.7-1,
/// src/graph/tuning.cc).
[[nodiscard]] constexpr bool keeps_lines_whole(Capability a, Capability b) noexcept {
  const int least = a.code() < b.code() ? a.code() : b.code();
  return least >= 70 && (a.code() == b.code() || least >= 90);
}

/// Why a build cannot run on a card. `built_for` is nvcc's list, such as "800,900,1000".
[[nodiscard]] inline std::string no_code_text(std::string_view name, Capability card,
                                              std::string_view built_for) {
  return fmt::format(
      "{} ({}.{}): this build of Cohort has no code for it; it was built for {}. Configure with "
      "-DCMAKE_CUDA_ARCHITECTURES={}",
      name, card.major, card.minor, built_for, card.code());
}

}  // namespace cohort::cuda
