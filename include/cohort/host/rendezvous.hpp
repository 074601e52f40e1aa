// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cohort/error.hpp"
#include "cohort/host/departure.hpp"
#include "cohort/host/group_pads.hpp"
#include "cohort/host/pad_wait.hpp"
#include "cohort/host/shared_memory.hpp"
#include "cohort/host/signal_pad.hpp"
#include "cohort/host/slot_copy.hpp"
#include "cohort/poll_pause.hpp"

/// \file
/// How the ranks of a group on one machine meet: steps with one signal each way, inbox slots that
/// alternate, and channels between pairs.

namespace cohort::host {

/// The shared memory of one group and this rank's place in it.
///
/// A step: fill the slot, `enter`, then for each peer `await` it and read what it
/// published. Leaving step e (all peers awaited) proves that every peer has entered e and therefore
/// has finished with step e-1. A rank whose own memory was exposed also waits until its peers have
/// finished reading (`await_readers`), because its caller may write there next.
class Rendezvous {
 public:
  /// @param files  Every rank's memory file, by rank; the own one holds a constructed head.
  Rendezvous(std::vector<std::shared_ptr<SharedMemory>> files, const PadGeometry& geometry,
             int rank, std::string group, std::chrono::milliseconds limit)
      : pads_(std::move(files), geometry, rank),
        departure_(pads_, std::move(group)),
        waits_(pads_, departure_, limit) {}

  [[nodiscard]] int rank() const noexcept { return pads_.rank(); }
  [[nodiscard]] int size() const noexcept { return pads_.size(); }
  /// Where the ranks meet.
  [[nodiscard]] const GroupPads& pads() const noexcept { return pads_; }
  /// How this rank leaves, and who has.
  [[nodiscard]] Departure& departure() noexcept { return departure_; }
  [[nodiscard]] const Departure& departure() const noexcept { return departure_; }

  // Steps.

  /// The slot of the step that `enter` will begin.
  [[nodiscard]] std::byte* next_slot() noexcept { return pads_.own_slot(epoch_ + 1); }

  /// Begins the next step: publishes the call, where this rank's tensors are, and the slot.
  /// The ticket is written last and at once, because peers that wait poll its line.
  void enter(const Call& call, const Showing& showing) noexcept {
    ++epoch_;
    operation_ = call.operation;
    Ticket& ticket = pads_.own_head().tickets[epoch_ % 2];
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
    pads_.own_head().tickets[epoch_ % 2].epoch.store(epoch_, std::memory_order_release);
  }

  /// Waits until a peer has entered the current step. Throws what the first rank that gave up did,
  /// where one has; also where the peer has since, because this rank would go on alone.
  const Ticket& await(int peer) {
    const Ticket& ticket = ticket_of(peer);
    waits_.wait([&] { return has_entered(ticket); },
                [&](int r) { return has_entered(ticket_of(r)); }, peer,
                [this] { return meeting_at(to_string(operation_)); });
    if (const auto presence = pads_.presence_of(peer); presence == Presence::gave_up) {
      departure_.fail_departed(peer, presence);
    }
    return ticket;
  }

  void await_all() {
    for (int r = 0; r < size(); ++r) {
      if (r != rank()) {
        await(r);
      }
    }
  }

  /// Once all have entered the current step, before what they have published is read: has the
  /// processor fetch what the next step writes, the ticket and the slot's first bytes. Peers had
  /// them in their caches last, and they would otherwise be asked for line by line as they are
  /// filled. Beyond `kPrepared` bytes it is in the way of what is read; and nothing is asked for
  /// where the copy into the slot does not wait for it.
  /// @param bytes  That the next step is likely to fill: as many as this one has.
  void prepare_next(std::size_t bytes) noexcept {
    if (bytes <= kPrepared && waits_for_lines(bytes)) {
      cohort::detail::fetch_to_write(&pads_.own_head().tickets[(epoch_ + 1) % 2]);
      const std::byte* const slot = next_slot();
      for (std::size_t line = 0; line < bytes; line += 64) {
        cohort::detail::fetch_to_write(slot + line);
      }
    }
  }

  /// Of the current step; to be read after `await(peer)`.
  [[nodiscard]] const Ticket& ticket_of(int peer) const noexcept {
    return pads_.head(peer).tickets[epoch_ % 2];
  }
  [[nodiscard]] const std::byte* slot_of(int peer) const noexcept {
    return pads_.slot_of(peer, epoch_);
  }

  /// After reading a peer's exposed tensors: throws if the peer stopped waiting for its readers
  /// meanwhile, or before, so that its caller may have written there.
  void check_still_exposed(int peer) {
    // Orders the loads of the tensors before that of the word; pairs with the fence of `Departure`.
    std::atomic_thread_fence(std::memory_order_acquire);
    if (const auto presence = pads_.presence_of(peer); presence != Presence::here) {
      departure_.fail_departed(peer, presence);
    }
  }

  /// This rank has finished reading its peers' exposed tensors of this call.
  void finish_reading() noexcept {
    // Release orders the loads before it: a peer that acquires this may overwrite what was read.
    pads_.own_head().finished.store(epoch_, std::memory_order_release);
  }
  /// Waits until every peer has called `finish_reading` in the current step.
  void await_readers() {
    for (int peer = 0; peer < size(); ++peer) {
      const auto finished = [&](int r) {
        return r == rank() || pads_.head(r).finished.load(std::memory_order_acquire) >= epoch_;
      };
      waits_.wait([&] { return finished(peer); }, finished, peer,
                  [this] { return meeting_at("the end of its reading"); });
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
    if (departure_.has_control()) {
      departure_.fail_if_told();
    }
    auto& sent = pads_.channel(rank(), to).sent;
    const auto& taken = pads_.channel(to, rank()).received;
    std::size_t first = 0;
    do {
      if (const auto presence = pads_.presence_of(to); presence != Presence::here) {
        departure_.fail_departed(to, presence);
      }
      const std::uint64_t number = sent.load(std::memory_order_relaxed);
      const auto room = [&] {  // acquire: the receiver has read the parcel that lay here
        return number < taken.load(std::memory_order_acquire) + kParcels;
      };
      waits_.wait(
          room, [&](int r) { return r != to || room(); }, to,
          [this] { return meeting_at("recv"); });
      std::byte* parcel = pads_.own_parcel(to, number);
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
    const auto& sent = pads_.channel(from, rank()).sent;
    auto& taken = pads_.channel(rank(), from).received;
    std::size_t first = 0;
    Message message;
    do {
      const std::uint64_t number = taken.load(std::memory_order_relaxed);
      const auto arrived = [&] { return sent.load(std::memory_order_acquire) > number; };
      waits_.wait(
          arrived, [&](int r) { return r != from || arrived(); }, from,
          [this] { return meeting_at("send"); });
      const std::byte* parcel = pads_.parcel_of(from, number);
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
      fail_message(message, expected, departure_.group(), from, rank());
    }
  }
  /// From here on `receive` compares shapes as well.
  void compare_shapes() noexcept { compares_shapes_ = true; }

 private:
  static constexpr std::size_t kPrepared = 16 * 1024;

  [[nodiscard]] bool has_entered(const Ticket& ticket) const noexcept {
    return ticket.epoch.load(std::memory_order_acquire) >= epoch_;
  }

  [[nodiscard]] PadWait::Meeting meeting_at(std::string_view place) const noexcept {
    return {place, epoch_};
  }

  [[noreturn]] void fail_channel(int from, const ParcelHeader& header, std::size_t first) {
    departure_.fail(
        TransportError({.call = "recv", .rank = rank(), .group = departure_.group()},
                       fmt::format("byte {} of a message of rank {} was to come, byte {} of {} "
                                   "did",
                                   first, from, header.first, header.message.bytes)));
  }

  GroupPads pads_;
  Departure departure_;
  PadWait waits_;
  std::uint64_t epoch_ = 0;
  Operation operation_ = Operation::barrier;  // of the current step
  bool compares_shapes_ = false;
};

inline void Rendezvous::fail_unless_same() const {
  host::fail_unless_same(
      size(), [this](int r) -> const Call& { return ticket_of(r).call; },
      [this] { return fmt::format("step {} of group {}", epoch_, departure_.group()); });
}

}  // namespace cohort::host
