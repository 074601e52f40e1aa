// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <string_view>

/// \file
/// Texts in plain values that ranks send each other.

namespace cohort::detail {

/// Cuts a text that is too long; the last character stays zero.
template <std::size_t N>
void copy_text(std::string_view text, std::array<char, N>& to) noexcept {
  to = {};
  std::copy_n(text.begin(), std::min(text.size(), N - 1), to.begin());
}

/// The text up to the first zero. A sender that wrote none gives all of the array, and not what
/// lies behind it.
template <std::size_t N>
[[nodiscard]] std::string_view text_of(const std::array<char, N>& text) noexcept {
  return {text.data(),
          static_cast<std::size_t>(std::find(text.begin(), text.end(), '\0') - text.begin())};
}

}  // namespace cohort::detail
