// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

/// \file
/// Data that is a function of a seed, the same on every machine and in any order.

namespace dcp_decode {

/// An extent or a place as containers take it.
[[nodiscard]] constexpr std::size_t index(std::int64_t value) noexcept {
  return static_cast<std::size_t>(value);
}

/// The finalizer of SplitMix64 (G. Steele, D. Lea and C. Flood, "Fast splittable pseudorandom
/// number generators", 2014).
[[nodiscard]] constexpr std::uint64_t scramble(std::uint64_t x) noexcept {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

/// Numbers in [-1, 1), one for each key, in the row that a seed and two keys name.
class Numbers {
 public:
  constexpr Numbers(std::uint64_t seed, std::uint64_t a, std::uint64_t b) noexcept
      : row_(scramble(scramble(scramble(seed) ^ a) ^ b)) {}

  [[nodiscard]] constexpr double operator()(std::uint64_t c) const noexcept {
    return static_cast<double>(scramble(row_ ^ c) >> 11) * 0x1p-52 - 1.0;
  }

 private:
  std::uint64_t row_;
};

/// One of them.
[[nodiscard]] constexpr double uniform(std::uint64_t seed, std::uint64_t a, std::uint64_t b,
                                       std::uint64_t c) noexcept {
  return Numbers(seed, a, b)(c);
}

}  // namespace dcp_decode
