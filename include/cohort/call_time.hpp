// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>

#include "cohort/error.hpp"
#include "cohort/process_state.hpp"

/// \file
/// Time limits of waits, and one for all waits of a public call.

namespace cohort {

/// The longest time limit: no wait is unbounded.
inline constexpr std::chrono::milliseconds kLongestTimeLimit = std::chrono::hours(24 * 365);

/// Whether a wait may have that limit as an option; see `checked_limit` for one of a call.
[[nodiscard]] constexpr bool is_time_limit(std::chrono::milliseconds limit) noexcept {
  return limit > std::chrono::milliseconds(0) && limit <= kLongestTimeLimit;
}

/// The limit of a call's wait: at most `kLongestTimeLimit`. Throws `UsageError` naming the call
/// unless it is positive: a wait that gives up at once would end its group.
[[nodiscard]] inline std::chrono::milliseconds checked_limit(const char* call,
                                                             std::chrono::milliseconds limit) {
  if (limit <= std::chrono::milliseconds(0)) {
    throw UsageError(std::string(call) + " limit: expected at least 1 ms, got " +
                     std::to_string(limit.count()));
  }
  return std::min(limit, kLongestTimeLimit);
}

}  // namespace cohort

namespace cohort::detail {

/// When a wait that starts now ends: no later than `kLongestTimeLimit`, so that no sum overflows.
[[nodiscard]] inline std::chrono::steady_clock::time_point deadline_after(
    std::chrono::milliseconds limit) noexcept {
  return std::chrono::steady_clock::now() +
         std::clamp(limit, std::chrono::milliseconds(0), kLongestTimeLimit);
}

/// What is left until a deadline, and at least a millisecond: time to see what has ended already.
[[nodiscard]] inline std::chrono::milliseconds left_until(
    std::chrono::steady_clock::time_point deadline) noexcept {
  return std::max(std::chrono::milliseconds(1), std::chrono::ceil<std::chrono::milliseconds>(
                                                    deadline - std::chrono::steady_clock::now()));
}

/// What a thread has waited for other ranks in the call that it is in.
struct CallClock {
  std::chrono::steady_clock::duration waited{};
  std::chrono::steady_clock::duration limit{};  ///< The longest of its waits so far.
  std::uint64_t number = 0;           ///< Of the call among those of the thread, 0 for none.
  std::uint64_t calls = 0;            ///< That the thread has made.
  std::uint64_t waits = 0;            ///< For other ranks, since the thread began.
  std::uint64_t recorded = 0;         ///< The last call of the thread whose work was recorded.
  std::uint64_t recorded_number = 0;  ///< What recordings call it.
};

/// Where each thread keeps it: in memory of the module that was asked first.
struct CallClocks {
  inline static constinit thread_local CallClock own{};

  CallClock* (*of_this_thread)() noexcept = []() noexcept { return &own; };
  std::atomic<std::uint64_t> recorded_calls{0};  ///< Of all threads.
};

/// The process's.
[[nodiscard]] inline CallClocks& call_clocks() { return process_wide<CallClocks>("call clocks 5"); }

/// This thread's, whichever module the call came from.
[[nodiscard]] inline CallClock& call_clock() noexcept {
  static constinit thread_local CallClock* place = nullptr;
  if (place == nullptr) [[unlikely]] {
    place = call_clocks().of_this_thread();
  }
  return *place;
}

/// The number by which recorded work knows the call that this thread is in, 0 for none: no other
/// call of the process has it, whichever threads record into one capture.
[[nodiscard]] inline std::uint64_t recorded_call() {
  CallClock& clock = call_clock();
  if (clock.number == 0) {
    return 0;
  }
  if (clock.recorded != clock.number) {
    clock.recorded = clock.number;
    clock.recorded_number = call_clocks().recorded_calls.fetch_add(1) + 1;
  }
  return clock.recorded_number;
}

/// A public call: its waits, in whichever groups and parts, share their time limit, so that a rank
/// that comes late and then not at all does not keep the others for a limit each time. Calls within
/// the call belong to it. Nothing but thread-local memory is touched.
class CallTime {
 public:
  CallTime() noexcept : is_outermost_(call_clock().number == 0) {
    if (is_outermost_) {
      CallClock& clock = call_clock();
      clock.number = ++clock.calls;
    }
  }
  CallTime(const CallTime&) = delete;
  CallTime& operator=(const CallTime&) = delete;
  ~CallTime() {
    if (is_outermost_) {
      CallClock& clock = call_clock();
      clock.waited = {};
      clock.limit = {};
      clock.number = 0;
    }
  }

 private:
  bool is_outermost_;
};

/// A wait that starts now with what its call has left of a time limit; all of it where no call is
/// under way. Where little is left it has an eighth, so that ranks which are there, and had waited
/// for each other so long, can end the call together. Beyond the limit a call has a quarter of it,
/// of which each wait has half of what is left, so that ranks which come in pulses do not keep the
/// others for longer.
class LimitedWait {
 public:
  using Clock = std::chrono::steady_clock;

  explicit LimitedWait(Clock::duration limit) noexcept : LimitedWait(limit, limit) {}
  /// @param limit_of_call  What the call has that the wait is part of, where the wait has more.
  LimitedWait(Clock::duration limit, Clock::duration limit_of_call) noexcept
      : start_(Clock::now()), deadline_(start_ + limit), grace_(limit / 8) {
    CallClock& clock = call_clock();
    ++clock.waits;
    if (clock.number != 0) {
      clock.limit = std::max(clock.limit, limit_of_call);
      deadline_ = start_ + left(limit, clock.waited, clock.limit);
      grace_ = std::min(grace_, beyond(clock.waited + (deadline_ - start_), clock.limit) / 2);
    }
  }
  LimitedWait(const LimitedWait&) = delete;
  LimitedWait& operator=(const LimitedWait&) = delete;
  ~LimitedWait() {
    if (CallClock& clock = call_clock(); clock.number != 0) {
      clock.waited += Clock::now() - start_;
    }
  }

  [[nodiscard]] Clock::time_point start() const noexcept { return start_; }
  [[nodiscard]] Clock::time_point deadline() const noexcept { return deadline_; }

  /// Until when it may last to learn who is at fault, where that takes longer.
  [[nodiscard]] Clock::time_point latest() const noexcept { return deadline_ + grace_; }

  /// For messages: the limit, and the part that this wait had where its call had waited before.
  [[nodiscard]] std::string describe(std::chrono::milliseconds limit) const {
    const auto had = std::chrono::duration_cast<std::chrono::milliseconds>(deadline_ - start_);
    return had < limit ? fmt::format("{} ms, which all waits of the call share: this one had {} ms",
                                     limit.count(), had.count())
                       : fmt::format("{} ms", limit.count());
  }

  /// What a wait with this limit has in a call that has waited so long, and whose longest limit is
  /// `most`.
  [[nodiscard]] static constexpr Clock::duration left(Clock::duration limit, Clock::duration waited,
                                                      Clock::duration most) noexcept {
    return std::max(limit - waited, std::min(limit / 8, beyond(waited, most) / 2));
  }

 private:
  /// What a call has left of its limit and the quarter beyond it.
  [[nodiscard]] static constexpr Clock::duration beyond(Clock::duration waited,
                                                        Clock::duration most) noexcept {
    return std::max(most + most / 4 - waited, Clock::duration::zero());
  }

  Clock::time_point start_;
  Clock::time_point deadline_;
  Clock::duration grace_;
};

}  // namespace cohort::detail
