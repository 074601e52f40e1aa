// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "cohort/call_time.hpp"
#include "cohort/control_plane.hpp"
#include "cohort/error.hpp"
#include "cohort/give_up.hpp"
#include "cohort/host/group_pads.hpp"
#include "cohort/host/signal_pad.hpp"
#include "cohort/inquiry.hpp"
#include "cohort/owner_process.hpp"

/// \file
/// How a rank leaves a group on one machine, and learns who has: over the pads and, where the group
/// has one, over the control plane.

namespace cohort::host {

/// This rank's end in a group, which has one cause: the first that any rank found. Any thread.
class Departure {
 public:
  /// @param pads  Outlive this.
  Departure(const GroupPads& pads, std::string group) : pads_(pads), group_(std::move(group)) {}
  Departure(const Departure&) = delete;
  Departure& operator=(const Departure&) = delete;
  ~Departure() {
    if (!owner_.is_here()) {
      return;
    }
    auto expected = Presence::here;
    pads_.own_head().presence.compare_exchange_strong(expected, Presence::left,
                                                      std::memory_order_release);
  }

  [[nodiscard]] const std::string& group() const noexcept { return group_; }

  /// From here on the group has one end: what a rank says that leaves over `control` ends the waits
  /// here as well, and who leaves here leaves there. `control` outlives this.
  void end_with(ControlPlane& control) noexcept { control_ = &control; }
  /// Whether that holds.
  [[nodiscard]] bool has_control() const noexcept { return control_ != nullptr; }
  /// `ControlPlane::begin_long_wait`, where there is one.
  [[nodiscard]] std::unique_ptr<cohort::detail::LongWait> begin_long_wait(
      const cohort::detail::LimitedWait& time, std::chrono::milliseconds limit) const noexcept {
    return control_->begin_long_wait(time, limit);
  }

  [[nodiscard]] bool failed() const noexcept {
    return poisoned_.load(std::memory_order_relaxed) ||
           (control_ != nullptr && control_->poisoned());
  }
  /// Throws `TransportError` if an earlier call ended in an error that left the ranks apart, and
  /// `UsageError` in a forked child.
  void check_usable(std::string_view call) const {
    owner_.check(group_);
    if (failed()) {
      throw TransportError({.call = std::string(call), .rank = pads_.rank(), .group = group_},
                           "an earlier call of this group failed; form the group anew");
    }
  }

  /// No later call can work: the ranks are not at the same step. Peers that wait for anyone in the
  /// group learn why instead of waiting for the time limit. Nothing happens where this rank has
  /// left already: the first cause stays.
  void give_up(const cohort::detail::GiveUp& why) noexcept {
    Farewell farewell;
    try {
      const auto reason = why.serialize();
      const auto bytes = std::min(reason.size(), farewell.reason.size());
      std::copy_n(reason.begin(), bytes, farewell.reason.begin());
      farewell.bytes = why.text.empty() ? 0 : static_cast<std::uint32_t>(bytes);
    } catch (const std::bad_alloc&) {
      farewell.bytes = 0;
    }
    leave(farewell);
  }
  /// What this rank has given up with: the first cause, where another said it. Nothing before, and
  /// where there was no memory for it.
  [[nodiscard]] std::optional<cohort::detail::GiveUp> left_with() const {
    const Farewell& own = pads_.own_head().farewell;
    if (pads_.presence_of(pads_.rank()) != Presence::gave_up || own.bytes == 0) {
      return std::nullopt;
    }
    return cohort::detail::GiveUp::deserialize(reason_of(own));
  }
  /// Gives up because of an error of this rank, and throws it.
  template <class Error>
  [[noreturn]] void fail(const Error& error) {
    fail_with(std::make_exception_ptr(error));
  }
  [[noreturn]] void fail_with(const std::exception_ptr& error) {
    give_up(cohort::detail::GiveUp::because(error, pads_.rank()));
    std::rethrow_exception(error);
  }

  /// Throws why a peer has ended its part in the group after an error, here or over the control
  /// plane.
  void check_peers() {
    for (int r = 0; r < pads_.size(); ++r) {
      if (const auto presence = pads_.presence_of(r);
          r != pads_.rank() && presence == Presence::gave_up) {
        fail_departed(r, presence);
      }
    }
    if (control_ != nullptr) {
      fail_if_told();
    }
  }

  /// Throws what a rank said, or a thread of this one, that has left over the control plane, which
  /// there is.
  void fail_if_told() {
    try {
      control_->check_peers(PeerLook::lately);
    } catch (const std::exception&) {  // it has left with what it heard, or looks again
    }
    if (!control_->poisoned()) {
      return;
    }
    cohort::detail::GiveUp why;
    try {
      why = control_->left_with().value_or(why);
    } catch (const std::bad_alloc&) {
      why = {};  // no memory for the reason
    }
    give_up(why);
    why.raise("wait", group_);
  }

  /// Because a rank is not there any more. What that one said is passed on as it is, so that every
  /// rank throws the first cause, whoever found it.
  [[noreturn]] void fail_departed(int peer, Presence presence) {
    const Farewell& theirs = pads_.head(peer).farewell;
    if (presence == Presence::left || theirs.bytes == 0) {
      const TransportError gone(
          {.call = "wait", .rank = pads_.rank(), .group = group_},
          fmt::format("rank {} {}", peer,
                      presence == Presence::left ? "has destroyed its transport"
                                                 : "gave up after an error of its own"));
      auto why = cohort::detail::GiveUp::because(std::make_exception_ptr(gone), pads_.rank());
      why.ranks = {peer};
      give_up(why);
      throw gone;
    }
    leave(theirs);
    cohort::detail::GiveUp::deserialize(reason_of(theirs)).raise("wait", group_);
  }

 private:
  static std::span<const std::byte> reason_of(const Farewell& said) noexcept {
    return std::span(said.reason).first(std::min<std::size_t>(said.bytes, said.reason.size()));
  }

  void leave(const Farewell& farewell) noexcept {
    if (!owner_.is_here() || poisoned_.exchange(true)) {
      return;
    }
    pads_.own_head().farewell = farewell;
    pads_.own_head().presence.store(Presence::gave_up, std::memory_order_release);
    // The caller may write where peers still read. Whoever sees that sees the word above as well:
    // pairs with the fence of `Rendezvous::check_still_exposed`.
    std::atomic_thread_fence(std::memory_order_release);
    if (control_ != nullptr) {
      leave_control(farewell);
    }
  }

  void leave_control(const Farewell& farewell) noexcept try {
    control_->leave_with(farewell.bytes == 0
                             ? cohort::detail::GiveUp{}
                             : cohort::detail::GiveUp::deserialize(reason_of(farewell)));
  } catch (const std::exception&) {
    control_->leave_with({});  // no memory for the reason
  }

  OwnerProcess owner_;
  const GroupPads& pads_;
  std::string group_;
  std::atomic<bool> poisoned_{false};
  ControlPlane* control_ = nullptr;  // null where the group has none
};

}  // namespace cohort::host
