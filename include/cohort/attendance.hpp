// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>

#include "cohort/control_frame.hpp"
#include "cohort/error.hpp"
#include "cohort/give_up.hpp"
#include "cohort/joined.hpp"
#include "cohort/log.hpp"
#include "cohort/mailbox.hpp"
#include "cohort/membership.hpp"
#include "cohort/messenger.hpp"
#include "cohort/notice_board.hpp"

/// \file
/// How far a rank has come in the calls of a control plane's group, and how it leaves: with a cause
/// that it tells the others, with what another told, or in good order.

namespace cohort::detail {

/// This rank's part in a group. Its calls are made by one thread at a time; any may leave, or look
/// who has, meanwhile. Lives no longer than what it is made of.
class Attendance {
 public:
  Attendance(Mailbox& mailbox, const Membership& group) noexcept
      : mailbox_(mailbox), group_(group) {}

  /// Whether this rank has left because of an error, so that no call works any more.
  [[nodiscard]] bool has_left() const noexcept { return (progress_.load() & kLeft) != 0; }

  /// Throws `UsageError` in a forked child, and `TransportError` where this rank has left.
  void check(ControlCall call) const {
    mailbox_.owner().check(group_.name());
    if (has_left()) {
      throw TransportError(site(call),
                           "an earlier call of this control plane failed, so its ranks are no "
                           "longer in step; form a new group");
    }
  }

  /// A collective call begins: what its messages carry. Throws as `check`.
  [[nodiscard]] FrameTrailer begin(ControlCall call) const {
    check(call);
    return {group_.channel(), call, static_cast<std::uint32_t>(progress_.load())};
  }

  /// Whatever ends a call early leaves the ranks out of step, so this one leaves the group, and
  /// tells so. Ranks that disagree are still there to take what was sent to them.
  /// @param excuse  What the others are told, and the error itself where it is null.
  template <class Call>
  std::invoke_result_t<Call&> leave_on_error(const GiveUp* excuse, Call&& call) {
    const auto tell = [&](const std::exception_ptr& error) {
      leave([&] { return excuse != nullptr ? excuse->serialize() : said_or_own(error); });
    };
    try {
      return call();
    } catch (const SymmetryError&) {
      tell(std::current_exception());
      throw;
    } catch (const PeerLeft&) {
      tell(std::current_exception());
      mailbox_.abandon();
      throw;
    } catch (const TransportError& error) {
      const auto here = std::make_exception_ptr(of_this_group(error));
      tell(here);
      mailbox_.abandon();
      std::rethrow_exception(here);
    } catch (const std::exception&) {
      tell(std::current_exception());
      mailbox_.abandon();
      throw;
    }
  }

  /// Ends a call on this rank, unless another of its threads has left the group meanwhile: the
  /// others have been told then that it did not finish this call.
  void finish(const FrameTrailer& trailer) {
    std::uint64_t before = trailer.sequence;
    const bool stays = trailer.call == ControlCall::exchange
                           ? !has_left()
                           : progress_.compare_exchange_strong(
                                 before, static_cast<std::uint32_t>(trailer.sequence + 1));
    if (!stays) {
      throw_if_told(trailer.call, watch(trailer, group_.members()));
      throw TransportError(site(trailer.call),
                           "another thread of this rank left the group during the call");
    }
  }

  /// Whose leaving concerns a call.
  [[nodiscard]] Watch watch(const FrameTrailer& trailer,
                            std::span<const int> members) const noexcept {
    const bool numbered = trailer.call != ControlCall::exchange;
    return {group_.channel(), members, numbered ? std::optional(trailer.sequence) : std::nullopt};
  }

  /// Throws what a rank said that has left, of those whom the call concerns, and for one that it
  /// still awaits and that left in good order. Of what the mailbox has taken in.
  void throw_if_told(ControlCall call, const Watch& concern) {
    if (const auto notice = mailbox_.notices().first(concern)) {
      heard_ = true;
      GiveUp::deserialize(notice->reason).raise(to_string(call), group_.name());
    }
    if (const auto left = mailbox_.who_left(call, concern)) {
      fail_left(call, group_.rank_of(*left));
    }
  }
  /// The same at any call, leaving with it: for ranks that wait for each other by other means.
  void leave_if_told() {
    if (!mailbox_.notices().any()) {  // nor is anything awaited that a goodbye would end
      return;
    }
    try {
      throw_if_told(ControlCall::gave_up, {group_.channel(), group_.members(), std::nullopt});
    } catch (const Error&) {
      leave([&] { return said_or_own(std::current_exception()); });
      throw;
    }
  }
  [[noreturn]] void fail_left(ControlCall call, int rank) const {
    throw PeerLeft(site(call), rank);
  }

  /// `ControlPlane::leave_with`.
  void leave_with(const GiveUp& why) noexcept {
    if (mailbox_.owner().is_here()) {
      leave([&] { return why.serialize(); });
    }
  }
  /// `ControlPlane::left_with`.
  [[nodiscard]] std::optional<GiveUp> left_with() const {
    const auto said =
        has_left()
            ? mailbox_.notices().first({group_.channel(), group_.only(group_.rank()), std::nullopt})
            : std::nullopt;
    return said ? std::optional(GiveUp::deserialize(said->reason)) : std::nullopt;
  }
  /// `ControlPlane::when_left`.
  void when_left(std::function<void()> end) {
    const std::lock_guard lock(leaving_mutex_);
    when_left_ = std::move(end);
    if (has_left()) {
      say_left();
    }
  }
  /// `ControlPlane::leave_in_order`, in a group whose channel no later one has.
  void leave_in_order() noexcept {
    if (has_left() || !mailbox_.owner().is_here()) {
      return;
    }
    const FrameTrailer trailer{group_.channel(), ControlCall::left,
                               static_cast<std::uint32_t>(progress_.load())};
    for (int r = 0; r < group_.size(); ++r) {
      try {
        if (r != group_.rank()) {
          mailbox_.send(group_.member(r), trailer, {});
        }
      } catch (const std::exception&) {
        continue;  // whom it cannot tell finds out at the time limit
      }
    }
  }

 private:
  /// Of a rank that left in good order while this one awaits something of it: other groups are told
  /// whose failure it is.
  class PeerLeft : public TransportError {
   public:
    PeerLeft(Site site, int rank)
        : TransportError(std::move(site), fmt::format("rank {} has left the group", rank)),
          peer(rank) {}

    int peer;
  };

  [[nodiscard]] TransportError::Site site(ControlCall call) const {
    return {.call = std::string(to_string(call)), .rank = group_.rank(), .group = group_.name()};
  }

  /// What the messenger throws has its own numbers of the ranks, and no group.
  [[nodiscard]] TransportError of_this_group(const TransportError& error) const {
    if (!error.site().group.empty()) {
      return error;
    }
    return TransportError({.call = error.site().call,
                           .native_code = error.site().native_code,
                           .rank = group_.rank(),
                           .group = group_.name()},
                          fmt::format("the messenger, to which the ranks of the group are {}: {}",
                                      joined(group_.members(), ", "), error.detail()));
  }

  /// What this rank leaves with behind an error: what another said is passed on as it is.
  [[nodiscard]] Bytes said_or_own(const std::exception_ptr& error) {
    const auto said =
        heard_ ? mailbox_.notices().first({group_.channel(), group_.members(), std::nullopt})
               : std::nullopt;
    if (said) {
      return said->reason;
    }
    GiveUp own = GiveUp::because(error, group_.rank());
    try {
      std::rethrow_exception(error);
    } catch (const PeerLeft& left) {
      own.ranks = {left.peer};
    } catch (const std::exception&) {  // blames whom it names, or this rank
    }
    return own.serialize();
  }

  /// Poisons the group and tells the others, and a thread of this rank that is in a call. Whoever
  /// sees that it is poisoned finds the reason.
  template <class Why>
  void leave(const Why& why) noexcept {
    const std::lock_guard lock(leaving_mutex_);  // who leaves second finds the others told
    if (has_left()) {
      return;
    }
    try {
      const Bytes reason = why();
      const bool is_first = mailbox_.notices().note_own(group_.channel(), reason);
      const std::uint64_t before = progress_.fetch_or(kLeft);
      if (is_first) {
        tell(reason, static_cast<std::uint32_t>(before));
      }
    } catch (const std::exception& error) {
      progress_.fetch_or(kLeft);
      log(LogLevel::error, error.what());
    }
    say_left();
  }
  void say_left() {
    if (const auto end = std::exchange(when_left_, nullptr)) {
      end();
    }
  }

  /// The others may be dead, and then there is nobody to tell.
  void tell(const Bytes& reason, std::uint32_t sequence) {
    const FrameTrailer trailer{group_.channel(), ControlCall::gave_up, sequence};
    for (int r = 0; r < group_.size(); ++r) {
      try {
        if (r != group_.rank()) {
          mailbox_.send(group_.member(r), trailer, copy_with_room(reason));
        }
      } catch (const TransportError& error) {
        log(LogLevel::info,
            "group {}: rank {} could not be told that rank {} has "
            "left: {}",
            group_.name(), r, group_.rank(), error.what());
      }
    }
  }

  Mailbox& mailbox_;
  const Membership& group_;
  std::atomic<bool> heard_{false};  // that another rank has left
  static constexpr std::uint64_t kLeft = std::uint64_t{1} << 32;
  // Calls finished, and above them whether this rank has left: in one word, so that what it tells
  // the others is the call under way.
  std::atomic<std::uint64_t> progress_{0};
  std::mutex leaving_mutex_;
  std::function<void()> when_left_;
};

}  // namespace cohort::detail
