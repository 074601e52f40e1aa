// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cohort/call_time.hpp"
#include "cohort/cuda/call_signature.hpp"
#include "cohort/cuda/cuda_stream.hpp"
#include "cohort/cuda/device_drain.hpp"
#include "cohort/cuda/inbox.hpp"
#include "cohort/error.hpp"
#include "cohort/flight_recorder.hpp"
#include "cohort/joined.hpp"
#include "cohort/log.hpp"
#include "cohort/nccl/nccl_group.hpp"
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
    auto next_look = start + kLookEvery;
    WaitNotice notice(start, limit);
    PollPause pause;
    while (true) {
      const auto now = std::chrono::steady_clock::now();  // before the look, which may be the last
      if (group_.streams.idle(stream.native())) {
        break;
      }
      if (group_.own_failed()) {
        static_cast<void>(drain(stream, "a wait of its own kernels failed"));
        throw_failure();
      }
      check_asynchronous();
      if (now >= deadline) {
        const bool drained =
            drain(stream,
                  fmt::format("synchronize: the stream was still busy after {} ms", limit.count()));
        if (group_.own_failed()) {
          throw_failure();
        }
        throw_time_out(limit, drained);
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
    if (group_.own_failed()) {
      throw_failure();
    }
    if (group_.size > 1) {
      group_.check_peers(look);
    }
    check_asynchronous();
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

  /// What NCCL noticed itself.
  void check_asynchronous() {
    if (group_.communicator == nullptr) {
      return;
    }
    try {
      group_.communicator->check_asynchronous();
    } catch (const TransportError& error) {
      group_.throw_told(error);
    }
  }

  /// Ends what the stream waits for, with the words of a rank that has left.
  void end_with_peers(StreamRef stream) {
    try {
      group_.check_peers(PeerLook::lately);
    } catch (const Error&) {
      static_cast<void>(drain(stream, "another rank has left"));
      throw;
    }
  }

  // RankWaits
  void end_waits() noexcept override { end_waits("another group's wait on its card ended"); }
  /// The others are told first: see `NcclGroup::check_peers`.
  void end_waits(std::string_view reason) noexcept {
    if (group_.peers != nullptr) {
      group_.peers->give_up();
    }
    group_.control.give_up(reason);
    if (group_.communicator != nullptr) {
      group_.communicator->abort();
    }
  }
  [[nodiscard]] std::string failure() const override {
    if (!group_.own_failed()) {
      return "";
    }
    const cuda::InboxError error = group_.peers->error().seen_by(group_.rank);
    const auto name_of = [this](int rank) {
      return rank == group_.rank ? std::string("this rank") : fmt::format("rank {}", rank);
    };
    if (error.theirs != cuda::PeerCall::none) {
      return fmt::format(
          "group {}: at call {} of the group's own kernels rank {} made {} {}, and {} {}{}",
          group_.control.name(), error.epoch, error.missing_rank,
          error.theirs == error.mine ? "another" : "a", to_string(error.theirs),
          name_of(error.waiting_rank), to_string(error.mine),
          error.theirs == error.mine && is_over_nccl(error.mine)
              ? ": its buffers lie at other offsets of their windows, or on one rank in none, or "
                "its sizes or types differ"
              : "");
    }
    if (error.missing_rank == group_.rank) {
      return fmt::format(
          "group {}: this rank did not come to call {} of the group's own kernels, {}, "
          "while rank {} waited for it",
          group_.control.name(), error.epoch, to_string(error.mine), error.waiting_rank);
    }
    const auto missing = group_.peers->missing();
    return fmt::format("group {}: rank{} {} did not come to call {} of the group's own kernels, {}",
                       group_.control.name(), missing.size() > 1 ? "s" : "", joined(missing, ", "),
                       error.epoch, to_string(error.mine));
  }

  /// Has the stream drain: own waits of this group first, so that they can say who was missing,
  /// then whatever else waits for ranks. False where it stays busy.
  [[nodiscard]] bool drain(StreamRef stream, std::string_view reason) {
    if (group_.peers != nullptr) {
      group_.peers->give_up();
      if (group_.streams.idle_within(stream.native(), kDrainLimit)) {
        return true;
      }
    }
    end_waits(reason);
    if (group_.streams.idle_within(stream.native(), kDrainLimit)) {
      return true;
    }
    group_.streams.end_all_waits();
    return group_.streams.idle_within(stream.native(), kDrainLimit);
  }

  [[noreturn]] void throw_failure() {
    if (group_.communicator != nullptr) {
      group_.communicator->mark_broken();  // teardown must not wait for peers from here on
    }
    const cuda::InboxError error = group_.peers->error().seen_by(group_.rank);
    const std::string text =
        failure() + "; outputs since then are undefined, and the group must be formed anew";
    if (error.theirs != cuda::PeerCall::none) {
      std::vector<int> others{error.missing_rank};
      if (error.waiting_rank != group_.rank) {  // two ranks of which this is none
        others.push_back(error.waiting_rank);
      }
      throw SymmetryError(text, std::move(others));
    }
    throw TimeoutError(text, group_.peers->missing());
  }

  /// Of a wait for which no own kernel of this group is to blame.
  [[noreturn]] void throw_time_out(std::chrono::milliseconds limit, bool drained) {
    if (group_.communicator != nullptr) {
      group_.communicator->mark_broken();
    }
    std::vector<int> gone = group_.gone_ranks();
    const std::string others = group_.streams.failures(*this);
    throw TimeoutError(
        fmt::format(
            "synchronize in group {} on rank {}: the stream was still busy after {} ms{}{}; "
            "{}, and the group must be formed anew",
            group_.control.name(), group_.rank, limit.count(),
            gone.empty() ? "" : fmt::format("; the process of rank {} is gone", joined(gone, ", ")),
            others.empty() ? "" : "; " + others,
            drained ? "its waits were ended" : "a kernel on it could not be ended"),
        std::move(gone));
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
