// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>
#include <sched.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "cohort/dtype.hpp"
#include "cohort/error.hpp"
#include "cohort/flight_ring.hpp"
#include "cohort/hash.hpp"
#include "cohort/tensor.hpp"
#include "cohort/transport.hpp"

/// \file
/// What a rank of the host transport shows its peers: one memory file with signals, descriptions of
/// calls, the inbox slots that it fills, and its ends of the channels for messages between pairs.
/// Every word is written by its owner alone.

namespace cohort::host {

static_assert(std::atomic<std::uint64_t>::is_always_lock_free,
              "signals are shared between processes");

/// Two lines of 64 bytes: the prefetcher of current x86 cores moves lines in such pairs.
inline constexpr std::size_t kSignalAlignment = 128;

enum class Operation : std::uint8_t {
  all_gather,
  reduce_scatter,
  all_reduce,
  broadcast,
  all_to_all,
  barrier,
  merge_attention,
  gather_query,
};

[[nodiscard]] constexpr std::string_view to_string(Operation operation) noexcept {
  switch (operation) {
    case Operation::all_gather:
      return "all_gather";
    case Operation::reduce_scatter:
      return "reduce_scatter";
    case Operation::all_reduce:
      return "all_reduce";
    case Operation::broadcast:
      return "broadcast";
    case Operation::all_to_all:
      return "all_to_all";
    case Operation::barrier:
      return "barrier";
    case Operation::merge_attention:
      return "merge_attention";
    case Operation::gather_query:
      return "gather_query";
  }
  return "unknown";
}

/// What all ranks of a call must agree on.
struct Call {
  Operation operation = Operation::barrier;
  DType dtype = DType::u8;
  std::uint8_t variant = 0;  ///< The `ReduceOp`, or the `LseBase`.
  std::uint8_t dim = 0;
  std::uint32_t root = 0;
  std::uint64_t layout = detail_seed();  ///< Hash of the shape and the ranks' sizes.
  std::uint64_t bytes = 0;               ///< Of the tensor that is equal on all ranks.

  /// Adds extents to the hash.
  void mix(std::int64_t extent) noexcept {
    layout = cohort::detail::mix(layout, static_cast<std::uint64_t>(extent));
  }

  friend bool operator==(const Call&, const Call&) = default;

 private:
  static constexpr std::uint64_t detail_seed() noexcept { return cohort::detail::kHashSeed; }
};

[[nodiscard]] inline std::string describe(const Call& call) {
  return fmt::format("{} of {} bytes of {}, dimension {}, variant {}, root {}, shape hash {:016x}",
                     to_string(call.operation), call.bytes, to_string(call.dtype), call.dim,
                     call.variant, call.root, call.layout);
}

/// Throws `SymmetryError` unless all ranks make the same call. Those differ that are not with the
/// largest set of ranks that are alike (of equal sets, the one that holds the lowest rank).
/// @param call_of  The `Call` of a rank.
/// @param place    Says where it is; called where they differ.
template <class CallOf, class Where>
void fail_unless_same(int ranks, const CallOf& call_of, const Where& place) {
  int majority = 0;
  int votes = 0;
  for (int r = 0; r < ranks; ++r) {
    int alike = 0;
    for (int other = 0; other < ranks; ++other) {
      alike += call_of(other) == call_of(r) ? 1 : 0;
    }
    if (alike > votes) {
      votes = alike;
      majority = r;
    }
  }
  std::vector<int> differ;
  std::string text;
  for (int r = 0; r < ranks; ++r) {
    if (!(call_of(r) == call_of(majority))) {
      differ.push_back(r);
      text += fmt::format("; rank {} calls {}", r, describe(call_of(r)));
    }
  }
  if (!differ.empty()) {
    throw SymmetryError(fmt::format("{}: the ranks make different calls: most call {}{}", place(),
                                    describe(call_of(majority)), text),
                        differ);
  }
}

/// Where peers find a rank's data of one call.
enum class Place : std::uint8_t {
  nowhere,  ///< They need none.
  slot,     ///< In the inbox slot of the step, without gaps.
  direct,   ///< In a window, as the caller laid it out.
};

/// A position in a window that all ranks of the group have.
struct WindowOffset {
  std::uint32_t window = 0;
  std::uint64_t offset = 0;
};

/// Where a rank's tensors of one step lie.
struct Showing {
  Place place = Place::nowhere;
  bool dense = true;  ///< A direct tensor has no gaps; `strides` say nothing.
  WindowOffset first;
  WindowOffset second;                         ///< The second tensor of a call with two.
  std::array<std::int64_t, kMaxDims> strides;  ///< In elements; left unset where not needed.
};

/// Of a rank that shows no tensor.
inline constexpr Showing kShowsNothing{};
/// Of a rank whose tensor is in the slot.
inline constexpr Showing kShowsSlot{.place = Place::slot, .first = {}, .second = {}, .strides = {}};

/// One step of a group. The owner fills everything else and then stores `epoch`; a peer that has
/// loaded the epoch (acquire, paired with the owner's release) may read the rest.
struct alignas(kSignalAlignment) Ticket {
  std::atomic<std::uint64_t> epoch{0};
  Call call;
  Place place = Place::nowhere;
  bool dense = true;
  std::uint32_t first_window = 0;
  std::uint64_t first_offset = 0;
  WindowOffset second;
  std::array<std::int64_t, kMaxDims> strides{};  ///< In the second line: rarely needed.

  [[nodiscard]] WindowOffset first() const noexcept { return {first_window, first_offset}; }
};

/// Whether the owner can still come.
enum class Presence : std::uint32_t { here, gave_up, left };

/// Why a rank gave up: what the first rank that found it has said. Written once, before the
/// presence tells of it.
struct Farewell {
  std::uint32_t bytes = 0;               ///< Of `reason`; 0 for none.
  std::array<std::byte, 2044> reason{};  ///< A `GiveUp` as it is sent.
};

/// The head of a rank's memory file. The file starts as zeros; the owner constructs the head before
/// it tells its peers where the file is.
struct SignalPad {
  /// Steps use them in turn. The owner fills `tickets[e % 2]` for step e after it has left step
  /// e-1, which proves that every peer has entered e-1, so has left e-2 and its ticket.
  std::array<Ticket, 2> tickets;
  /// The last step whose direct tensors the owner has finished reading.
  alignas(kSignalAlignment) std::atomic<std::uint64_t> finished{0};
  alignas(kSignalAlignment) std::atomic<Presence> presence{Presence::here};
  /// Where the owner may run; none where the system does not say. Written once, by `construct`.
  cpu_set_t processors{};
  Farewell farewell;  ///< To be read where the presence says that the owner gave up.
};

/// A rank's end of the channel with one peer; both counters only grow.
struct alignas(kSignalAlignment) ChannelEnd {
  std::atomic<std::uint64_t> sent{0};      ///< Parcels that this rank has put for the peer.
  std::atomic<std::uint64_t> received{0};  ///< Parcels of the peer that this rank has taken.
};

/// What a message between two ranks is, as its sender and its receiver each see it.
struct Message {
  std::uint64_t bytes = 0;
  std::uint64_t shape = cohort::detail::kHashSeed;  ///< Hash of the extents.
  DType dtype = DType::u8;
  std::array<std::uint8_t, 7> unused{};  ///< It is sent as it lies in memory.

  [[nodiscard]] static Message of(const ConstTensorView& tensor) noexcept {
    Message message{.bytes = tensor.bytes(), .dtype = tensor.dtype()};
    for (const auto extent : tensor.shape()) {
      message.shape = cohort::detail::mix(message.shape, static_cast<std::uint64_t>(extent));
    }
    return message;
  }
  friend bool operator==(const Message&, const Message&) = default;
};

/// Whether a message is what its receiver expects; shapes count where debug checks are on.
[[nodiscard]] inline bool is_expected(const Message& sent, const Message& expected,
                                      bool compares_shapes) noexcept {
  return sent.bytes == expected.bytes && sent.dtype == expected.dtype &&
         (!compares_shapes || sent.shape == expected.shape);
}

/// Of a message that is not.
[[noreturn]] inline void fail_message(const Message& sent, const Message& expected,
                                      std::string_view group, int from, int rank) {
  const bool alike = is_expected(sent, expected, false);
  throw SymmetryError(
      fmt::format("recv in group {}: rank {} sent {} bytes of {}{} where rank {} expected {} "
                  "bytes of {}{}",
                  group, from, sent.bytes, to_string(sent.dtype), alike ? " in another shape" : "",
                  rank, expected.bytes, to_string(expected.dtype), alike ? " in its own" : ""),
      {from});
}

/// A piece of a message, in the sender's file.
struct alignas(64) ParcelHeader {
  Message message;
  std::uint64_t first = 0;  ///< Position of the piece in the message.
};

/// Parcels of one direction that can wait. A message that fits them is sent without waiting.
inline constexpr std::size_t kParcels = 4;
inline constexpr std::size_t kParcelBytes = 64 * 1024;

/// What ranks must have been built with alike to read each other's files. The first number counts
/// changes of meaning that the layout does not show.
inline constexpr std::uint64_t kPadProtocol = [] {
  std::uint64_t hash = cohort::detail::kHashSeed;
  for (const std::size_t word : {std::size_t{5},
                                 sizeof(void*),
                                 sizeof(SignalPad),
                                 offsetof(SignalPad, finished),
                                 offsetof(SignalPad, presence),
                                 offsetof(SignalPad, processors),
                                 offsetof(SignalPad, farewell),
                                 sizeof(Farewell),
                                 sizeof(Ticket),
                                 offsetof(Ticket, call),
                                 offsetof(Ticket, place),
                                 offsetof(Ticket, dense),
                                 offsetof(Ticket, first_window),
                                 offsetof(Ticket, first_offset),
                                 offsetof(Ticket, second),
                                 offsetof(Ticket, strides),
                                 sizeof(Call),
                                 offsetof(Call, root),
                                 offsetof(Call, layout),
                                 offsetof(Call, bytes),
                                 sizeof(ChannelEnd),
                                 offsetof(ChannelEnd, received),
                                 sizeof(ParcelHeader),
                                 offsetof(ParcelHeader, first),
                                 kParcels,
                                 kParcelBytes,
                                 kSignalAlignment,
                                 static_cast<std::size_t>(kMaxDims),
                                 static_cast<std::size_t>(Operation::gather_query),
                                 static_cast<std::size_t>(Presence::left),
                                 sizeof(TraceRing),
                                 std::size_t{TraceRing::kProtocol}}) {
    hash = cohort::detail::mix(hash, word);
  }
  return hash;
}();

/// Where things lie in the memory file of a rank; equal on all ranks of a group.
struct PadGeometry {
  int ranks = 1;
  std::size_t slot_bytes = 0;  ///< Of each of the two inbox slots; a multiple of 64.

  static constexpr std::size_t kPage = 4096;

  [[nodiscard]] std::size_t channel_ends() const noexcept { return round_up(sizeof(SignalPad)); }
  [[nodiscard]] std::size_t slot(std::uint64_t epoch) const noexcept {
    return round_up(channel_ends() + static_cast<std::size_t>(ranks) * sizeof(ChannelEnd)) +
           static_cast<std::size_t>(epoch % 2) * round_up(slot_bytes);
  }
  /// The parcels that the owner puts for `peer`.
  [[nodiscard]] std::size_t parcel(int peer, std::uint64_t number) const noexcept {
    constexpr std::size_t kStride = sizeof(ParcelHeader) + kParcelBytes;
    return slot(0) + 2 * round_up(slot_bytes) +
           (static_cast<std::size_t>(peer) * kParcels +
            static_cast<std::size_t>(number % kParcels)) *
               kStride;
  }
  /// The owner's records.
  [[nodiscard]] std::size_t trace() const noexcept { return round_up(parcel(ranks, 0)); }
  [[nodiscard]] std::size_t bytes() const noexcept { return round_up(trace() + sizeof(TraceRing)); }

 private:
  static constexpr std::size_t round_up(std::size_t bytes) noexcept {
    return (bytes + kPage - 1) / kPage * kPage;
  }
};

}  // namespace cohort::host
