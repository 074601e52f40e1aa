// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "launch.cuh"
#include "peer_wait.cuh"
#include "peer_words.cuh"

// Entering a call: its epoch, the first stores that need it, and the books that are kept meanwhile.

namespace cohort::cuda::detail {

static_assert(offsetof(EpochRecord, epoch) == 0 && offsetof(EpochRecord, error) == 8,
              "begin() reads both in one load");

/// What a thread finds of its group when a launch begins.
struct Found {
  std::uint64_t epoch;  ///< Of the call before.
  std::uint64_t error;  ///< Not 0 if the group has failed.
};

/// In all threads of every peer kernel, before anything but arithmetic. Loads of what earlier work
/// has written may follow at once, while what this one returns is on its way; stores that a peer
/// sees need the epoch, which `enter` gives.
template <int kRanks>
__device__ __forceinline__ Found begin(const Group<kRanks>& g) {
  // Before the first load that depends on earlier work and before the first remote store. Reached
  // by every thread, also of failing groups: otherwise this launch could complete before its
  // predecessor and its successor would see neither's memory.
  await_predecessor();
  Found found;
  asm volatile("ld.volatile.global.v2.u64 {%0,%1},[%2];"
               : "=l"(found.epoch), "=l"(found.error)
               : "l"(record(g.own(), blockIdx.x % kEpochRecords))
               : "memory");
  return found;
}

/// Makes this call's epoch the last one and wipes one old flag word of each lane. One warp of every
/// block, when all threads of the block have read the epoch.
///
/// @param ll_used  Flag words of each lane that this call uses; the same on all ranks.
///
/// The epoch: a thread arrives at the block's barrier with a value computed from what it has read
/// (`enter`), the block's arrival comes after the barrier, and the stores depend on the last
/// block's arrival. So no read of this launch can return the new epoch: it would have to depend on
/// itself, which PTX excludes ("No-Thin-Air"). The arrival is relaxed on purpose: acquire-release
/// would first wait for sends to be acknowledged by the peers.
///
/// Wiping: a flag word, which has room for some lower bits of the epoch, could match by accident
/// if it were old enough. Call e clears word e/2 mod ll_words of every lane of its own slot unless
/// the call uses that word, in which case it is written with e. Nobody else touches an unused word
/// of slot e until a peer reaches e+2. So every word is 0 or at most 2*ll_words epochs old, and
/// those differ in their lower bits (`flag_epoch_bits`). Flag lines carry 48 bits of the epoch,
/// which last for ever.
template <int kRanks>
__device__ __forceinline__ void keep_books(const Group<kRanks>& g, const Call& c,
                                           std::uint32_t ll_used) {
  const std::uint32_t thread = threadIdx.x % kWarp;
  std::uint32_t before = gridDim.x - 1;
  if (gridDim.x > 1 && thread == 0) {
    asm volatile("atom.relaxed.gpu.global.inc.u32 %0,[%1],%2;"
                 : "=r"(before)
                 : "l"(&control(g.own())->arrived), "r"(gridDim.x - 1)
                 : "memory");
  }
  if (blockIdx.x == 0 && thread < static_cast<unsigned>(g.size())) {  // while that is on its way
    const std::uint32_t word = static_cast<std::uint32_t>(c.epoch() >> 1) & (g.ll_words - 1);
    if (word >= ll_used) {
      std::byte* old = g.own() + ll_place(g, c, static_cast<int>(thread), word);
      *reinterpret_cast<uint4*>(old) = make_uint4(0, 0, 0, 0);
    }
  }
  const bool last = __shfl_sync(kFullWarp, before, 0) == gridDim.x - 1;  // and `arrived` is 0 again
  if (last && thread < kEpochRecords) {
    asm volatile("st.volatile.global.u64 [%0],%1;" ::"l"(&record(g.own(), thread)->epoch),
                 "l"(c.epoch())
                 : "memory");
  }
}

/// Enters the call, in all threads of all blocks: gives workers its epoch, and has the last warp
/// keep the books meanwhile. False in threads that have no more to do: those of the last warp, and
/// all where the group has failed. Loads of what earlier work has written may be under way.
///
/// @param send_first  Called with whether to send, as soon as the epoch is there: sends what the
///                    thread sends first, without a branch.
template <int kRanks, class SendFirst>
__device__ __forceinline__ bool enter(const Group<kRanks>& g, const Found& found, Call& c,
                                      std::uint32_t ll_used, const SendFirst& send_first) {
  const std::uint64_t epoch = found.epoch + 1;
  const FlagCode code = FlagCode::make(g.signature, g.ll_words);
  c.line_flag = code.line_flag(epoch);
  c.flag = code.word_flag(epoch);
  c.slot = c.flag & 1U;
  const bool good = found.error == 0;
  const bool works = threadIdx.x < workers();
  send_first(good && works && g.delay_seed == 0);
  if (__builtin_expect(g.delay_seed != 0, 0)) {
    delay_point(g, c, 0);
    send_first(good && works);
  }
  // All threads of the block, as a number that the epoch's load must have returned for.
  const std::uint32_t all = min(blockDim.x, c.flag | 0x80000000U);
  // A warp that finds the group failed arrives all the same, so that nobody waits for it.
  if (!works) {
    asm volatile("barrier.cta.sync 1,%0;" ::"r"(all) : "memory");
    if (__builtin_expect(good, 1)) {
      keep_books(g, c, ll_used);
    } else if (blockIdx.x == 0 && threadIdx.x == workers()) {
      tell_host(control(g.own()), found.error);
    }
    return false;
  }
  asm volatile("barrier.cta.arrive 1,%0;" ::"r"(all) : "memory");
  return good;
}

template <int kRanks>
__device__ __forceinline__ bool enter(const Group<kRanks>& g, const Found& found, Call& c,
                                      std::uint32_t ll_used) {
  return enter(g, found, c, ll_used, [](bool) {});
}

/// Whether every block of this launch runs or has run: their first stores wait for nothing.
template <int kRanks>
__device__ __forceinline__ bool all_arrived(const Group<kRanks>& g, const Call& c) {
  return *const_cast<const volatile std::uint64_t*>(
             &record(g.own(), blockIdx.x % kEpochRecords)->epoch) == c.epoch();
}

}  // namespace cohort::cuda::detail
