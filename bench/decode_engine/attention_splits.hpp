// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

/// \file
/// Into how many parts attention divides the tokens of a sequence, and who combines them. Pure.

namespace decode_engine {

/// What a block of attention works on: so many heads, and so many tokens at a time.
inline constexpr std::int64_t kAttentionTile = 64;
inline constexpr std::int64_t kMostAttentionSplits = 128;
/// Blocks of a cluster at most, on every card that has clusters.
inline constexpr std::int64_t kMostClusterBlocks = 8;

/// Parts that a set of threads of the second kernel may read before it knows their weights.
inline constexpr int kCombinedAhead = 4;

struct AttentionSplits {
  std::int64_t count = 1;
  std::int64_t tiles = 1;  ///< Of each split, of `kAttentionTile` tokens.
  /// Whether the splits of a sequence are a cluster, which combines them before it ends. Otherwise
  /// they leave parts in memory, and a second kernel combines those.
  bool together = false;
  std::int64_t sets = 1;  ///< Of threads that take turns with the parts in the second kernel.
  bool ahead =
      false;  ///< Whether it reads the first `kCombinedAhead` of each before their weights.

  /// That are combined by a second kernel; one is whole.
  [[nodiscard]] constexpr std::int64_t parts() const noexcept { return together ? 1 : count; }
  friend bool operator==(const AttentionSplits&, const AttentionSplits&) = default;
};

[[nodiscard]] constexpr std::int64_t parts_of(std::int64_t whole, std::int64_t part) {
  return (whole + part - 1) / part;
}
/// Blocks of a cluster that have different heads and the same tokens, which each fetches a share
/// of.
[[nodiscard]] constexpr std::int64_t sharing_blocks(std::int64_t heads) {
  return parts_of(heads, kAttentionTile) % 2 == 0 ? 2 : 1;
}

/// What there is to divide.
struct AttentionSize {
  std::int64_t heads = 0, batch = 0, capacity = 0, multiprocessors = 0;

  [[nodiscard]] constexpr std::int64_t tiles() const {
    return std::max<std::int64_t>(1, parts_of(capacity, kAttentionTile));
  }
  /// Of one split.
  [[nodiscard]] constexpr std::int64_t blocks() const {
    return batch * parts_of(heads, kAttentionTile);
  }
};

/// What a division takes, in units of a tile's time while others are idle, some 1.5 us. Constants
/// are fits to an H200's times of 70 sizes with 1 to 128 splits.
struct AttentionTime {
  /// A wave of blocks besides its tokens: blocks begin and end in six, and the more there are, the
  /// less an idle multiprocessor leaves to the others of the card's power.
  static constexpr double kWave = 12;
  /// How much longer a tile takes where all multiprocessors are at work.
  static constexpr double kBusy = 0.1;
  /// How long memory takes for the rows of as many tiles as there are multiprocessors.
  static constexpr double kMemory = 1.5;
  /// Of a cluster's exchange, whatever its size: a block reads as much as it has worked out.
  static constexpr double kTogether = 1;
  // Of a second kernel: its start; parts of as many blocks as there are multiprocessors, written
  // and read; a thousand rows, which are blocks of their own.
  static constexpr double kCombining = 0.5;
  static constexpr double kParts = 4.4;
  static constexpr double kRows = 0.75;

  /// A cluster's blocks are neighbours, which leaves some multiprocessors to nobody where it has
  /// four or more.
  [[nodiscard]] static constexpr std::int64_t at_once(const AttentionSize& size,
                                                      const AttentionSplits& splits) {
    const std::int64_t cluster = sharing_blocks(size.heads) * (splits.together ? splits.count : 1);
    return cluster < 4 ? size.multiprocessors
                       : std::max<std::int64_t>(1, size.multiprocessors * 10 / 11);
  }

  [[nodiscard]] static constexpr double of(const AttentionSize& size,
                                           const AttentionSplits& splits) {
    const auto all = static_cast<double>(size.multiprocessors);
    const std::int64_t blocks = size.blocks() * splits.count;
    const auto waves = static_cast<double>(parts_of(blocks, at_once(size, splits)));
    const double share = static_cast<double>(blocks) / all;
    const double multiplying =
        waves * static_cast<double>(splits.tiles) * (1 + kBusy * std::min(1.0, share));
    const double memory = kMemory * static_cast<double>(size.batch * size.tiles()) / all;
    double combining = 0;
    if (splits.together) {
      combining = kTogether;
    } else if (splits.count > 1) {
      combining =
          kCombining + kParts * share + kRows * static_cast<double>(size.batch * size.heads) / 1024;
    }
    // More blocks of one wave are never slower than memory, but more waves may be as slow.
    return waves * kWave + (waves > 1 ? std::max(multiplying, memory) : multiplying) + combining;
  }
};

/// How a second kernel combines. Of many rows, small blocks, as each is short; of few, large ones
/// whose sets share the parts. Reading ahead hides a trip to memory, but holds registers, so that
/// fewer blocks are there at once, and delays what comes behind it.
[[nodiscard]] constexpr AttentionSplits combined(AttentionSplits splits,
                                                 const AttentionSize& size) {
  const std::int64_t rows = size.batch * size.heads;
  if (splits.parts() == 1) {
    return splits;
  }
  const bool some = rows > 2 * size.multiprocessors;
  const bool many = rows > 4 * size.multiprocessors;
  if (many || (some && splits.count <= 10)) {
    splits.sets = 1;
    splits.ahead = true;
  } else {
    splits.sets = 4;
    splits.ahead = !some && splits.count <= 20;
  }
  return splits;
}

/// All that leave no split empty, the one that takes least first.
[[nodiscard]] inline std::vector<AttentionSplits> attention_divisions(const AttentionSize& size) {
  std::vector<AttentionSplits> divisions;
  for (std::int64_t count = 1; count <= std::min(size.tiles(), kMostAttentionSplits); ++count) {
    const std::int64_t each = parts_of(size.tiles(), count);
    if (parts_of(size.tiles(), each) < count) {
      continue;  // the last ones would be empty
    }
    divisions.push_back(combined({.count = count, .tiles = each}, size));
    const std::int64_t sharing = sharing_blocks(size.heads);
    if ((count == 2 || count == 4 || count == 8) && sharing * count <= kMostClusterBlocks &&
        parts_of(size.heads, kAttentionTile) == sharing) {
      divisions.push_back({.count = count, .tiles = each, .together = true});
    }
  }
  std::stable_sort(divisions.begin(), divisions.end(),
                   [&size](const AttentionSplits& a, const AttentionSplits& b) {
                     return AttentionTime::of(size, a) < AttentionTime::of(size, b);
                   });
  return divisions;
}

/// The division that ends first.
[[nodiscard]] inline AttentionSplits split_attention(std::int64_t heads, std::int64_t batch,
                                                     std::int64_t capacity,
                                                     std::int64_t multiprocessors) {
  return attention_divisions({heads, batch, capacity, multiprocessors}).front();
}

}  // namespace decode_engine
