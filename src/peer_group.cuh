// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "cohort/cuda/call_signature.hpp"
#include "cohort/cuda/inbox.hpp"

// What every part of a peer kernel knows: its group, its call, and where things lie in an inbox.
// peer_wait.cuh waits, peer_words.cuh and peer_lines.cuh carry payload with flags, peer_enter.cuh
// begins a call, and peer_launch.cuh is the host's side.
//
// Memory order. Four kinds of words are written by one rank and awaited by another; `volatile`
// accesses in PTX are relaxed with system scope (PTX ISA, "Memory Consistency Model").
//
//  1. Flag words (ll_store, ll_load). Flag and payload share one 8-byte half of a 16-byte aligned
//     vector access, so whoever sees the flag sees the payload; nothing else is released by it. The
//     halves are checked apart: no atomicity beyond 8 bytes is assumed. NCCL's LL protocol rests on
//     the same property (NCCL, src/device/prims_ll.h).
//  2. Flag lines (line_store, ll_load). Eight neighbouring threads of a warp store a whole,
//     aligned line of 128 bytes with one instruction, and eight threads load it with one. Both
//     travel as one request, and NVLink and the second-level cache keep a line's request whole, so
//     whoever sees the flag in its last 8 bytes sees all of it. PTX does not promise this: it is a
//     property of the hardware, on which NCCL's LL128 protocol rests (NCCL,
//     src/device/prims_ll128.h) and for which NCCL allows it over NVLink only
//     (src/graph/tuning.cc). So do we: see `PeerPath::flag_line`.
//  3. The barrier's words (barrier_kernel): a release and an acquire.
//  4. Epochs, error words, announcements and the words shared with the host. The epoch is read at
//     the start of a launch, behind await_predecessor(), which waits for the completion
//     of the launch before and its memory. The others are relaxed: each carries its whole meaning
//     in itself.
//
// Reuse of a slot needs reads of epoch e to be over before stores of e+2 land; inbox.hpp says why
// they are. The link from a kernel's reads to the next kernel's signal is the kernel boundary.

namespace cohort::cuda::detail {

inline constexpr unsigned kWarp = 32;
inline constexpr unsigned kFullWarp = 0xffffffffU;

/// What a kernel is told of its group: of the table, what its hot path reads. Every launch fetches
/// its parameters anew, so they are few.
template <int kRanks>
struct Group {
  static constexpr int kMost = kRanks > 0 ? kRanks : kMaxPeers;

  /// From this rank on: peers[k] is the inbox of rank (rank + k) mod n, so that each rank starts
  /// with another peer, and peers[0] is the own one.
  std::byte* peers[kMost];
  // Of flag words and of lines: where the first lane of slot 0 and this rank's own lane lie in
  // every inbox, and the bytes of a lane and of a slot. Worked out here, because what follows from
  // the epoch on the device is waited for.
  std::int64_t ll_first;
  std::int64_t ll_own;
  std::int64_t ll_slot;
  std::int64_t line_first;
  std::int64_t line_own;
  std::int64_t line_slot;
  std::int64_t line_lane;
  std::uint32_t ll_words;
  std::uint32_t delay_seed;
  CallSignature signature;
  int rank;
  int ranks;

  Group(const PeerTable& t, CallSignature call)
      : peers{},
        ll_first(t.layout.ll_offset),
        ll_own(ll_first + t.rank * t.layout.ll_words * 16),
        ll_slot(t.size * t.layout.ll_words * 16),
        line_first(t.layout.line_offset),
        line_own(line_first + t.rank * t.layout.lines * kLineBytes),
        line_slot(t.size * t.layout.lines * kLineBytes),
        line_lane(t.layout.lines * kLineBytes),
        ll_words(static_cast<std::uint32_t>(t.layout.ll_words)),
        delay_seed(t.delay_seed),
        signature(call),
        rank(t.rank),
        ranks(t.size) {
    for (int k = 0; k < t.size; ++k) {
      peers[k] = t.peers[(t.rank + k) % t.size];
    }
  }

  __device__ __forceinline__ int size() const { return kRanks > 0 ? kRanks : ranks; }
  __device__ __forceinline__ std::byte* own() const { return peers[0]; }
  /// The rank whose inbox is peers[k].
  __device__ __forceinline__ int rank_at(int k) const {
    const int r = rank + k;
    return r < size() ? r : r - size();
  }
};

/// One call, as a thread sees it.
struct Call {
  std::uint64_t line_flag;  ///< What flag lines carry.
  std::uint32_t flag;       ///< What flag words carry.
  std::uint32_t slot;

  __device__ __forceinline__ std::uint64_t epoch() const { return line_flag & kLineEpochMask; }
};

__device__ __forceinline__ InboxControl* control(std::byte* inbox) {
  return reinterpret_cast<InboxControl*>(inbox);
}

__device__ __forceinline__ EpochRecord* record(std::byte* inbox, std::uint32_t i) {
  return reinterpret_cast<EpochRecord*>(inbox + sizeof(InboxControl)) + i;
}

/// Where `source` announces in every inbox which call it is in; see `announce`.
__device__ __forceinline__ std::uint64_t* announcement(std::byte* inbox, int source) {
  return reinterpret_cast<std::uint64_t*>(inbox + kCallsOffset) + source;
}

__device__ __forceinline__ std::uint64_t global_time() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

/// For tests: some blocks, at some epochs, wait up to some ten microseconds. Inlined, like all else
/// that kernels may meet on their way: a call costs registers on the paths that do not take it.
__device__ __forceinline__ void delay_randomly(std::uint32_t seed, int rank, std::uint32_t flag,
                                               std::uint32_t point) {
  std::uint32_t x = seed ^ (static_cast<std::uint32_t>(rank) * 0x9e3779b9U) ^ (flag * 0x85ebca6bU) ^
                    (blockIdx.x * 0xc2b2ae35U) ^ (point * 0x27d4eb2fU);
  x ^= x >> 15, x *= 0x2c1b3c6dU, x ^= x >> 12, x *= 0x297a2d39U, x ^= x >> 15;
  if ((x & 3U) != 0) {
    return;
  }
  const std::uint64_t until = global_time() + ((x >> 8) & 0x3fffU);
  while (global_time() < until) {
  }
}

template <int kRanks>
__device__ __forceinline__ void delay_point(const Group<kRanks>& g, const Call& c,
                                            std::uint32_t point) {
  if (__builtin_expect(g.delay_seed != 0, 0)) {
    delay_randomly(g.delay_seed, g.rank, c.flag, point);
  }
}

/// The threads of a block that do the call's work: all but its last warp, which keeps the books.
__device__ __forceinline__ std::uint32_t workers() { return blockDim.x - kWarp; }
/// This thread's number among all workers of the launch, and how many there are.
__device__ __forceinline__ std::uint32_t worker_number() {
  return blockIdx.x * workers() + threadIdx.x;
}
__device__ __forceinline__ std::uint32_t worker_count() { return gridDim.x * workers(); }

}  // namespace cohort::cuda::detail
