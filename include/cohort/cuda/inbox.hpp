// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstddef>
#include <cstdint>

#include "cohort/cuda/call_signature.hpp"
#include "cohort/error.hpp"

/// \file
/// The inbox: symmetric memory that the library owns, into which peers push. One segment per rank,
/// laid out alike on all of them:
///
///     control     128 bytes: error word, time limit, arrivals
///     records     [kEpochRecords]             128 bytes each: equal copies of epoch and error word
///     calls       [source rank]               8 bytes each: the call that a rank is in
///     flag words  [slot][source rank][word]   16 bytes each: 8 bytes of payload with their flags
///     flag lines  [slot][source rank][line]   128 bytes each: 120 bytes of payload and their flag
///
/// Two slots alternate by epoch, the number of the group's peer-kernel call. No base depends on a
/// call's shape, and payload never lies where flags lie, so what a kernel waits on has only ever
/// held zeros or flags of earlier epochs.
///
/// **Why two slots suffice.** Every call signals every peer and waits for every peer's signal. A
/// rank that stores into the slot of epoch e+2 has finished its call e+1, so it has the e+1 signal
/// of every peer, so each peer had finished its call e, and with it all reading of that slot, when
/// it sent that signal: launches of one stream order run one after another.

namespace cohort::cuda {

/// Most ranks that a table can hold. GPUs of one host reach each other; there are at most 16, and
/// tests put more ranks than that on one card.
inline constexpr int kMaxPeers = 32;

/// Most thread blocks that a peer kernel may be launched with.
inline constexpr int kMaxPeerBlocks = 512;

/// Copies of the epoch: a launch's blocks read different ones, so that they do not queue up for
/// one.
inline constexpr int kEpochRecords = 8;

/// Most inboxes of one group: of its lanes, and those that larger ones replaced.
inline constexpr int kMaxInboxes = 64;

/// Payload bytes of a flag line, and the line's size.
inline constexpr std::int64_t kLinePayload = 120;
inline constexpr std::int64_t kLineBytes = 128;

/// Where the announcements of the ranks' calls lie in an inbox; see call_signature.hpp.
inline constexpr std::int64_t kCallsOffset = (kEpochRecords + 1) * kLineBytes;

/// What an inbox must have room for. Equal on all ranks.
struct InboxOptions {
  int ranks = 0;
  /// Payload bytes that one rank sends to one peer by flag words; rounded up to a power of two.
  std::int64_t flag_word_bytes = 512 << 10;
  /// Payload bytes that one rank sends to one peer by flag lines; 0 where no call needs them, or
  /// where the links between the ranks do not keep lines whole (see `PeerPath::flag_line`).
  std::int64_t flag_line_bytes = 0;
  /// Most thread blocks of a launch; see block_budget.hpp.
  int max_blocks = 128;
};

/// Payload bytes that a lane can have at most.
inline constexpr std::int64_t kMaxLane = std::int64_t{1} << 31;

/// Flag lines of an inbox that takes the place of one with room for `there` bytes a peer, because
/// `share` are needed: twice as many, so that few are ever left behind, where a lane can have them.
[[nodiscard]] constexpr std::int64_t grown_lane_bytes(std::int64_t share,
                                                      std::int64_t there) noexcept {
  return std::max(share, std::min(2 * there, kMaxLane));
}

/// Byte offsets into the segment.
struct InboxLayout {
  int ranks = 0;
  int max_blocks = 0;
  std::int64_t ll_offset = 0;  ///< Flag words; "LL" is NCCL's name for the protocol.
  std::int64_t ll_words = 0;   ///< Words of one lane: one source rank, one slot. A power of two.
  std::int64_t line_offset = 0;
  std::int64_t lines = 0;  ///< Lines of one lane.
  std::int64_t bytes = 0;  ///< Size of the segment.

  /// @throw ConfigError if a number is out of range.
  [[nodiscard]] static InboxLayout make(const InboxOptions& options) {
    if (options.ranks < 1 || options.ranks > kMaxPeers || options.max_blocks < 1 ||
        options.max_blocks > kMaxPeerBlocks || options.flag_word_bytes < 0 ||
        options.flag_word_bytes > kMaxLane || options.flag_line_bytes < 0 ||
        options.flag_line_bytes > kMaxLane) {
      throw ConfigError(fmt::format(
          "InboxOptions: expected 1 to {} ranks, 1 to {} blocks and lanes of 0 to {} bytes, got "
          "ranks={} max_blocks={} flag_word_bytes={} flag_line_bytes={}",
          kMaxPeers, kMaxPeerBlocks, kMaxLane, options.ranks, options.max_blocks,
          options.flag_word_bytes, options.flag_line_bytes));
    }
    constexpr std::uint64_t kFewestWords = 32;
    const std::int64_t lanes = std::int64_t{2} * options.ranks;
    InboxLayout layout;
    layout.ranks = options.ranks;
    layout.max_blocks = options.max_blocks;
    layout.ll_offset = round_up(kCallsOffset + std::int64_t{kMaxPeers} * 8);
    layout.ll_words = static_cast<std::int64_t>(std::bit_ceil(
        std::max(kFewestWords, static_cast<std::uint64_t>(options.flag_word_bytes + 7) / 8)));
    layout.line_offset = layout.ll_offset + lanes * layout.ll_words * 16;
    layout.lines = (options.flag_line_bytes + kLinePayload - 1) / kLinePayload;
    layout.bytes = layout.line_offset + round_up(lanes * layout.lines * kLineBytes);
    return layout;
  }

  /// Payload bytes that one rank can send to one peer.
  [[nodiscard]] constexpr std::int64_t flag_word_capacity() const noexcept { return ll_words * 8; }
  [[nodiscard]] constexpr std::int64_t flag_line_capacity() const noexcept {
    return lines * kLinePayload;
  }

  friend bool operator==(const InboxLayout&, const InboxLayout&) = default;

 private:
  static constexpr std::int64_t kAlignment = 256;
  static constexpr std::int64_t round_up(std::int64_t bytes) noexcept {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
};

/// How many clusters of one size, 2, 4 or 8 thread blocks.
struct ClusterRoom {
  int of_2 = 0;
  int of_4 = 0;
  int of_8 = 0;

  [[nodiscard]] constexpr int of(std::int64_t blocks) const noexcept {
    return blocks == 8 ? of_8 : blocks == 4 ? of_4 : blocks == 2 ? of_2 : 0;
  }
  friend bool operator==(const ClusterRoom&, const ClusterRoom&) = default;
};

/// What a peer kernel needs to know of its group: where each rank's inbox lies in this process's
/// address space, the own one included. Passed to the kernels by value.
struct PeerTable {
  std::byte* peers[kMaxPeers] = {};
  InboxLayout layout;
  int rank = 0;
  int size = 0;
  /// Most thread blocks of the calls that follow, within the layout's; 0 for those. Equal on all
  /// ranks.
  int block_limit = 0;
  /// For tests: not 0 makes thread blocks wait for random times, differing by rank, block and
  /// epoch.
  std::uint32_t delay_seed = 0;
  /// Most clusters of a launch, within its blocks; see block_budget.hpp. Equal on all ranks.
  ClusterRoom max_clusters = {};
};

/// Words that the host and the kernels of one group on one rank share, in memory of the host that
/// the card has mapped. Only waits that take long look at them.
struct HostWords {
  /// Host to kernels: not 0 tells every wait to end.
  alignas(kLineBytes) std::uint64_t give_up = 0;
  /// Kernels to host: 0, or the `InboxError` that this rank met or was told of first.
  alignas(kLineBytes) std::uint64_t failure = 0;
  /// Not 0 for ranks that this rank was waiting for when its waits ended.
  std::uint32_t missing[kMaxPeers] = {};
  /// The group's inboxes by rank, as addresses on the card: a failure in one ends calls in all.
  alignas(kLineBytes) std::uint64_t inboxes = 0;
  std::byte* peers[kMaxInboxes][kMaxPeers] = {};
};

/// The start of an inbox.
struct alignas(kLineBytes) InboxControl {
  std::uint64_t error = 0;      ///< 0, or see `InboxError`; written by this rank and its peers.
  std::uint64_t limit_ns = 0;   ///< Of one wait.
  std::uint64_t next_look = 0;  ///< When a wait may look at the host's words again.
  HostWords* words = nullptr;   ///< This rank's, as the card sees them; null for none.
  std::uint32_t arrived = 0;    ///< Thread blocks of the running launch that know its epoch.
  std::uint32_t told = 0;       ///< Whether the host knows of the error.
  std::uint32_t missing = 0;    ///< Bits of the ranks that `HostWords::missing` has.
};

/// What a thread block reads when it starts. Behind the control block; equal between launches.
struct alignas(kLineBytes) EpochRecord {
  std::uint64_t epoch = 0;  ///< Of the last call; own kernels only.
  std::uint64_t error = 0;  ///< A copy of `InboxControl::error`.
};

/// The first wait that failed in a group: one that reached its limit, that the host ended, or whose
/// peer made another call.
struct InboxError {
  std::uint64_t epoch = 0;           ///< Of the call that waited: its lower 40 bits.
  int missing_rank = -1;             ///< The rank that did not come; -1 if there was no error.
  PeerCall mine = PeerCall::none;    ///< The call that waited.
  PeerCall theirs = PeerCall::none;  ///< What the rank made instead; none if it did not come.
  int waiting_rank = 0;              ///< The rank that waited.

  [[nodiscard]] explicit operator bool() const noexcept { return missing_rank >= 0; }

  [[nodiscard]] static constexpr std::uint64_t encode(std::uint64_t epoch, int waiting, int missing,
                                                      PeerCall mine = PeerCall::none,
                                                      PeerCall theirs = PeerCall::none) noexcept {
    return (epoch << 24) | (static_cast<std::uint64_t>(waiting) << 16) |
           (static_cast<std::uint64_t>(theirs) << 12) | (static_cast<std::uint64_t>(mine) << 8) |
           static_cast<std::uint64_t>(missing + 1);
  }
  [[nodiscard]] static constexpr InboxError decode(std::uint64_t word) noexcept {
    return {.epoch = word >> 24,
            .missing_rank = static_cast<int>(word & 0xffU) - 1,
            .mine = static_cast<PeerCall>(word >> 8 & 0xfU),
            .theirs = static_cast<PeerCall>(word >> 12 & 0xfU),
            .waiting_rank = static_cast<int>(word >> 16 & 0xffU)};
  }
};

/// Enqueues what makes a rank's own inbox ready: zeros, the time limit and the epoch to count from.
/// Local. Before any rank's first peer kernel all ranks must have completed it (synchronise the
/// stream, then meet on the control plane). Not to be captured.
///
/// @param after_epoch  Equal on all ranks; the first call has the one after it.
/// @param words        What this rank's host shares with its kernels, as the card sees it, or null.
/// @throw TransportError if CUDA refuses.
void initialize_inbox(const PeerTable& table, cudaStream_t stream,
                      std::chrono::nanoseconds limit = std::chrono::seconds(60),
                      std::uint64_t after_epoch = 0, HostWords* words = nullptr);

/// Changes the time limit of the own inbox's waits, in stream order. Local.
void set_inbox_limit(const PeerTable& table, std::chrono::nanoseconds limit, cudaStream_t stream);

/// Reads the own inbox's error word over `stream` and waits for it; use a stream of its own to look
/// while kernels run. Kernels end at once while the word is set: outputs are undefined, and the
/// group must be formed anew with fresh inboxes.
/// @throw TransportError if CUDA refuses.
[[nodiscard]] InboxError read_inbox_error(const PeerTable& table, cudaStream_t stream);

}  // namespace cohort::cuda
