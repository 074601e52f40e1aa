// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>

/// \file
/// Up to which sizes the own collectives take a path, by the number of ranks. Pure.
///
/// Two ranks are measured: bench/results/nvidia-h100-80gb-hbm3-2ranks.json and
/// own_kernels/nvidia-h100-2cards.json beside it. More are **predicted** by bench/model, which
/// writes the table below: own times from a fit to those rows, NCCL's from the cost models in its
/// sources.

namespace cohort::cuda {

/// Bytes, for links that keep lines whole (see `PeerPath::flag_line`).
struct PathSizes {
  /// What a rank may send to all peers together in an all-reduce of one step; beyond, two steps are
  /// the faster: a second flight, but 2/n of the bytes.
  std::int64_t one_step_sent = 0;
  /// The total of an all-gather or reduce-scatter up to which the own kernels are faster than NCCL.
  std::int64_t share_total = 0;
  /// The same of an all-reduce.
  std::int64_t all_reduce_total = 0;
};

namespace detail {

inline constexpr std::int64_t kKiB = 1024;
inline constexpr std::int64_t kAnySize = std::numeric_limits<std::int64_t>::max();

// bench/model: begin
/// Of 2 to 8 ranks.
inline constexpr PathSizes kPathSizes[] = {
    {.one_step_sent = kAnySize, .share_total = 16384 * kKiB, .all_reduce_total = 512 * kKiB},
    {.one_step_sent = 592 * kKiB, .share_total = 16384 * kKiB, .all_reduce_total = 512 * kKiB},
    {.one_step_sent = 432 * kKiB, .share_total = 16384 * kKiB, .all_reduce_total = 512 * kKiB},
    {.one_step_sent = 384 * kKiB, .share_total = 8192 * kKiB, .all_reduce_total = 256 * kKiB},
    {.one_step_sent = 368 * kKiB, .share_total = 8192 * kKiB, .all_reduce_total = 256 * kKiB},
    {.one_step_sent = 368 * kKiB, .share_total = 8192 * kKiB, .all_reduce_total = 256 * kKiB},
    {.one_step_sent = 368 * kKiB, .share_total = 8192 * kKiB, .all_reduce_total = 256 * kKiB},
};
// bench/model: end

}  // namespace detail

/// The sizes of a group. Beyond eight ranks, of which nothing is predicted, a small payload alone.
[[nodiscard]] constexpr PathSizes path_sizes(int ranks) noexcept {
  constexpr int kMost = static_cast<int>(std::size(detail::kPathSizes)) + 1;
  if (ranks > kMost) {
    return {192 * detail::kKiB, 256 * detail::kKiB, 256 * detail::kKiB};
  }
  return detail::kPathSizes[static_cast<std::size_t>(std::max(ranks, 2) - 2)];
}

}  // namespace cohort::cuda
