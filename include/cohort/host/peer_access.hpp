// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "cohort/error.hpp"
#include "cohort/host/rendezvous.hpp"
#include "cohort/host/signal_pad.hpp"
#include "cohort/host/slot_sizes.hpp"
#include "cohort/host/strided.hpp"
#include "cohort/host/window.hpp"

/// \file
/// How a call shows this rank's tensor to the peers, and finds theirs.

namespace cohort::host {

/// The rendezvous of a group with its windows; what the collectives and the peer kernels share.
class PeerAccess {
 public:
  /// @param window_bytes  `HostOptions::window_bytes`.
  PeerAccess(std::unique_ptr<Rendezvous> meeting, std::shared_ptr<WindowTable> windows,
             std::size_t window_bytes = kWindowBytes)
      : meeting_(std::move(meeting)), windows_(std::move(windows)), window_bytes_(window_bytes) {
    read_.reserve(2 * static_cast<std::size_t>(size()));
  }

  [[nodiscard]] Rendezvous& meeting() noexcept { return *meeting_; }
  [[nodiscard]] const Rendezvous& meeting() const noexcept { return *meeting_; }
  [[nodiscard]] int rank() const noexcept { return meeting_->rank(); }
  [[nodiscard]] int size() const noexcept { return meeting_->size(); }

  /// Bytes that a call may put into a slot at a time.
  [[nodiscard]] std::size_t piece_bytes() const noexcept {
    return piece_in_slot(meeting_->pads().slot_bytes());
  }

  /// The window that the view lies in.
  template <class Void>
  [[nodiscard]] std::optional<WindowOffset> window_of(
      const BasicTensorView<Void>& view) const noexcept {
    return windows_->find(view);
  }
  /// Whether peers read a tensor of so many bytes in its window, if it lies in one, or parts of so
  /// many.
  [[nodiscard]] bool reads_windows(std::size_t bytes) const noexcept {
    return is_read_in_window(bytes, window_bytes_);
  }
  [[nodiscard]] bool reads_parts(std::size_t bytes) const noexcept {
    return are_parts_read_in_window(bytes, window_bytes_);
  }

  /// How peers find `view`: in its window, if it lies in one and they are to read it there, or in
  /// the slot, which the caller then fills.
  template <class Void>
  [[nodiscard]] Showing show(const BasicTensorView<Void>& view, bool reads_window) const noexcept {
    Showing showing;
    showing.place = Place::slot;
    if (const auto where = reads_window ? window_of(view) : std::nullopt) {
      showing.place = Place::direct;
      showing.first = *where;
      showing.dense = view.is_contiguous();
      if (!showing.dense) {
        std::copy(view.strides().begin(), view.strides().end(), showing.strides.begin());
      }
    }
    return showing;
  }

  /// Waits for a peer's ticket. Throws `SymmetryError` on every rank where the calls differ.
  const Ticket& await(int peer, const Call& call) {
    const Ticket& ticket = meeting_->await(peer);
    if (!(ticket.call == call)) {
      read_.clear();  // of no use to anyone: every rank throws
      meeting_->await_all();
      meeting_->fail_unless_same();
    }
    return ticket;
  }

  void await_all(const Call& call) {
    for (int r = 0; r < size(); ++r) {
      if (r != rank()) {
        await(r, call);
      }
    }
  }

  /// A peer's memory at a window's offset, to be read until `finish` or `confirm_read`.
  [[nodiscard]] const std::byte* peer_memory(const WindowOffset& where, int peer) {
    const std::byte* memory = windows_->at(where, peer);
    if (memory == nullptr) {
      meeting_->departure().fail(SymmetryError(
          fmt::format("group {}: rank {} uses byte {} of window {}, which rank {} has not, or has "
                      "deregistered",
                      meeting_->departure().group(), peer, where.offset, where.window, rank()),
          {rank()}));
    }
    if (peer != rank() && (read_.empty() || read_.back() != peer)) {
      read_.push_back(peer);
    }
    return memory;
  }

  /// A peer's exposed tensor.
  [[nodiscard]] const std::byte* peer_tensor(const Ticket& ticket, int peer) {
    return peer_memory(ticket.first(), peer);
  }
  /// Its strides, given its shape.
  [[nodiscard]] static Dims peer_strides(const Ticket& ticket, const Dims& shape) {
    return ticket.dense
               ? contiguous_strides(shape)
               : Dims(std::span(ticket.strides.data(), static_cast<std::size_t>(shape.size())));
  }

  /// Throws what a peer said whose memory this call has read, if it gave up before the reading was
  /// over: its caller may have written there.
  void confirm_read() {
    for (const int peer : read_) {
      meeting_->check_still_exposed(peer);
    }
    read_.clear();
  }

  /// Ends a call in whose last step peers may still read this rank's tensors (`own_exposed`), or
  /// wait for this rank to have read theirs. Throws as `confirm_read`.
  void finish(bool own_exposed) {
    if (!read_.empty()) {
      confirm_read();
      meeting_->finish_reading();
    }
    if (own_exposed) {
      meeting_->await_readers();
    }
  }

 private:
  std::unique_ptr<Rendezvous> meeting_;
  std::shared_ptr<WindowTable> windows_;
  std::size_t window_bytes_;
  std::vector<int>
      read_;  ///< Peers whose exposed memory the call reads. Kept: calls do not allocate.
};

/// The elements [first, first + extent) of a view along `dim`, as a layout and its first byte.
template <class Byte>
struct Part {
  Byte* base = nullptr;
  Layout layout;

  [[nodiscard]] Cursor<Byte> cursor(std::size_t element_bytes, std::int64_t first = 0) const {
    return Cursor<Byte>(base, layout, element_bytes, first);
  }
};

template <class Byte>
[[nodiscard]] Part<Byte> part_of(Byte* base, const Dims& shape, const Dims& strides,
                                 std::size_t element_bytes, int dim, std::int64_t first,
                                 std::int64_t extent) noexcept {
  const std::int64_t skip = first * strides[dim] * static_cast<std::int64_t>(element_bytes);
  return {extent == 0 ? base : base + skip, collapse(shape, strides, dim, extent)};
}

template <class Void>
[[nodiscard]] auto part_of(const BasicTensorView<Void>& view, int dim, std::int64_t first,
                           std::int64_t extent) noexcept {
  using Byte = std::conditional_t<std::is_const_v<Void>, const std::byte, std::byte>;
  return part_of(static_cast<Byte*>(view.data()), view.shape(), view.strides(),
                 size_of(view.dtype()), dim, first, extent);
}

template <class Void>
[[nodiscard]] auto whole(const BasicTensorView<Void>& view) noexcept {
  using Byte = std::conditional_t<std::is_const_v<Void>, const std::byte, std::byte>;
  return Part<Byte>{static_cast<Byte*>(view.data()), collapse(view.shape(), view.strides())};
}

}  // namespace cohort::host
