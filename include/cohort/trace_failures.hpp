// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cohort/owner_process.hpp"

/// \file
/// What a group's recorder is told of calls that fail.

namespace cohort {

class FlightRecorder;

/// How a call of a group failed.
struct TraceFailure {
  std::string why;                ///< What was thrown.
  bool late = false;              ///< Ranks did not come in time.
  std::vector<int> missing = {};  ///< Those, in the group.
  std::uint64_t ended = 0;        ///< Calls of the group that had come to their end before.
};

/// The failures of one group's calls. Any thread.
class TraceFailures {
 public:
  using Act = std::function<void(const FlightRecorder&, const TraceFailure&)>;  ///< What is done.

  /// What to do at a failure. Waits for what is being done.
  void on_failure(Act act) noexcept {
    const std::lock_guard lock(act_mutex_);
    act_ = std::move(act);
  }
  /// A call of that recorder's group has failed.
  void add(const FlightRecorder& recorder, const TraceFailure& failure) {
    {
      const std::lock_guard lock(mutex_);
      // What follows a failure tells less, but for the first time-out.
      if (!telling_ || failure.ended > telling_->ended || (failure.late && !telling_->late)) {
        telling_ = failure;
      }
    }
    const std::lock_guard lock(act_mutex_);
    if (act_) {
      act_(recorder, failure);
    }
  }
  /// The one that tells most of those since a call last came to its end.
  [[nodiscard]] std::optional<TraceFailure> telling() const {
    const std::lock_guard lock(mutex_);
    return telling_;
  }

 private:
  mutable OwnerMutex mutex_;
  std::optional<TraceFailure> telling_;
  OwnerMutex act_mutex_;  // of what is done then: who takes it away may be gone afterwards
  Act act_;
};

}  // namespace cohort
