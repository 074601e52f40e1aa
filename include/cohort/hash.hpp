// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>

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

[[nodiscard]] constexpr std::uint64_t hash_text(std::string_view text) noexcept {
  std::uint64_t hash = kHashSeed;
  for (const char c : text) {
    hash = mix(hash, static_cast<unsigned char>(c));
  }
  return hash;
}

}  // namespace cohort::detail
