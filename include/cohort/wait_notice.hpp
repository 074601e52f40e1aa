// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <chrono>
#include <string>

#include "cohort/call_time.hpp"
#include "cohort/log.hpp"
#include "cohort/runtime_env.hpp"
#include "cohort/wait_look.hpp"

/// \file
/// A wait that talks while it waits: one line in the log once a share of its time limit is over.
/// And looks, where its thread has something to look at.

namespace cohort::detail {

/// Of one wait. Costs a comparison until it is due.
class WaitNotice {
 public:
  using Clock = std::chrono::steady_clock;

  /// The share that holds where COHORT_WAIT_NOTICE says nothing, in percent.
  static constexpr int kDefaultPercent = 25;

  explicit WaitNotice(Clock::time_point start, Clock::duration limit,
                      int percent = runtime_settings().wait_notice.value_or(kDefaultPercent))
      : start_(start),
        limit_(limit),
        due_(percent > 0 ? start + limit / 100 * percent : Clock::time_point::max()) {}

  /// When it is to be said.
  [[nodiscard]] Clock::time_point due() const noexcept { return due_; }

  /// By the wait between two polls, without a lock. Says it, once, where it is due. `text()` names
  /// who is missing and in which call: "group tp[0]: rank 1 has not come to all_reduce".
  template <class Text>
  void say(Clock::time_point now, const Text& text) {
    WaitLook::pass(now);
    if (now < due_) {
      return;
    }
    due_ = Clock::time_point::max();
    using std::chrono::duration_cast;
    using std::chrono::milliseconds;
    log(LogLevel::warning, "{}, for {} ms of at most {}", text(),
        duration_cast<milliseconds>(now - start_).count(),
        duration_cast<milliseconds>(limit_).count());
  }

 private:
  Clock::time_point start_;
  Clock::duration limit_;
  Clock::time_point due_;
};

}  // namespace cohort::detail
