// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "cohort/dtype.hpp"

/// \file
/// Inputs whose answers are known exactly in every element type, whatever the order of additions:
/// small whole numbers, and LSEs whose weights are powers of two. Pure.

namespace cohort::bench {

/// Values are below this, so that a sum over the ranks stays below 256: bf16 holds whole numbers
/// exactly up to there.
[[nodiscard]] constexpr std::int64_t value_range(int ranks) noexcept {
  return std::clamp<std::int64_t>(255 / std::max(ranks, 1), 2, 16);
}

/// Element `i` of rank `rank`'s input to a collective.
[[nodiscard]] constexpr std::int64_t input_value(int rank, std::int64_t i, int ranks) noexcept {
  return (i * 5 + i / 64 + std::int64_t{rank} * 11) % value_range(ranks);
}

[[nodiscard]] constexpr std::int64_t summed_value(std::int64_t i, int ranks) noexcept {
  std::int64_t sum = 0;
  for (int r = 0; r < ranks; ++r) {
    sum += input_value(r, i, ranks);
  }
  return sum;
}

/// The merge's weights are 1/m and 2/m with m = `weight_unit`, the power of two that is not below
/// the number of ranks: m - ranks of the ranks weigh 2/m.
[[nodiscard]] constexpr std::int64_t weight_unit(int ranks) noexcept {
  return static_cast<std::int64_t>(std::bit_ceil(static_cast<unsigned>(std::max(ranks, 1))));
}

/// Base-two LSE of a rank for row `row` (one row for each query and head): 1 for the ranks that
/// weigh twice, whose place moves with the row, otherwise 0.
[[nodiscard]] constexpr float partial_lse(int rank, std::int64_t row, int ranks) noexcept {
  const std::int64_t heavy = weight_unit(ranks) - ranks;
  return (rank + row) % ranks < heavy ? 1.0F : 0.0F;
}

/// Element `i` of a rank's partial attention: a multiple of the weight unit, so that every weighted
/// value is whole, and small enough that the sum stays below 256.
[[nodiscard]] constexpr std::int64_t partial_value(int rank, std::int64_t i, int ranks) noexcept {
  const std::int64_t unit = weight_unit(ranks);
  const std::int64_t range = std::clamp<std::int64_t>(255 / unit, 2, 8);
  return unit * ((i * 3 + i / 128 + std::int64_t{rank} * 7) % range);
}

/// The merge of all ranks' element `i`, which lies in row `row`.
[[nodiscard]] constexpr std::int64_t merged_value(std::int64_t i, std::int64_t row,
                                                  int ranks) noexcept {
  std::int64_t sum = 0;
  for (int r = 0; r < ranks; ++r) {
    const std::int64_t weight = partial_lse(r, row, ranks) > 0 ? 2 : 1;
    sum += weight * partial_value(r, i, ranks) / weight_unit(ranks);
  }
  return sum;
}

/// Elements of a type from whole numbers: `value(i)` for i in [0, count).
template <class Value>
[[nodiscard]] std::vector<std::byte> encode(DType dtype, std::int64_t count, const Value& value) {
  const std::size_t width = size_of(dtype);
  std::vector<std::byte> bytes(static_cast<std::size_t>(count) * width);
  for (std::int64_t i = 0; i < count; ++i) {
    const auto number = static_cast<float>(value(i));
    std::byte* const to = bytes.data() + static_cast<std::size_t>(i) * width;
    if (dtype == DType::f32) {
      std::memcpy(to, &number, sizeof(number));
    } else {
      const std::uint16_t bits = dtype == DType::f16 ? float_to_f16(number) : float_to_bf16(number);
      std::memcpy(to, &bits, sizeof(bits));
    }
  }
  return bytes;
}

/// How many of the elements are not `value(i)`.
template <class Value>
[[nodiscard]] std::int64_t count_wrong(DType dtype, std::span<const std::byte> bytes,
                                       const Value& value) {
  const std::size_t width = size_of(dtype);
  std::int64_t wrong = 0;
  for (std::size_t i = 0; i < bytes.size() / width; ++i) {
    const std::byte* const from = bytes.data() + i * width;
    float number = 0;
    if (dtype == DType::f32) {
      std::memcpy(&number, from, sizeof(number));
    } else {
      std::uint16_t bits = 0;
      std::memcpy(&bits, from, sizeof(bits));
      number = dtype == DType::f16 ? f16_to_float(bits) : bf16_to_float(bits);
    }
    // A NaN, which poisoned memory holds, is no number.
    wrong += number == static_cast<float>(value(static_cast<std::int64_t>(i))) ? 0 : 1;
  }
  return wrong;
}

}  // namespace cohort::bench
