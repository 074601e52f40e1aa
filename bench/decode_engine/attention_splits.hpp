// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

/// \file
/// Into how many parts attention divides the tokens of a sequence. Pure.

namespace decode_engine {

/// What a block of attention works on: so many heads, and so many tokens at a time.
inline constexpr std::int64_t kAttentionTile = 64;
inline constexpr std::int64_t kMostAttentionSplits = 128;

struct AttentionSplits {
  std::int64_t count = 1;
  std::int64_t tiles = 1;  ///< Of each split, of `kAttentionTile` tokens.
};

/// What a wave of blocks takes besides its tokens, in units of a tile's time, some 1.7 us: blocks
/// begin and end in four, and the more there are, the less an idle multiprocessor leaves to the
/// others of the card's power. Measured on an H200 with 1 to 20 splits, as the next one.
inline constexpr std::int64_t kAttentionWaveTiles = 12;
/// How long memory takes for the rows of as many tiles as there are multiprocessors.
inline constexpr double kAttentionMemoryTiles = 1.3;

/// The division that ends first where a multiprocessor runs one block at a time, and blocks of one
/// sequence read its rows from memory once. Combining splits takes as long as a tile and what their
/// results take to be read.
[[nodiscard]] inline AttentionSplits split_attention(std::int64_t heads, std::int64_t batch,
                                                     std::int64_t capacity,
                                                     std::int64_t multiprocessors) {
  const auto parts = [](std::int64_t whole, std::int64_t part) {
    return (whole + part - 1) / part;
  };
  const std::int64_t tiles = std::max<std::int64_t>(1, parts(capacity, kAttentionTile));
  const std::int64_t blocks = batch * parts(heads, kAttentionTile);
  const double memory = kAttentionMemoryTiles * static_cast<double>(batch * tiles) /
                        static_cast<double>(multiprocessors);
  AttentionSplits best;
  double least = 0;
  for (std::int64_t count = 1; count <= std::min(tiles, kMostAttentionSplits); ++count) {
    const std::int64_t each = parts(tiles, count);
    if (count > 1 && parts(tiles, each) < count) {
      continue;  // the last ones would be empty
    }
    const auto waves = static_cast<double>(parts(blocks * count, multiprocessors));
    const double combining =
        1 + 2.6 * static_cast<double>(blocks * count) / static_cast<double>(multiprocessors);
    // More blocks of one wave are never slower than memory, but more waves may be as slow.
    const double multiplying = waves * static_cast<double>(each);
    const double time = (waves > 1 ? std::max(multiplying, memory) : multiplying) +
                        waves * kAttentionWaveTiles + (count > 1 ? combining : 0);
    if (count == 1 || time < least) {
      best = {count, each};
      least = time;
    }
  }
  return best;
}

}  // namespace decode_engine
