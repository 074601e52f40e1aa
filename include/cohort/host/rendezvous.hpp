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
#include <thread>
#include <utility>
#include <vector>

#include "cohort/call_time.hpp"
#include "cohort/control_plane.hpp"
#include "cohort/error.hpp"
#include "cohort/flight_recorder.hpp"
#include "cohort/give_up.hpp"
#include "cohort/host/shared_memory.hpp"
#include "cohort/host/signal_pad.hpp"
#include "cohort/inquiry.hpp"
#include "cohort/joined.hpp"
#include "cohort/owner_process.hpp"
#include "cohort/poll_pause.hpp"
#include "cohort/wait_notice.hpp"

/// \file
/// How the ranks of a group on one machine meet: steps with one signal each way, inbox slots that
/// alternate, and channels between pairs. Every wait ends at the time limit, which the waits of a
/// call share.

namespace cohort::host {

/// The shared memory of one group and this rank's place in it.
///
/// A step: fill the slot, `enter`, then for each peer `await` it and read what it
/// published. Leaving step e (all peers awaited) proves that every peer has entered e and therefore
/// has finished with step e-1. A rank whose own memory was exposed also waits until its peers have
/// finished reading (`await_readers`), because its caller may write there next.
class Rendezvous {
 public:
  /// @param pads  Every rank's memory file, by rank; the own one holds a constructed head.
  Rendezvous(std::vector<std::shared_ptr<SharedMemory>> pads, const PadGeometry& geometry, int rank,
             std::string group, std::chrono::milliseconds limit)
      : pads_(std::move(pads)),
        geometry_(geometry),
        rank_(rank),
        group_(std::move(group)),
        limit_(limit),
        own_(pads_[index(rank)]->data()) {
    for (const auto& pad : pads_) {
      peers_.push_back(pad->data());
    }
    // With fewer processors than ranks, whoever is waited for is likely not running.
    spins_ = size() <= processors() ? kSpins : 1;
  }
  Rendezvous(const Rendezvous&) = delete;
  Rendezvous& operator=(const Rendezvous&) = delete;
  ~Rendezvous() {
    if (!owner_.is_here()) {
      return;
    }
    auto expected = Presence::here;
    pad(rank_).presence.compare_exchange_strong(expected, Presence::left,
                                                std::memory_order_release);
  }

  /// Constructs the head of a rank's own memory file, before any peer knows of it.
  static void construct(SharedMemory& memory, const PadGeometry& geometry) {
    auto* pad = new (memory.data()) SignalPad;
    if (sched_getaffinity(0, sizeof(pad->processors), &pad->processors) != 0) {
      CPU_ZERO(&pad->processors);  // more processors than a set holds
    }
    for (int r = 0; r < geometry.ranks; ++r) {
      new (memory.data() + geometry.channel_ends() + index(r) * sizeof(ChannelEnd)) ChannelEnd;
    }
    // A ring begins as the zeros that are there; its pages are taken as it fills.
  }

  [[nodiscard]] int rank() const noexcept { return rank_; }
  [[nodiscard]] int size() const noexcept { return static_cast<int>(peers_.size()); }
  [[nodiscard]] std::size_t slot_bytes() const noexcept { return geometry_.slot_bytes; }
  [[nodiscard]] const std::string& group() const noexcept { return group_; }
  /// Processors on which the ranks may run, all together: a launcher may bind each rank to one of
  /// its own, or a container all to the same.
  [[nodiscard]] int processors() const noexcept {
    cpu_set_t all;
    CPU_ZERO(&all);
    for (int r = 0; r < size(); ++r) {
      if (CPU_COUNT(&pad(r).processors) == 0) {
        return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
      }
      CPU_OR(&all, &all, &pad(r).processors);
    }
    return CPU_COUNT(&all);
  }

  /// Every rank's records.
  [[nodiscard]] TraceRings trace_rings() const {
    TraceRings rings{.keep = std::make_shared<std::vector<std::shared_ptr<SharedMemory>>>(pads_)};
    for (std::byte* const memory : peers_) {
      rings.by_rank.push_back(
          std::launder(reinterpret_cast<TraceRing*>(memory + geometry_.trace())));
    }
    return rings;
  }

  /// Throws `TransportError` if an earlier call ended in an error that left the ranks apart, and
  /// `UsageError` in a forked child.
  void check_usable(std::string_view call) const {
    owner_.check(group_);
    if (failed()) {
      throw TransportError({.call = std::string(call), .rank = rank_, .group = group_},
                           "an earlier call of this group failed; form the group anew");
    }
  }

  /// From here on the group has one end: what a rank says that leaves over `control` ends the waits
  /// here as well, and who leaves here leaves there. `control` outlives this.
  void end_with(ControlPlane& control) noexcept { control_ = &control; }

  /// Any thread.
  [[nodiscard]] bool failed() const noexcept {
    return poisoned_.load(std::memory_order_relaxed) ||
           (control_ != nullptr && control_->poisoned());
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
    const Farewell& own = pad(rank_).farewell;
    if (presence_of(rank_) != Presence::gave_up || own.bytes == 0) {
      return std::nullopt;
    }
    return cohort::detail::GiveUp::deserialize(reason_of(own));
  }
  /// Gives up because of an error of this rank, and throws it.
  template <class Error>
  [[noreturn]] void fail(const Error& error) {
    give_up(cohort::detail::GiveUp::because(std::make_exception_ptr(error), rank_));
    throw error;
  }

  /// Throws why a peer has ended its part in the group after an error, here or over the control
  /// plane.
  void check_peers() {
    for (int r = 0; r < size(); ++r) {
      if (const auto presence = presence_of(r); r != rank_ && presence == Presence::gave_up) {
        fail_departed(r, presence);
      }
    }
    if (control_ != nullptr) {
      fail_if_told();
    }
  }

  // Steps.

  /// The slot of the step that `enter` will begin.
  [[nodiscard]] std::byte* next_slot() noexcept { return own_ + geometry_.slot(epoch_ + 1); }

  /// Begins the next step: publishes the call, where this rank's tensors are, and the slot.
  /// The ticket is written last and at once, because peers that wait poll its line.
  void enter(const Call& call, const Showing& showing) noexcept {
    ++epoch_;
    operation_ = call.operation;
    Ticket& ticket = pad(rank_).tickets[epoch_ % 2];
    ticket.call = call;
    ticket.place = showing.place;
    if (showing.place == Place::direct) {
      ticket.dense = showing.dense;
      ticket.first_window = showing.first.window;
      ticket.first_offset = showing.first.offset;
      ticket.second = showing.second;
      if (!showing.dense) {
        ticket.strides = showing.strides;
      }
    }
    // Release: pairs with the acquire of `has_entered`.
    ticket.epoch.store(epoch_, std::memory_order_release);
  }

  /// Begins a further step of the same call; its ticket says nothing but that.
  void enter() noexcept {
    ++epoch_;
    pad(rank_).tickets[epoch_ % 2].epoch.store(epoch_, std::memory_order_release);
  }

  /// Waits until a peer has entered the current step. Throws what the first rank that gave up did,
  /// where one has; also where the peer has since, because this rank would go on alone.
  const Ticket& await(int peer) {
    const Ticket& ticket = ticket_of(peer);
    wait([&] { return has_entered(ticket); }, [&](int r) { return has_entered(ticket_of(r)); },
         peer, to_string(operation_));
    if (const auto presence = presence_of(peer); presence == Presence::gave_up) {
      fail_departed(peer, presence);
    }
    return ticket;
  }

  void await_all() {
    for (int r = 0; r < size(); ++r) {
      if (r != rank_) {
        await(r);
      }
    }
  }

  /// Of the current step; to be read after `await(peer)`.
  [[nodiscard]] const Ticket& ticket_of(int peer) const noexcept {
    return pad(peer).tickets[epoch_ % 2];
  }
  [[nodiscard]] const std::byte* slot_of(int peer) const noexcept {
    return peers_[index(peer)] + geometry_.slot(epoch_);
  }

  /// After reading a peer's exposed tensors: throws if the peer stopped waiting for its readers
  /// meanwhile, or before, so that its caller may have written there.
  void check_still_exposed(int peer) {
    // Orders the loads of the tensors before that of the word; pairs with the fence of `leave`.
    std::atomic_thread_fence(std::memory_order_acquire);
    if (const auto presence = presence_of(peer); presence != Presence::here) {
      fail_departed(peer, presence);
    }
  }

  /// This rank has finished reading its peers' exposed tensors of this call.
  void finish_reading() noexcept {
    // Release orders the loads before it: a peer that acquires this may overwrite what was read.
    pad(rank_).finished.store(epoch_, std::memory_order_release);
  }
  /// Waits until every peer has called `finish_reading` in the current step.
  void await_readers() {
    for (int peer = 0; peer < size(); ++peer) {
      const auto finished = [&](int r) {
        return r == rank_ || pad(r).finished.load(std::memory_order_acquire) >= epoch_;
      };
      wait([&] { return finished(peer); }, finished, peer, "the end of its reading");
    }
  }

  /// Throws `SymmetryError` with the same words on every rank unless all ranks of the current step
  /// make the same call. Every ticket of the step has been awaited.
  void fail_unless_same() const;

  // Channels.

  /// Sends a message. Waits only where more than `kParcels` parcels are not taken yet. Throws where
  /// the peer has left, here or over the control plane, so would never take it.
  /// `fill(first, bytes, to)` writes a piece of the message.
  template <class Fill>
  void send(int to, const Message& message, const Fill& fill) {
    if (control_ != nullptr) {
      fail_if_told();
    }
    auto& sent = channel(rank_, to).sent;
    const auto& taken = channel(to, rank_).received;
    std::size_t first = 0;
    do {
      if (const auto presence = presence_of(to); presence != Presence::here) {
        fail_departed(to, presence);
      }
      const std::uint64_t number = sent.load(std::memory_order_relaxed);
      const auto room = [&] {  // acquire: the receiver has read the parcel that lay here
        return number < taken.load(std::memory_order_acquire) + kParcels;
      };
      wait(
          room, [&](int r) { return r != to || room(); }, to, "recv");
      std::byte* parcel = own_ + geometry_.parcel(to, number);
      const std::size_t piece = std::min(message.bytes - first, kParcelBytes);
      new (parcel) ParcelHeader{message, first};
      fill(first, piece, parcel + sizeof(ParcelHeader));
      sent.store(number + 1, std::memory_order_release);
      first += piece;
    } while (first < message.bytes);
  }

  /// Receives the next message of a peer; `take(first, bytes, from)` reads a piece of it. Throws
  /// `SymmetryError` where it is another than `expected`, after taking it off the channel.
  template <class Take>
  void receive(int from, const Message& expected, const Take& take) {
    const auto& sent = channel(from, rank_).sent;
    auto& taken = channel(rank_, from).received;
    std::size_t first = 0;
    Message message;
    do {
      const std::uint64_t number = taken.load(std::memory_order_relaxed);
      const auto arrived = [&] { return sent.load(std::memory_order_acquire) > number; };
      wait(
          arrived, [&](int r) { return r != from || arrived(); }, from, "send");
      const std::byte* parcel = peers_[index(from)] + geometry_.parcel(rank_, number);
      const ParcelHeader header = *reinterpret_cast<const ParcelHeader*>(parcel);
      if (header.first != first || (first != 0 && header.message != message)) {
        fail_channel(from, header, first);
      }
      message = header.message;
      const std::size_t piece = std::min(message.bytes - first, kParcelBytes);
      if (is_expected(message, expected, compares_shapes_)) {
        take(first, piece, parcel + sizeof(ParcelHeader));
      }
      taken.store(number + 1, std::memory_order_release);
      first += piece;
    } while (first < message.bytes);
    if (!is_expected(message, expected, compares_shapes_)) {
      fail_message(message, expected, group_, from, rank_);
    }
  }
  /// From here on `receive` compares shapes as well.
  void compare_shapes() noexcept { compares_shapes_ = true; }

 private:
  // A peer that runs answers within a few µs; 300 pauses are about 4 µs on Zen 4 and 13 µs on
  // Skylake and later, whose pause takes 140 cycles (Intel's optimization reference manual, 2.5.4).
  static constexpr int kSpins = 300;
  // How often a wait looks whether a rank has left over the control plane.
  static constexpr std::chrono::milliseconds kLookEvery{5};
  // After this long nobody is about to come; polling then leaves the processor to others.
  static constexpr std::chrono::milliseconds kYieldFor{200};

  static std::size_t index(int rank) noexcept { return static_cast<std::size_t>(rank); }

  [[nodiscard]] SignalPad& pad(int r) const noexcept {
    return *std::launder(reinterpret_cast<SignalPad*>(peers_[index(r)]));
  }
  [[nodiscard]] ChannelEnd& channel(int owner, int peer) const noexcept {
    return *std::launder(reinterpret_cast<ChannelEnd*>(
        peers_[index(owner)] + geometry_.channel_ends() + index(peer) * sizeof(ChannelEnd)));
  }
  [[nodiscard]] Presence presence_of(int r) const noexcept {
    return pad(r).presence.load(std::memory_order_acquire);
  }
  [[nodiscard]] bool has_entered(const Ticket& ticket) const noexcept {
    return ticket.epoch.load(std::memory_order_acquire) >= epoch_;
  }

  /// @param ready    Whether the wait is over.
  /// @param arrived  rank -> whether that rank is not to blame; asked when the wait fails.
  /// @param peer     Whom the wait is for.
  /// @param what     Where it is to come to, for messages.
  template <class Ready, class Arrived>
  void wait(const Ready& ready, const Arrived& arrived, int peer, std::string_view what) {
    for (int i = 0; i < spins_; ++i) {
      if (ready()) {
        return;
      }
      cohort::detail::relax();
    }
    wait_long(ready, arrived, peer, what);
  }

  template <class Ready, class Arrived>
  [[gnu::noinline]] void wait_long(const Ready& ready, const Arrived& arrived, int peer,
                                   std::string_view what) {
    const cohort::detail::LimitedWait time(limit_);
    cohort::detail::WaitNotice notice(time.start(), time.deadline() - time.start());
    cohort::detail::PollPause pause(kYieldFor, 0);  // `wait` has spun
    std::unique_ptr<cohort::detail::LongWait> talk;
    auto next_look = time.start() + kLookEvery;
    int other = rank_;
    while (true) {
      const auto now = Clock::now();  // before the look: this thread may not run in between
      if (ready()) {
        return;
      }
      other = other + 1 < size() ? other + 1 : 0;  // one at a time: each look costs the same
      for (const int r : {peer, other}) {
        const auto presence = presence_of(r);
        if (presence == Presence::here) {
          continue;
        }
        if (ready()) {  // after the look at the rank: the peer may have come before that left
          return;
        }
        if (presence == Presence::gave_up || !arrived(r)) {  // others may leave when they are done
          fail_departed(r, presence);
        }
      }
      const bool is_late = now > time.deadline();
      const bool looks = control_ != nullptr && now >= next_look;
      if (looks) {
        next_look = is_late ? now + kLookEvery : std::min(now + kLookEvery, time.deadline());
        fail_if_told();
        if (talk == nullptr) {
          talk = control_->begin_long_wait(time, limit_);
        }
        if (talk != nullptr) {
          talk->look([&] { return missing_ranks(arrived); });
        }
      }
      if (is_late && (talk == nullptr || looks)) {
        const auto missing = missing_ranks(arrived);
        if (missing.empty()) {
          return;  // in this very moment
        }
        if (talk == nullptr || now > time.latest() || talk->is_settled(missing)) {
          fail_late(missing, talk.get(), time);
        }
      }
      notice.say(now, [&] {
        return fmt::format("group {}: rank {} has waited for rank {} to come to {}, step {}",
                           group_, rank_, cohort::detail::joined(missing_ranks(arrived), ", "),
                           what, epoch_);
      });
      pause();
    }
  }

  template <class Arrived>
  [[nodiscard]] std::vector<int> missing_ranks(const Arrived& arrived) const {
    std::vector<int> missing;
    for (int r = 0; r < size(); ++r) {
      if (!arrived(r)) {
        missing.push_back(r);
      }
    }
    return missing;
  }

  /// Throws what a rank said, or a thread of this one, that has left over the control plane.
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

  [[noreturn]] void fail_late(const std::vector<int>& missing, cohort::detail::LongWait* talk,
                              const cohort::detail::LimitedWait& time) {
    const std::vector<int> blamed = talk != nullptr ? talk->at_fault(missing) : missing;
    fail(TimeoutError(
        fmt::format("step {} of group {} ({} ranks): rank {} did not arrive within {}{}", epoch_,
                    group_, size(), cohort::detail::joined(blamed, ", "), time.describe(limit_),
                    cohort::detail::waiting_themselves(missing, blamed)),
        blamed));
  }

  [[noreturn]] void fail_channel(int from, const ParcelHeader& header, std::size_t first) {
    fail(TransportError({.call = "recv", .rank = rank_, .group = group_},
                        fmt::format("byte {} of a message of rank {} was to come, byte {} of {} "
                                    "did",
                                    first, from, header.first, header.message.bytes)));
  }

  /// Because a rank is not there any more. What that one said is passed on as it is, so that every
  /// rank throws the first cause, whoever found it.
  [[noreturn]] void fail_departed(int peer, Presence presence) {
    const Farewell& theirs = pad(peer).farewell;
    if (presence == Presence::left || theirs.bytes == 0) {
      const TransportError gone(
          {.call = "wait", .rank = rank_, .group = group_},
          fmt::format("rank {} {}", peer,
                      presence == Presence::left ? "has destroyed its transport"
                                                 : "gave up after an error of its own"));
      auto why = cohort::detail::GiveUp::because(std::make_exception_ptr(gone), rank_);
      why.ranks = {peer};
      give_up(why);
      throw gone;
    }
    leave(theirs);
    cohort::detail::GiveUp::deserialize(reason_of(theirs)).raise("wait", group_);
  }

  static std::span<const std::byte> reason_of(const Farewell& said) noexcept {
    return std::span(said.reason).first(std::min<std::size_t>(said.bytes, said.reason.size()));
  }

  void leave(const Farewell& farewell) noexcept {
    if (!owner_.is_here() || poisoned_.exchange(true)) {
      return;
    }
    pad(rank_).farewell = farewell;
    pad(rank_).presence.store(Presence::gave_up, std::memory_order_release);
    // The caller may write where peers still read. Whoever sees that sees the word above as well:
    // pairs with the fence of `check_still_exposed`.
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
  std::vector<std::shared_ptr<SharedMemory>> pads_;
  PadGeometry geometry_;
  int rank_;
  std::string group_;
  std::chrono::milliseconds limit_;
  std::byte* own_;
  std::vector<std::byte*> peers_;
  int spins_ = kSpins;
  std::uint64_t epoch_ = 0;
  Operation operation_ = Operation::barrier;  // of the current step
  std::atomic<bool> poisoned_{false};
  bool compares_shapes_ = false;
  ControlPlane* control_ = nullptr;  // null where the group has none
};

inline void Rendezvous::fail_unless_same() const {
  host::fail_unless_same(
      size(), [this](int r) -> const Call& { return ticket_of(r).call; },
      [this] { return fmt::format("step {} of group {}", epoch_, group_); });
}

}  // namespace cohort::host
