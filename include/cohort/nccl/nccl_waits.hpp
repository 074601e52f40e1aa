// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cohort/call_time.hpp"
#include "cohort/cuda/cuda_stream.hpp"
#include "cohort/cuda/device_drain.hpp"
#include "cohort/error.hpp"
#include "cohort/first_cause.hpp"
#include "cohort/flight_recorder.hpp"
#include "cohort/log.hpp"
#include "cohort/nccl/cause_finder.hpp"
#include "cohort/nccl/nccl_group.hpp"
#include "cohort/nccl/own_failure.hpp"
#include "cohort/poll_pause.hpp"
#include "cohort/wait_notice.hpp"

/// \file
/// Waiting for what a group over NCCL has enqueued, and ending it where a rank does not come.

namespace cohort::detail {

/// From its beginning to its end the device's streams know the group as one that waits for ranks.
class NcclWaits final : private RankWaits {
 public:
  explicit NcclWaits(NcclGroup& group) : group_(group) {
    if (group_.size > 1) {
      group_.streams.add(*this);
    }
  }
  NcclWaits(const NcclWaits&) = delete;
  NcclWaits& operator=(const NcclWaits&) = delete;
  ~NcclWaits() override {
    if (group_.size > 1) {
      settle(kDrainLimit);
      group_.streams.remove(*this);
      abandon_what_runs();
    }
  }

  void synchronize(StreamRef stream, std::chrono::milliseconds limit) {
    const auto start = std::chrono::steady_clock::now();
    const auto deadline = deadline_after(limit);
    const auto latest = deadline + limit / 4;
    auto next_look = start + kLookEvery;
    WaitNotice notice(start, limit);
    PollPause pause;
    while (true) {
      const auto now = std::chrono::steady_clock::now();  // before the look, which may be the last
      if (group_.streams.idle(stream.native())) {
        break;
      }
      if (group_.own_found_failure()) {
        fail_with_own(stream);
      }
      if (const auto noticed = asynchronous_failure()) {
        const FirstCause first = group_.leave(noticed, latest);
        static_cast<void>(end_all(stream, first.error));
        std::rethrow_exception(first.error);
      }
      if (now >= deadline) {
        fail_at_limit(stream, limit);
      }
      if (group_.size > 1) {
        notice.say(now, [&] { return waiting_text(); });
      }
      if (now >= next_look && group_.size > 1) {
        next_look = now + kLookEvery;
        end_with_peers(stream);
      }
      pause();
    }
    check();
  }

  /// Throws where a call of the group is known to have failed whose streams are idle: what it said
  /// here, or another rank that has left. Any thread.
  void check(PeerLook look = PeerLook::now) {
    if (group_.own_found_failure()) {
      throw_own();
    }
    if (group_.size > 1) {
      group_.check_peers(look);
    }
    if (const auto noticed = asynchronous_failure()) {
      group_.fail(noticed);
    }
  }

  void settle(std::chrono::milliseconds patience) noexcept {
    if (group_.size == 1 || std::exchange(settled_, true)) {
      return;
    }
    if (!device_idle_within(group_.device,
                            group_.failed() ? std::min(patience, kDrainLimit) : patience)) {
      end_waits("its calls did not come to their end before teardown");
    } else if (group_.own_failed()) {
      group_.communicator->mark_broken();  // peers have failed too: nobody waits for them
    }
  }

 private:
  /// How long waits that were told to end may take.
  static constexpr std::chrono::milliseconds kDrainLimit{1'000};
  /// How often a wait looks whether another rank has left.
  static constexpr std::chrono::milliseconds kLookEvery{5};

  /// Whom the stream is likely to wait for.
  [[nodiscard]] std::string waiting_text() const {
    const FlightRecorder* const recorder = group_.control.recorder();
    const std::string behind = recorder != nullptr ? recorder->behind() : "";
    return fmt::format(
        "group {}: rank {} has waited in synchronize{}", group_.control.name(), group_.rank,
        behind.empty() ? ", where no rank of this machine is known to have made fewer "
                         "calls"
                       : ": " + behind);
  }

  /// What NCCL noticed itself; null where it is nothing.
  [[nodiscard]] std::exception_ptr asynchronous_failure() {
    if (group_.communicator == nullptr) {
      return nullptr;
    }
    try {
      group_.communicator->check_asynchronous();
      return nullptr;
    } catch (const TransportError&) {
      return std::current_exception();
    }
  }

  /// Ends what the stream waits for, with the words of a rank that has left. What this group's own
  /// kernels have found themselves says more: each rank reads there who differs from it.
  void end_with_peers(StreamRef stream) {
    try {
      group_.check_peers(PeerLook::lately);
    } catch (const Error&) {
      if (group_.own_found_failure()) {
        fail_with_own(stream);
      }
      static_cast<void>(end_all(stream, std::current_exception()));
      throw;
    }
  }

  // RankWaits. The others are told first: see `NcclGroup::end_enqueued`.
  void end_waits(std::string_view reason) noexcept override {
    if (group_.peers != nullptr) {
      group_.peers->give_up();
    }
    try {
      static_cast<void>(
          group_.leave(std::make_exception_ptr(TimeoutError(
                           fmt::format("group {}: {}", group_.control.name(), reason), {})),
                       CauseFinder::Clock::now()));
    } catch (const std::exception&) {  // no memory for more
      group_.control.give_up(reason);
    }
    if (group_.communicator != nullptr) {
      group_.communicator->abort();
    }
  }
  [[nodiscard]] std::string failure() const override {
    return group_.own_found_failure()
               ? own_failure_text(*group_.peers, group_.control.name(), group_.rank)
               : "";
  }

  /// Whether the stream drains once the waits of this group's own kernels end, which then say who
  /// was missing.
  [[nodiscard]] bool end_own(StreamRef stream) {
    if (group_.peers == nullptr) {
      return false;
    }
    group_.peers->give_up();
    return group_.streams.idle_within(stream.native(), kDrainLimit);
  }
  /// Whether it drains once all ends that waits for ranks: that of this group, of which the others
  /// have been told, and then that of the groups beside it, which pass on why.
  [[nodiscard]] bool end_all(StreamRef stream, const std::exception_ptr& why) {
    group_.end_enqueued();
    if (group_.streams.idle_within(stream.native(), kDrainLimit)) {
      return true;
    }
    group_.streams.end_all_waits(
        fmt::format("ended with a wait on its card that failed: {}", words_of(why)));
    return group_.streams.idle_within(stream.native(), kDrainLimit);
  }

  /// What the own kernels failed with. The others read it on their cards; those that wait on the
  /// host are told.
  [[noreturn]] void throw_own() {
    if (group_.communicator != nullptr) {
      group_.communicator->mark_broken();  // teardown must not wait for peers from here on
    }
    const std::exception_ptr error = group_.own_failure();
    group_.control.give_up_because(error);
    std::rethrow_exception(error);
  }
  [[noreturn]] void fail_with_own(StreamRef stream) {
    if (!end_own(stream)) {
      const std::exception_ptr error = group_.own_failure();
      group_.control.give_up_because(error);
      static_cast<void>(end_all(stream, error));
    }
    throw_own();
  }

  /// Of a wait that has lasted for its limit.
  [[noreturn]] void fail_at_limit(StreamRef stream, std::chrono::milliseconds limit) {
    bool drained = end_own(stream);
    const FirstCause first = group_.leave(
        group_.own_found_failure()
            ? group_.own_failure()
            : std::make_exception_ptr(TimeoutError(
                  fmt::format("synchronize in group {} on rank {}: the stream was still busy after "
                              "{} ms",
                              group_.control.name(), group_.rank, limit.count()),
                  {})),
        CauseFinder::Clock::now());
    drained = drained || end_all(stream, first.error);
    if (group_.own_found_failure()) {
      std::rethrow_exception(first.error);
    }
    const std::string others = group_.streams.failures(*this);
    try {
      std::rethrow_exception(first.error);
    } catch (const TimeoutError& late) {
      throw TimeoutError(
          fmt::format("{}{}; {}, and the group must be formed anew", late.what(),
                      others.empty() ? "" : "; " + others,
                      drained ? "its waits were ended" : "a kernel on it could not be ended"),
          late.missing());
    }
  }

  /// Leaks what kernels may use that do not end.
  void abandon_what_runs() noexcept {
    if (device_idle_within(group_.device, kDrainLimit)) {
      return;
    }
    log(LogLevel::error,
        "teardown of group {} on rank {}: cuda:{} did not become idle; what its "
        "kernels may use stays mapped",
        group_.control.name(), group_.rank, group_.device);
    for (Workspace& workspace : group_.workspaces) {
      workspace.abandon();
    }
    static_cast<void>(group_.barrier_word.release());
    if (group_.peers != nullptr) {
      group_.peers->abandon();
    }
    if (group_.communicator != nullptr) {
      group_.communicator->mark_broken();
    }
  }

  NcclGroup& group_;
  bool settled_ = false;
};

}  // namespace cohort::detail
