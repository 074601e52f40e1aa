// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cohort/attendance.hpp"
#include "cohort/call_time.hpp"
#include "cohort/control_frame.hpp"
#include "cohort/control_talk.hpp"
#include "cohort/error.hpp"
#include "cohort/flight_recorder.hpp"
#include "cohort/give_up.hpp"
#include "cohort/inquiry.hpp"
#include "cohort/joined.hpp"
#include "cohort/mailbox.hpp"
#include "cohort/membership.hpp"
#include "cohort/messenger.hpp"
#include "cohort/notice_board.hpp"
#include "cohort/wait_notice.hpp"

/// \file
/// How a call of a control plane waits for messages, and whom it blames where they do not come.

namespace cohort::detail {

/// One wait of a call for several ranks, which share its time. Lives no longer than what it is made
/// of.
class ControlWait {
 public:
  /// @param recorder  Of the group, to tell the call that is open; null for none.
  /// @param most      How long it lasts.
  /// @param of_call   The limit of the group's calls, where the wait has more.
  ControlWait(Mailbox& mailbox, const Membership& group, Attendance& attendance,
              const FlightRecorder* recorder, std::chrono::milliseconds most,
              std::chrono::milliseconds of_call)
      : mailbox_(mailbox),
        group_(group),
        attendance_(attendance),
        recorder_(recorder),
        limit_(std::min(most, kLongestTimeLimit)),
        time_(limit_, std::min(limit_, of_call)),
        notice_(time_.start(), limit_) {}
  ControlWait(const ControlWait&) = delete;
  ControlWait& operator=(const ControlWait&) = delete;

  [[nodiscard]] Deadline start() const noexcept { return time_.start(); }
  [[nodiscard]] std::chrono::milliseconds limit() const noexcept { return limit_; }
  /// Those that did not come, in the order in which they were waited for.
  [[nodiscard]] const std::vector<int>& missing() const noexcept { return missing_; }

  /// The matching payload from a rank of the group; notes the rank as missing at the deadline.
  /// Throws as soon as any rank of the group says that it gave up, or one of the members `awaited`
  /// that it has left, and `SymmetryError` where the rank is in another call.
  Bytes receive(int from, const FrameTrailer& expected, std::span<const int> awaited) {
    auto concern = attendance_.watch(expected, group_.members());
    concern.awaited = awaited;
    std::optional<Mailbox::Frame> frame;
    const bool came = persist(
        expected, concern, [&] { return missing_of(from, expected, awaited); },
        [&](Deadline end) {
          frame = mailbox_.receive(group_.member(from), expected.call, concern, end);
          return frame.has_value();
        });
    if (!came) {
      missing_.push_back(from);
      return {};
    }
    if (frame->trailer.call != expected.call || frame->trailer.sequence != expected.sequence) {
      throw SymmetryError(
          fmt::format("group {}: rank {} is in {} #{} while rank {} is in {} #{}", group_.name(),
                      from, to_string(frame->trailer.call), frame->trailer.sequence, group_.rank(),
                      to_string(expected.call), expected.sequence),
          {from});
    }
    return std::move(frame->payload);
  }

  /// Until what was sent to a rank arrives without this one's help.
  void flush(int to, const FrameTrailer& trailer) {
    const auto concern = attendance_.watch(trailer, group_.members());
    if (!persist(
            trailer, concern, [to] { return std::vector{to}; },
            [&](Deadline end) { return mailbox_.flush(group_.member(to), concern, end); })) {
      missing_.push_back(to);
    }
  }

  /// Where ranks are missing throws `TimeoutError` naming those at fault, or `SymmetryError` where
  /// ranks wait for each other in calls that differ, unless one has said better why they are.
  void fail_if_missing(const FrameTrailer& trailer) {
    if (!missing_.empty()) {
      mailbox_.look();
      attendance_.throw_if_told(trailer.call, attendance_.watch(trailer, group_.members()));
      std::rethrow_exception(
          late_error(fmt::format("{} #{} of group {} ({} ranks)", to_string(trailer.call),
                                 trailer.sequence, group_.name(), group_.size()),
                     time_.describe(limit_), missing_,
                     talk_ != nullptr ? talk_->at_fault(missing_) : Fault{missing_}));
    }
  }

 private:
  /// How often a wait answers others.
  static constexpr std::chrono::milliseconds kTalkEvery{5};
  /// Between looks behind the deadline.
  static constexpr std::chrono::milliseconds kWhileSettling{1};

  /// Tries until it succeeds, or the wait is over: false then. `attempt(end)` tries until then.
  template <class Missing, class Attempt>
  bool persist(const FrameTrailer& trailer, const Watch& concern, const Missing& missing,
               const Attempt& attempt) {
    while (true) {
      const Deadline now = Clock::now();
      const bool is_late = now >= time_.deadline();
      if (attempt(is_late ? now : std::min(now + kTalkEvery, time_.deadline()))) {
        return true;
      }
      attendance_.throw_if_told(trailer.call, concern);
      if (is_late && (talk_ == nullptr || now >= time_.latest() || talk_->is_settled(missing()))) {
        return false;
      }
      notice_.say(now, [&] { return missing_text(missing(), trailer); });
      if (talk_ == nullptr && !is_late) {
        talk_ = begin_talk(mailbox_, group_, recorder_, time_, limit_);
      }
      if (talk_ != nullptr) {
        talk_->look(missing);
      }
      if (is_late) {
        std::this_thread::sleep_for(kWhileSettling);
      }
    }
  }

  /// Whom a wait for `from` misses, of those awaited: calls that wait for several take them in
  /// order.
  [[nodiscard]] std::vector<int> missing_of(int from, const FrameTrailer& expected,
                                            std::span<const int> awaited) {
    std::vector<int> missing{from};
    mailbox_.look();
    for (const int member : awaited) {
      const int r = group_.rank_of(member);
      if (r != group_.rank() && std::count(missing.begin(), missing.end(), r) == 0 &&
          !mailbox_.has(member, expected.call, group_.channel())) {
        missing.push_back(r);
      }
    }
    std::sort(missing.begin(), missing.end());
    return missing;
  }

  [[nodiscard]] std::string missing_text(const std::vector<int>& missing,
                                         const FrameTrailer& expected) const {
    const std::string open = recorder_ != nullptr ? recorder_->open_call() : "";
    return fmt::format(
        "group {}: rank {} has waited for rank {} to come to {} #{} over the control plane{}",
        group_.name(), group_.rank(), joined(missing, ", "), to_string(expected.call),
        expected.sequence, open.empty() ? "" : ", in " + open);
  }

  Mailbox& mailbox_;
  const Membership& group_;
  Attendance& attendance_;
  const FlightRecorder* recorder_;
  std::chrono::milliseconds limit_;
  LimitedWait time_;
  WaitNotice notice_;
  std::unique_ptr<LongWait> talk_;  // once it has lasted
  std::vector<int> missing_;
};

}  // namespace cohort::detail
