// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <string_view>

/// \file
/// Texts in plain values that ranks send each other.

namespace cohort::detail {

/// As much of a UTF-8 text as fits into so many bytes, without a piece of a character.
[[nodiscard]] constexpr std::string_view cut_text(std::string_view text,
                                                  std::size_t bytes) noexcept {
  if (text.size() <= bytes) {
    return text;
  }
  constexpr std::size_t kRest = 3;  // bytes of a character behind its first, at most
  std::size_t end = bytes;
  while (end > 0 && bytes - end < kRest &&
         (static_cast<unsigned char>(text[end]) & 0xc0U) == 0x80) {
    --end;
  }
  return text.substr(0, end);
}

/// Cuts a text that is too long; the last character stays zero.
template <std::size_t N>
void copy_text(std::string_view text, std::array<char, N>& to) noexcept {
  to = {};
  const std::string_view kept = cut_text(text, N - 1);
  std::copy(kept.begin(), kept.end(), to.begin());
}

/// The text up to the first zero. A sender that wrote none gives all of the array, and not what
/// lies behind it.
template <std::size_t N>
[[nodiscard]] std::string_view text_of(const std::array<char, N>& text) noexcept {
  return {text.data(),
          static_cast<std::size_t>(std::find(text.begin(), text.end(), '\0') - text.begin())};
}

}  // namespace cohort::detail
