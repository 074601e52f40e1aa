// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cohort/host/peer_access.hpp"
#include "cohort/host/slot_copy.hpp"
#include "cohort/host/strided.hpp"
#include "cohort/transport.hpp"

/// \file
/// What the collectives of ranks that map each other's memory are made of: calls, slots, and where
/// every rank's part is read.

namespace cohort::host {

[[nodiscard]] constexpr std::size_t to_size(std::int64_t value) noexcept {
  return static_cast<std::size_t>(value);
}

/// How many whole elements so many bytes hold. No division: sizes of elements are powers of two.
[[nodiscard]] constexpr std::int64_t elements_in(std::size_t bytes,
                                                 std::size_t element_bytes) noexcept {
  return static_cast<std::int64_t>(bytes >> std::countr_zero(element_bytes));
}

[[nodiscard]] inline Call call_of(Operation operation, const ConstTensorView& tensor) {
  Call call{.operation = operation, .dtype = tensor.dtype(), .bytes = tensor.bytes()};
  for (const auto extent : tensor.shape()) {
    call.mix(extent);
  }
  return call;
}

/// The steps of one group, and what is kept from call to call, so that calls do not allocate.
struct PeerSteps {
  explicit PeerSteps(PeerAccess& of)
      : access(of),
        meeting(of.meeting()),
        share_bytes(of.piece_bytes() / to_size(of.size()) / kLine * kLine),
        places(to_size(of.size())),
        sources(to_size(of.size())),
        peer_ins(to_size(of.size())) {}

  /// Elements of each rank's piece where a slot holds one piece for every rank.
  [[nodiscard]] std::int64_t piece_elements(std::size_t element_bytes) const noexcept {
    return elements_in(share_bytes, element_bytes);
  }

  /// Puts the next `count` elements into the slot of the next step, `skip` bytes into it.
  void fill_slot(ReadCursor from, std::int64_t count, std::size_t skip = 0) noexcept {
    copy_to_slot(meeting.next_slot() + skip, from, count);
  }
  /// The same of elements without gaps; cursors take as long as a short copy.
  void fill_slot(const std::byte* from, std::size_t bytes, std::size_t skip = 0) noexcept {
    copy_to_slot(meeting.next_slot() + skip, from, bytes);
  }
  /// Copies `count` elements from a peer's slot of the current step.
  void read_slot(int peer, WriteCursor to, std::int64_t count, std::size_t skip = 0) noexcept {
    ReadCursor reader(meeting.slot_of(peer) + skip, dense_layout(count), to.element_bytes());
    copy(to, reader, count);
  }

  PeerAccess& access;
  Rendezvous& meeting;
  std::size_t share_bytes;    ///< Of each rank's piece in a slot that holds one for every rank.
  std::vector<Place> places;  ///< By rank, as below.
  std::vector<ReadCursor> sources;
  std::vector<const std::byte*> peer_ins;

 private:
  static constexpr std::size_t kLine = 64;
};

}  // namespace cohort::host
