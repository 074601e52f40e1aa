// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "cohort/host/strided.hpp"

/// \file
/// Copies into inbox slots, whose lines the peers have read before.

namespace cohort::host {
namespace detail {

/// Whether string moves take lines over that others hold faster than ordinary stores do: on AMD's
/// processors that move short ones fast (FSRM, Zen 4 and later). Intel's were measured with
/// ordinary stores alone. Source: AMD64 Architecture Programmer's Manual, volume 3, CPUID
/// Fn0000_0000 and Fn0000_0007_EDX_x0, bit 4.
[[nodiscard]] inline bool find_string_moves() noexcept {
#if defined(__x86_64__)
  constexpr unsigned kShortMoves = 1U << 4;
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  if (__get_cpuid(0, &eax, &ebx, &ecx, &edx) == 0 || ebx != signature_AMD_ebx) {
    return false;
  }
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kShortMoves) != 0;
#else
  return false;
#endif
}

inline const bool kMovesStrings = find_string_moves();

}  // namespace detail

/// Whether a copy of so many bytes into a slot waits for the slot's lines, so that it is quicker
/// where they have been fetched ahead: a string move takes them over whole. Of less than this it is
/// slower than a copy of lines that are there.
[[nodiscard]] inline bool waits_for_lines(std::size_t bytes) noexcept {
  constexpr std::size_t kStringBytes = 1024;
  return bytes < kStringBytes || !detail::kMovesStrings;
}

/// Copies `bytes` into a slot. What this thread stores afterwards, peers see after all of it.
inline void copy_to_slot(std::byte* to, const std::byte* from, std::size_t bytes) noexcept {
#if defined(__x86_64__)
  if (!waits_for_lines(bytes)) {
    asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
    return;
  }
#endif
  if (bytes > 0) {
    std::memcpy(to, from, bytes);
  }
}

/// Copies the next `count` elements into a slot, without gaps, and advances the cursor.
inline void copy_to_slot(std::byte* to, ReadCursor& from, std::int64_t count) noexcept {
  const std::size_t element = from.element_bytes();
  while (count > 0) {
    const std::int64_t run = std::min(count, from.run());
    const std::size_t bytes = static_cast<std::size_t>(run) * element;
    if (from.stride() == 1 || run == 1) {
      copy_to_slot(to, from.at(), bytes);
    } else {
      detail::copy_run(to, 1, from.at(), from.stride(), run, element);
    }
    to += bytes;
    from.advance(run);
    count -= run;
  }
}

}  // namespace cohort::host
