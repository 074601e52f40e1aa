// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>

/// \file
/// Lists of numbers in messages. Not fmt::join: under g++ 12 at -O3 it warns in the sources of
/// those who include it (-Wstringop-overflow, in fmt's own code).

namespace cohort::detail {

/// The numbers in order, with the separator between them.
template <class Numbers>
[[nodiscard]] std::string joined(const Numbers& numbers, std::string_view separator) {
  std::string text;
  for (const auto number : numbers) {
    if (!text.empty()) {
      text += separator;
    }
    text += std::to_string(number);
  }
  return text;
}

}  // namespace cohort::detail
