// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "cohort/vectorised.hpp"

/// \file
/// Inputs that are written before each call, as what produces them does.

namespace cohort::bench {
namespace detail {

/// Loads and stores every byte. What is added is 0, which the compiler does not know.
struct Rewrite {
  [[gnu::always_inline]] static void run(std::uint8_t* bytes, std::uint8_t zero,
                                         std::size_t count) noexcept {
    constexpr std::size_t kLine = 64;  // a constant trip count lets compilers vectorise at -O2
    const std::size_t whole = count / kLine * kLine;
    for (std::size_t i = 0; i < whole; i += kLine) {
      for (std::size_t j = 0; j < kLine; ++j) {
        bytes[i + j] = static_cast<std::uint8_t>(bytes[i + j] + zero);
      }
    }
    for (std::size_t i = whole; i < count; ++i) {
      bytes[i] = static_cast<std::uint8_t>(bytes[i] + zero);
    }
  }
};

}  // namespace detail

/// Writes all of the memory by ordinary stores: the values that are there, so that answers stay.
inline void rewrite(std::span<std::byte> memory) {
  static const volatile std::uint8_t zero = 0;
  cohort::detail::vectorised_widest<detail::Rewrite>(reinterpret_cast<std::uint8_t*>(memory.data()),
                                                     std::uint8_t{zero}, memory.size());
}

}  // namespace cohort::bench
