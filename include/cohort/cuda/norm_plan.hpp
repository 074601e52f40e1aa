// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <string>

#include "cohort/cuda/call_signature.hpp"
#include "cohort/cuda/inbox.hpp"
#include "cohort/cuda/path_sizes.hpp"
#include "cohort/dtype.hpp"

/// \file
/// The all-reduce with residual and RMS norm on cards: which shapes the kernels take, whether one
/// launch does all of it, and how its blocks share the work. Pure.
///
/// A row travels in groups of 60 words of 8 bytes, as a warp moves them: four flag lines, or 64
/// flag words of which four say nothing. Every row begins with a group, so that whoever gets a row
/// waits for no word of another.

namespace cohort::cuda {

/// Rows of a norm, and what else its ranks agree on.
struct NormShape {
  std::int64_t rows = 0;
  std::int64_t hidden = 0;
  DType dtype = DType::bf16;      ///< Of the sum, the residual and the weight.
  DType out_dtype = DType::bf16;  ///< That, or f8_e4m3.

  [[nodiscard]] constexpr std::int64_t row_bytes() const noexcept {
    return hidden * static_cast<std::int64_t>(size_of(dtype));
  }
  [[nodiscard]] constexpr std::int64_t row_words() const noexcept { return (row_bytes() + 7) / 8; }
  /// Of a row.
  [[nodiscard]] constexpr std::int64_t groups() const noexcept {
    return (row_words() + kGroupWords - 1) / kGroupWords;
  }

  static constexpr std::int64_t kGroupWords = kLineGroupPayload / 8;
};

/// Most groups of a row: its sums of squares lie in shared memory.
inline constexpr std::int64_t kMostNormGroups = 512;

/// What keeps the kernels from norming such rows, or nothing.
[[nodiscard]] inline std::string norm_obstacle(const NormShape& s) {
  if (s.rows < 0 || s.hidden < 1 || s.rows > (std::int64_t{1} << 31) - 1) {
    return fmt::format("shape: expected [0 to 2^31 - 1, at least 1], got [{}, {}]", s.rows,
                       s.hidden);
  }
  if (!is_attention_dtype(s.dtype) || (s.out_dtype != s.dtype && s.out_dtype != DType::f8_e4m3)) {
    return fmt::format(
        "dtype: expected f32, f16 or bf16 and an output of that or f8_e4m3, got {} "
        "and {}",
        to_string(s.dtype), to_string(s.out_dtype));
  }
  if (s.groups() > kMostNormGroups) {
    return fmt::format("hidden: expected rows of at most {} bytes, got {} of {}",
                       kMostNormGroups * kLineGroupPayload, s.hidden, to_string(s.dtype));
  }
  return {};
}

/// How one launch moves the rows.
struct NormPlan {
  bool fits = false;   ///< Whether there is such a launch, and it had better be taken.
  bool lines = false;  ///< In flag lines instead of words.
  friend bool operator==(const NormPlan&, const NormPlan&) = default;
};

/// Flag words of a lane that the rows take.
[[nodiscard]] constexpr std::int64_t norm_words(const NormShape& s) noexcept {
  return s.rows * s.groups() * 64;
}
/// Flag lines of a lane.
[[nodiscard]] constexpr std::int64_t norm_lines(const NormShape& s) noexcept {
  return s.rows * s.groups() * 4;
}

/// Up to how much that a rank sends words are taken before lines.
/// own_kernels/nvidia-h200-2cards-norms.json: rows of 14 KiB took 3.24, 3.33 and 3.55 us in words
/// between two cards, 1, 2 and 4 of them, and 3.17, 3.22 and 3.37 in lines.
inline constexpr std::int64_t kNormSentInWords = std::int64_t{8} * 1024;

/// The plan of a group of `ranks` whose lanes have so many flag words and lines. In one launch
/// every rank sends all its rows to every other: where an all-reduce would rather take two steps,
/// as with many ranks and rows, that and a norm behind it are the faster.
[[nodiscard]] constexpr NormPlan norm_plan(int ranks, const NormShape& s, std::int64_t words_there,
                                           std::int64_t lines_there) noexcept {
  if (s.rows < 1 || s.groups() > kMostNormGroups ||
      s.rows > (std::int64_t{1} << 31) / 64 / s.groups()) {
    return {};
  }
  const std::int64_t sent = s.rows * s.row_bytes() * (ranks - 1);
  const PathSizes sizes = path_sizes(ranks);
  const bool words = norm_words(s) <= words_there && sent <= sizes.one_step_sent;
  const bool lines = norm_lines(s) <= lines_there && sent <= sizes.one_step_sent_in_lines;
  return {.fits = words || lines, .lines = lines && !(words && sent <= kNormSentInWords)};
}

/// Bytes of an inbox's slot, a lane in lines for each rank, in which the rows have room.
[[nodiscard]] constexpr std::int64_t norm_slot_bytes(int ranks, const NormShape& s) noexcept {
  return norm_lines(s) * kLinePayload * ranks;
}

/// Thread blocks of a launch: as many for each row, 1, 2, 4 or 8, which are a cluster where there
/// are several, and so run together. Row r is in the hands of those of number r modulo `rows`,
/// which send it to all ranks, get it from them and norm it.
struct NormGrid {
  std::int64_t blocks_of_row = 1;
  std::int64_t rows = 1;  ///< Under way at once.
  friend bool operator==(const NormGrid&, const NormGrid&) = default;
};

/// Of at most `most` blocks, and of `most_in_clusters` where a row has several: a cluster needs its
/// room in one part of the card, so clusters that wait for peers leave half of it to others. Of no
/// more clusters than there are to be of their size. A multiprocessor alone takes long for a row,
/// so few rows are shared out.
[[nodiscard]] constexpr NormGrid norm_grid(const NormShape& s, std::int64_t most,
                                           std::int64_t most_in_clusters,
                                           const ClusterRoom& clusters) noexcept {
  const std::int64_t rows = std::max<std::int64_t>(s.rows, 1);
  for (const std::int64_t blocks : {8, 4, 2}) {
    if (blocks * rows <= most_in_clusters && rows <= clusters.of(blocks) &&
        2 * blocks <= s.groups()) {
      return {.blocks_of_row = blocks, .rows = rows};
    }
  }
  return {.blocks_of_row = 1, .rows = std::min(rows, most)};
}

/// Of one launch of so many blocks at most. Ranks whose epsilon differs would norm differently.
[[nodiscard]] constexpr CallSignature signature_of(const NormShape& s, float epsilon,
                                                   int blocks) noexcept {
  return CallSignature::make(
      PeerCall::all_reduce_rms_norm,
      {static_cast<std::int64_t>(s.dtype) * 256 + static_cast<std::int64_t>(s.out_dtype), blocks,
       s.rows, s.hidden, static_cast<std::int64_t>(std::bit_cast<std::uint32_t>(epsilon))});
}

}  // namespace cohort::cuda
