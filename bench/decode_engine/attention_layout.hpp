// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention_splits.hpp"
#include "operand_block.hpp"

/// \file
/// What a block of attention works on at a time, and where it lies in shared memory. Pure.

namespace decode_engine::kernels {

inline constexpr int kTile = kAttentionTile;  ///< Heads of a block, and tokens at a time.
inline constexpr int kPlaces = 3;             ///< For tokens.
inline constexpr unsigned kBlockBytes = kTile * wgmma::kBlockRowBytes;

/// Of rows of these widths. Offsets are in bytes.
template <int kLatentOf, int kRopeOf>
struct AttentionLayout {
  static constexpr int kLatent = kLatentOf;
  static constexpr int kRow = kLatentOf + kRopeOf;
  static constexpr int kBlocks = (kRow + wgmma::kBlockColumns - 1) / wgmma::kBlockColumns;
  static_assert(kLatentOf % wgmma::kBlockColumns == 0 && kRopeOf <= wgmma::kBlockColumns);
  static constexpr unsigned kTileBytes = kBlocks * kBlockBytes;
  /// Of a product of values. Where a warpgroup's half would be less, both do the same.
  static constexpr bool kHalves = kLatentOf == 512;
  static constexpr int kColumns = kHalves ? 256 : 64;
  /// Of the 16 columns of queries that a product of scores takes, those without the rotated ones:
  /// as many as registers hold, and at most one more.
  static constexpr int kSteps = (kBlocks - 1) * 4;
  static constexpr int kHeld = kSteps < 31 ? kSteps : 31;
  static_assert(kSteps - kHeld <= 1);
  /// Parts of a tile that arrive by themselves.
  static constexpr int kChunks = kBlocks % 3 == 0 ? 3 : 1;
  static constexpr int kChunkBlocks = kBlocks / kChunks;
  /// Copies that fetch a tile: of a chunk each where rows are whole blocks.
  static constexpr bool kWholeBlocks = kRow % wgmma::kBlockColumns == 0;
  static constexpr int kCopies = kWholeBlocks ? kChunks : kBlocks;
  static constexpr int kCopyBlocks = kBlocks / kCopies;
  /// Where the columns of a step begin in a tile.
  [[nodiscard]] static constexpr unsigned step(int number) {
    return static_cast<unsigned>(number) / 4 * kBlockBytes + static_cast<unsigned>(number) % 4 * 32;
  }

  // Tiles; of queries the rotated part and what registers do not hold; numbers of heads; arrivals;
  // the sequence's tokens, for each warp that weighs.
  [[nodiscard]] static constexpr unsigned tile(unsigned place) { return place * kTileBytes; }
  /// Of a tile, in the place of its last columns.
  [[nodiscard]] static constexpr unsigned weights(unsigned place) {
    return tile(place) + (kBlocks - 1) * kBlockBytes;
  }
  static constexpr unsigned kRotated = kPlaces * kTileBytes;
  static constexpr unsigned kApart = kRotated + kBlockBytes;
  static constexpr unsigned kApartBytes = kTile * 32;
  [[nodiscard]] static constexpr unsigned numbers(unsigned place) {
    return kApart + kApartBytes + place * kTile * 4;
  }
  static constexpr unsigned kArrivals = kApart + kApartBytes + kPlaces * kTile * 4;
  [[nodiscard]] static constexpr unsigned weighed(unsigned place) { return kArrivals + place * 8; }
  [[nodiscard]] static constexpr unsigned released(unsigned place) {
    return kArrivals + (kPlaces + place) * 8;
  }
  static constexpr unsigned kQueried = kArrivals + 2 * kPlaces * 8;
  [[nodiscard]] static constexpr unsigned fetched(unsigned place, unsigned chunk) {
    return kQueried + 8 + (place * kChunks + chunk) * 8;
  }
  static constexpr unsigned kCounts = fetched(kPlaces, 0);
  static constexpr unsigned kBytes = kCounts + 4 * 4;

  /// Behind all tiles, of heads: the sums of weights and the LSEs. No product reads there any more.
  static constexpr unsigned kSums = kApart;
  static constexpr unsigned kLses = kSums + kTile * 4;
  static_assert(kLses + kTile * 4 <= kApart + kApartBytes);

  /// Results, in the place of all tiles. Rows of elements of so many bytes begin four banks apart,
  /// or eight, of which a thread writes two.
  [[nodiscard]] static constexpr unsigned result_row(unsigned element) {
    return (kLatent + 8) * element;
  }
  static_assert(kTile * result_row(4) <= kPlaces * kTileBytes);
};

}  // namespace decode_engine::kernels
