// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

/// \file
/// The mode in which the library computes with floats on the host, whatever the calling thread has
/// chosen: results are the same on every rank.

namespace cohort {

/// While it lives, this thread rounds to nearest, keeps subnormal numbers and traps no exception.
/// Engines and their libraries set denormals-are-zero for speed, and g++ does at the start of a
/// program that is linked with -ffast-math. Costs nanoseconds; for loops, not for elements.
///
/// Sources: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, 10.2.3 (MXCSR);
/// Arm Architecture Reference Manual, FPCR.
class DefaultFloatMode {
 public:
  DefaultFloatMode() noexcept : saved_(read()) {
    if ((saved_ & kModeBits) != kDefault) {
      write(kDefault);
    }
  }
  DefaultFloatMode(const DefaultFloatMode&) = delete;
  DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;
  ~DefaultFloatMode() {
    if ((saved_ & kModeBits) != kDefault) {
      write(saved_);
    }
  }

 private:
#if defined(__x86_64__)
  // As wide as what is stored: a wider load waits until all stores before it are in the cache.
  using Word = std::uint32_t;
  static constexpr Word kModeBits = 0xffc0;  // the others are flags of what has happened
  static constexpr Word kDefault = 0x1f80;
#elif defined(__aarch64__)
  using Word = std::uint64_t;
  static constexpr Word kModeBits = ~Word{0};
  static constexpr Word kDefault = 0;
#else
  using Word = std::uint64_t;
  static constexpr Word kModeBits = 0;  // no mode is known
  static constexpr Word kDefault = 0;
#endif

  static Word read() noexcept {
    Word word = 0;
#if defined(__x86_64__)
    asm volatile("stmxcsr %0" : "=m"(word));
#elif defined(__aarch64__)
    asm volatile("mrs %0, fpcr" : "=r"(word));
#endif
    return word;
  }

  /// The clobber keeps loads behind the change and stores before it, and what lies between them
  /// too.
  static void write(Word word) noexcept {
#if defined(__x86_64__)
    asm volatile("ldmxcsr %0" : : "m"(word) : "memory");
#elif defined(__aarch64__)
    asm volatile("msr fpcr, %0" : : "r"(word) : "memory");
#endif
    static_cast<void>(word);
  }

  Word saved_;
};

}  // namespace cohort
