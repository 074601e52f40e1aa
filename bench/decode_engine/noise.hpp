// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "dcp_decode/numbers.hpp"

/// \file
/// Matrices of nothing but noise, which host and device make alike. Pure.

namespace decode_engine {

/// An element is `offset` plus a number in [-size, size) that seed, key, row and column name.
struct Noise {
  std::uint64_t seed = 0;
  std::uint64_t key = 0;
  double offset = 0;
  double size = 1;

  [[nodiscard]] constexpr dcp_decode::Numbers row(std::int64_t row) const noexcept {
    return {seed, key, static_cast<std::uint64_t>(row)};
  }
  [[nodiscard]] constexpr float element(const dcp_decode::Numbers& row,
                                        std::int64_t column) const noexcept {
    return static_cast<float>(offset + size * row(static_cast<std::uint64_t>(column)));
  }
};

/// A size of noise whose root mean square is one.
inline constexpr double kUnitNoise = 1.7320508075688772;

/// Rows [first_row, first_row + rows) with columns [first_column, first_column + columns).
struct Block {
  std::int64_t first_row = 0, rows = 0, first_column = 0, columns = 0;

  [[nodiscard]] constexpr std::int64_t elements() const noexcept { return rows * columns; }
};

}  // namespace decode_engine
