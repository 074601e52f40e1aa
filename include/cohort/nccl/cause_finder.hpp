// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nccl.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <exception>
#include <optional>
#include <utility>
#include <vector>

#include "cohort/control_plane.hpp"
#include "cohort/cuda/process_liveness.hpp"
#include "cohort/error.hpp"
#include "cohort/first_cause.hpp"
#include "cohort/give_up.hpp"
#include "cohort/poll_pause.hpp"

/// \file
/// Why a call of a group over NCCL has failed, which NCCL itself does not say.

namespace cohort::detail {

/// Asks the control plane and the processes of the ranks.
class CauseFinder {
 public:
  using Clock = std::chrono::steady_clock;  ///< Of limits.

  /// Knows of no process.
  CauseFinder() = default;
  /// @param processes  By rank.
  explicit CauseFinder(std::vector<ProcessIdentity> processes) : processes_(std::move(processes)) {}

  /// Decides what this rank throws behind `error`, and tells the others of `group` the same: before
  /// NCCL is told to end anything, because its peers then end as if all were well. Waits a while
  /// for who is at fault where the error speaks of another rank, and no longer than until `latest`.
  [[nodiscard]] FirstCause leave(ControlPlane& group, const std::exception_ptr& error,
                                 Clock::time_point latest) const {
    FirstCause first = find(group, error, latest);
    group.leave_with(first.why);
    return first;
  }

 private:
  /// How long a process may take to end once its connections are closed.
  static constexpr std::chrono::milliseconds kEndOfProcess{500};

  [[nodiscard]] FirstCause find(ControlPlane& group, const std::exception_ptr& error,
                                Clock::time_point latest) const {
    const Suspicion suspicion = suspicion_of(error);
    const auto begin = Clock::now();
    const auto deadline = suspicion.closed ? std::min(begin + kEndOfProcess, latest) : begin;
    PollPause pause;
    while (true) {
      const bool is_last = Clock::now() >= deadline;
      FailedWait failed{.error = error, .suspect = suspicion.of};
      failed.gone = gone_ranks(group.rank());  // who has ended has said before what it had to say
      failed.said = words_in(group);
      if (is_last || failed.said || !failed.gone.empty()) {
        return first_cause(failed, group.rank(), "wait", group.name());
      }
      pause();
    }
  }

  struct Suspicion {
    Suspect of = Suspect::named;
    bool closed = false;  // a connection is, whose process may still be ending
  };

  [[nodiscard]] static Suspicion suspicion_of(const std::exception_ptr& error) {
    try {
      std::rethrow_exception(error);
    } catch (const TimeoutError& late) {
      return {late.missing().empty() ? Suspect::others : Suspect::named};
    } catch (const TransportError& broken) {
      const long code = broken.site().native_code;
      if (code == 0 || !broken.site().call.starts_with("nccl")) {
        return {};
      }
      const bool remote = code == ncclRemoteError || code == ncclSystemError;
      return {remote ? Suspect::others : Suspect::self, remote};
    } catch (const std::exception&) {
      return {};
    }
  }

  /// The ranks whose processes are known to have ended.
  [[nodiscard]] std::vector<int> gone_ranks(int self) const {
    std::vector<int> gone;
    for (std::size_t r = 0; r < processes_.size(); ++r) {
      if (process_is_gone(processes_[static_cast<std::size_t>(self)], processes_[r])) {
        gone.push_back(static_cast<int>(r));
      }
    }
    return gone;
  }

  /// With what this rank has left, or leaves now because another has said so.
  [[nodiscard]] static std::optional<GiveUp> words_in(ControlPlane& group) {
    try {
      group.check_peers();
    } catch (const Error&) {  // it has left with what it heard
    }
    return group.left_with();
  }

  std::vector<ProcessIdentity> processes_;
};

}  // namespace cohort::detail
