// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

/// \file
/// A hash of words, by which ranks compare what they have done.

namespace cohort::detail {

/// A step of FNV-1a over 64-bit words (Fowler, Noll, Vo; RFC draft-eastlake-fnv), with a final
/// shift so that high bits reach low ones.
[[nodiscard]] constexpr std::uint64_t mix(std::uint64_t hash, std::uint64_t value) noexcept {
  hash = (hash ^ value) * 0x100000001b3ULL;
  return hash ^ (hash >> 29);
}
inline constexpr std::uint64_t kHashSeed = 0xcbf29ce484222325ULL;

}  // namespace cohort::detail
