// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <time.h>

#include <algorithm>
#include <chrono>
#include <thread>

/// \file
/// What every wait of the library does between two looks.

namespace cohort::detail {

/// Tells the processor that the thread spins.
inline void relax() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Tells the processor that the line of this address is soon to be written: it is fetched from the
/// caches of those that have read it, while the thread goes on.
inline void fetch_to_write(const void* address) noexcept {
#if defined(__x86_64__)
  // Compilers take the instruction only where they are told of the processor; those without it pass
  // over it. Source: Intel's software developer's manual, volume 2, PREFETCHW.
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(address)));
#else
  __builtin_prefetch(address, 1);
#endif
}

/// Sleeps for at most `length`; a signal ends it. Not std::this_thread::sleep_for, which sleeps on
/// for the rest after a signal: the kernel adds its timer slack (50 µs) to that rest again, so
/// under signals that come faster the sleep never ends, and the wait around it never looks at its
/// limit.
inline void nap(std::chrono::nanoseconds length) noexcept {
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(length);
  const timespec time{.tv_sec = seconds.count(), .tv_nsec = (length - seconds).count()};
  ::nanosleep(&time, nullptr);
}

/// The pause between two polls: none to speak of at first, which is where short waits end; then the
/// processor is offered to others; then naps, so that ranks that share a core make progress. A nap
/// is a fraction of the time waited so far, so what it adds to a wait is in proportion. Every call
/// returns within `kLongestNap` and the machine's own delays, signals or not, so a loop that looks
/// at its limit after each ends at the limit.
class PollPause {
 public:
  static constexpr std::chrono::microseconds kLongestNap{100};

  /// @param yield_for  How long the processor is offered before the first nap. Napping costs those
  ///                   who wait some 60 µs and more, yielding costs those who work on the same
  ///                   core.
  /// @param spins      Pauses before that.
  explicit PollPause(std::chrono::microseconds yield_for = std::chrono::microseconds(500),
                     int spins = 64) noexcept
      : yield_for_(yield_for), spins_left_(spins) {}

  void operator()() noexcept {
    if (spins_left_ > 0) {
      --spins_left_;
      relax();
      return;
    }
    const auto now = std::chrono::steady_clock::now();
    if (spins_left_ == 0) {
      spins_left_ = -1;
      begin_ = now;
    }
    const auto waited = now - begin_;
    if (waited < yield_for_) {
      std::this_thread::yield();
      return;
    }
    nap(std::clamp<std::chrono::nanoseconds>(waited / 4, kShortestNap, kLongestNap));
  }

 private:
  static constexpr std::chrono::microseconds kShortestNap{5};

  std::chrono::microseconds yield_for_;
  int spins_left_;                               // then 0, and -1 once yielding has begun
  std::chrono::steady_clock::time_point begin_;  // of yielding
};

}  // namespace cohort::detail
