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
/// own_kernels/nvidia-h200-2cards.json beside it. More are **predicted** by bench/model, which
/// writes the table below: own times from a fit to those rows, NCCL's from the cost models in its
/// sources.

namespace cohort::cuda {

/// Bytes, for links that keep lines whole (see `PeerPath::flag_line`).
struct PathSizes {
  /// What a rank may send to all peers together in an all-reduce of one step in flag words; beyond,
  /// two steps are the faster: a second flight, but 2/n of the bytes.
  std::int64_t one_step_sent = 0;
  /// The same in flag lines.
  std::int64_t one_step_sent_in_lines = 0;
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
    {.one_step_sent = kAnySize,
     .one_step_sent_in_lines = kAnySize,
     .share_total = 16384 * kKiB,
     .all_reduce_total = 8192 * kKiB},
    {.one_step_sent = 592 * kKiB,
     .one_step_sent_in_lines = 1120 * kKiB,
     .share_total = 16384 * kKiB,
     .all_reduce_total = 1024 * kKiB},
    {.one_step_sent = 432 * kKiB,
     .one_step_sent_in_lines = 816 * kKiB,
     .share_total = 16384 * kKiB,
     .all_reduce_total = 1024 * kKiB},
    {.one_step_sent = 384 * kKiB,
     .one_step_sent_in_lines = 720 * kKiB,
     .share_total = 8192 * kKiB,
     .all_reduce_total = 512 * kKiB},
    {.one_step_sent = 368 * kKiB,
     .one_step_sent_in_lines = 704 * kKiB,
     .share_total = 8192 * kKiB,
     .all_reduce_total = 512 * kKiB},
    {.one_step_sent = 368 * kKiB,
     .one_step_sent_in_lines = 704 * kKiB,
     .share_total = 8192 * kKiB,
     .all_reduce_total = 512 * kKiB},
    {.one_step_sent = 368 * kKiB,
     .one_step_sent_in_lines = 704 * kKiB,
     .share_total = 8192 * kKiB,
     .all_reduce_total = 512 * kKiB},
};
// bench/model: end

}  // namespace detail

/// The sizes of a group. Beyond eight ranks, of which nothing is predicted, a small payload alone.
[[nodiscard]] constexpr PathSizes path_sizes(int ranks) noexcept {
  constexpr int kMost = static_cast<int>(std::size(detail::kPathSizes)) + 1;
  if (ranks > kMost) {
    return {192 * detail::kKiB, 192 * detail::kKiB, 256 * detail::kKiB, 256 * detail::kKiB};
  }
  return detail::kPathSizes[static_cast<std::size_t>(std::max(ranks, 2) - 2)];
}

/// How an all-reduce moves its bytes.
struct AllReducePlan {
  bool fits = false;   ///< Whether an inbox has room for it in any way; the rest is void if not.
  bool lines = false;  ///< In flag lines instead of words.
  bool two_steps = false;  ///< A reduce-scatter and an all-gather in one launch.
  friend bool operator==(const AllReducePlan&, const AllReducePlan&) = default;
};

/// Payload bytes that flag lines travel in together: a warp's, at one time.
inline constexpr std::int64_t kLineGroupPayload = 480;

/// Up to how much that a rank sends in one step words are taken before lines, which have more to do
/// before the first one leaves. own_kernels/nvidia-h200-2cards.json: words took 2.22 and 2.67 us at
/// 64 and 128 KiB between two cards, lines 2.28 and 2.48.
inline constexpr std::int64_t kSentInWords = 96 * detail::kKiB;

/// The plan for an all-reduce of `bytes` of a group of `ranks`, whose inbox has room for so many
/// bytes a peer in flag words and in flag lines. Two ranks send as much in two steps as in one.
[[nodiscard]] constexpr AllReducePlan all_reduce_plan(int ranks, std::int64_t bytes,
                                                      std::int64_t words_there,
                                                      std::int64_t lines_there) noexcept {
  const auto up = [](std::int64_t value, std::int64_t unit) {
    return (value + unit - 1) / unit * unit;
  };
  const std::int64_t whole = std::max<std::int64_t>(up(bytes, 8), 8);  // an empty call signals too
  const std::int64_t share = up(whole, 8 * std::int64_t{ranks}) / ranks;
  const std::int64_t sent = whole * (ranks - 1);
  const PathSizes sizes = path_sizes(ranks);
  const auto in_steps = [&](std::int64_t there, std::int64_t two_need, std::int64_t one_sent) {
    const bool one = whole <= there;
    const bool two = ranks > 2 && two_need <= there;
    const bool prefers_one = share == 8 || sent <= one_sent;
    return AllReducePlan{.fits = one || two, .two_steps = two && !(one && prefers_one)};
  };
  const AllReducePlan words = in_steps(words_there, 2 * share, sizes.one_step_sent);
  AllReducePlan lines =
      in_steps(lines_there, up(share, kLineGroupPayload) + share, sizes.one_step_sent_in_lines);
  lines.lines = true;
  return lines.fits && !(words.fits && sent <= kSentInWords) ? lines : words;
}

/// Bytes of an inbox's slot, a lane in lines for each rank, in which an all-reduce of so many bytes
/// has room for its faster plan.
[[nodiscard]] constexpr std::int64_t all_reduce_slot_bytes(int ranks, std::int64_t bytes) noexcept {
  constexpr std::int64_t kPlenty = std::numeric_limits<std::int64_t>::max() / 64;
  const AllReducePlan plan = all_reduce_plan(ranks, bytes, 0, kPlenty);
  const std::int64_t share = bytes / ranks + 8;
  return plan.two_steps ? (2 * share + kLineGroupPayload) * ranks : (bytes + 8) * ranks;
}

}  // namespace cohort::cuda
