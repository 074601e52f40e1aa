// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string_view>

/// \file
/// Which rows of a merged attention each DCP rank gets, and where a row lies: for the host and for
/// kernels. A row is one (token, head) pair of [B, H]. Arithmetic only.

namespace cohort {

/// Where a merged attention [B, H, D] goes. n is the number of DCP ranks.
enum class MergeResult : std::uint8_t {
  by_head,     ///< Rank r gets the heads [r*H/n, (r+1)*H/n) of all tokens.
  by_token,    ///< Rank r gets all heads of its tokens, so many as the counts say, in rank order.
  replicated,  ///< Every rank gets everything.
};

/// Such as "by_token".
[[nodiscard]] constexpr std::string_view to_string(MergeResult result) noexcept {
  switch (result) {
    case MergeResult::by_head:
      return "by_head";
    case MergeResult::by_token:
      return "by_token";
    case MergeResult::replicated:
      return "replicated";
  }
  return "unknown";
}

}  // namespace cohort

namespace cohort::dcp {

/// Where a row lies in [B, H].
template <class Index>
struct RowPlace {
  Index token;  ///< In [0, B)
  Index head;   ///< In [0, H)
};

/// The rows that one rank merges: all heads of the block for its first token, then for the next.
template <class Index>
struct RowBlock {
  Index first_token = 0;  ///< Of all tokens.
  Index tokens = 0;       ///< So many, in a row.
  Index first_head = 0;   ///< Of all heads.
  Index heads = 0;        ///< So many, in a row, for each token.

  /// How many there are.
  [[nodiscard]] constexpr Index rows() const noexcept { return tokens * heads; }
  /// The place of the block's row `row`, whose token within the block, `row / heads`, the caller
  /// has worked out, because kernels divide in their own way.
  [[nodiscard]] constexpr RowPlace<Index> place(Index row, Index token) const noexcept {
    return {first_token + token, first_head + (row - token * heads)};
  }
};

/// Which rows each rank of a group merges.
struct MergeRows {
  MergeResult result = MergeResult::by_head;  ///< What was asked for.
  std::int64_t batch = 0;                     ///< B
  std::int64_t heads = 0;                     ///< H; the ranks divide it unless by token.
  int ranks = 1;                              ///< n
  std::span<const std::int64_t> counts = {};  ///< [n], tokens of each rank; by token only.
  /// Replicated: whether every rank merges everything, instead of its own heads, which are then
  /// gathered.
  bool whole = false;

  /// Those of one rank.
  [[nodiscard]] constexpr RowBlock<std::int64_t> of(int rank) const noexcept {
    if (result == MergeResult::by_token) {
      std::int64_t first = 0;
      for (int r = 0; r < rank; ++r) {
        first += counts[static_cast<std::size_t>(r)];
      }
      return {first, counts[static_cast<std::size_t>(rank)], 0, heads};
    }
    if (result == MergeResult::replicated && whole) {
      return {0, batch, 0, heads};
    }
    const std::int64_t own = heads / ranks;
    return {0, batch, rank * own, own};
  }
  /// Most rows of a rank.
  [[nodiscard]] constexpr std::int64_t widest() const noexcept {
    return result == MergeResult::by_token ? widest_count(counts) * heads : of(0).rows();
  }
  /// Most tokens of a rank.
  [[nodiscard]] static constexpr std::int64_t widest_count(
      std::span<const std::int64_t> counts) noexcept {
    std::int64_t most = 0;
    for (const std::int64_t count : counts) {
      most = std::max(most, count);
    }
    return most;
  }
  /// Tokens of a rank where nobody says how they are shared out: as many for each, and one more for
  /// the first ranks where something is left.
  [[nodiscard]] static constexpr std::int64_t even_count(std::int64_t batch, int ranks,
                                                         int rank) noexcept {
    return batch / ranks + (rank < batch % ranks ? 1 : 0);
  }
};

}  // namespace cohort::dcp
