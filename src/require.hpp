// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include "cohort/error.hpp"

// What launchers check. Every launch does, so the text is made only where it is thrown: an eager
// decode step cannot afford to format what nobody reads.

namespace cohort::cuda::detail {

inline void require(bool condition, const char* argument, const char* text) {
  if (!condition) {
    throw UsageError(fmt::format("{}: {}", argument, text));
  }
}

template <class First, class... Rest>
void require(bool condition, const char* argument, fmt::format_string<First, Rest...> text,
             const First& first, const Rest&... rest) {
  if (!condition) {
    throw UsageError(fmt::format("{}: {}", argument, fmt::format(text, first, rest...)));
  }
}

}  // namespace cohort::cuda::detail
