// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

/// \file
/// Layout of what one DCP rank sends to another in the packed merge: the partial outputs of the
/// receiver's heads, [B, h, D] without gaps, followed by their LSEs, [B, h] in f32.

namespace cohort::dcp {

/// Where things lie in what one rank sends to another.
struct PackedPiece {
  std::size_t lse_offset = 0;  ///< Bytes from the piece's start to the LSEs.
  std::size_t bytes = 0;       ///< Bytes of the whole piece, padding included.
};

/// The layout for a batch of B, h heads for each rank, and D elements of `element_bytes`. Offsets
/// are multiples of 16, so kernels can use 16-byte accesses throughout.
[[nodiscard]] constexpr PackedPiece packed_piece(std::int64_t batch, std::int64_t heads,
                                                 std::int64_t dim, std::size_t element_bytes) {
  constexpr std::size_t kAlign = 16;
  const auto align = [](std::size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; };
  const auto rows = static_cast<std::size_t>(batch * heads);
  const std::size_t lse_offset = align(rows * static_cast<std::size_t>(dim) * element_bytes);
  return {lse_offset, lse_offset + align(rows * sizeof(float))};
}

}  // namespace cohort::dcp
