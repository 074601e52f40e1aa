// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <utility>

/// \file
/// What a thread does now and then while it waits for other ranks.

namespace cohort {

/// From its beginning to its end the thread that makes it calls `look` within its waits for other
/// ranks, some twenty times a second: a binding finds out there what its interpreter has to do,
/// such as the signals that have come. `look` may leave groups (`ControlPlane::give_up`), which
/// ends the wait with an error and tells the other ranks; it makes no calls of them, and throws
/// nothing. Of several of a thread the last one counts alone; one without a function looks at
/// nothing. Any module of a process has its own.
class WaitLook {
 public:
  using Clock = std::chrono::steady_clock;        ///< Of waits.
  using Look = void (*)(void* context) noexcept;  ///< What is called, with what it was made with.

  static constexpr std::chrono::milliseconds kEvery{
      50};  ///< Between two looks, and before the first.

  /// Of this thread, from now on; `context` outlives it.
  explicit WaitLook(Look look = nullptr, void* context = nullptr) noexcept
      : look_(look), context_(context), outer_(std::exchange(of_thread, this)) {}
  WaitLook(const WaitLook&) = delete;
  WaitLook& operator=(const WaitLook&) = delete;
  ~WaitLook() { of_thread = outer_; }

  /// By a wait that has lasted until `now`, between two polls and without a lock: looks where it is
  /// time.
  static void pass(Clock::time_point now) noexcept {
    WaitLook* const last = of_thread;
    if (last == nullptr || last->look_ == nullptr || now < last->next_) {
      return;
    }
    if (last->next_ != Clock::time_point{}) {
      last->look_(last->context_);
      now = Clock::now();
    }
    last->next_ = now + kEvery;
  }

 private:
  inline static constinit thread_local WaitLook* of_thread = nullptr;

  Look look_;
  void* context_;
  WaitLook* outer_;
  Clock::time_point next_{};  // none before the first wait
};

}  // namespace cohort
