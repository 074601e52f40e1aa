// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "cohort/cuda/block_budget.hpp"
#include "elements.cuh"

// What peer kernels are made of: entering a call, flag words, flag lines and bounded waits.
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

// --- bounded waits
// --------------------------------------------------------------------------------

// What waits do beyond polling is rare. What ends them is out of line, and nothing lives across it;
// what lets them go on is not, because registers that live across a call would be spilled. Both
// take the ranks that a thread misses as bits.

inline constexpr std::uint64_t kWaitIsOver = ~std::uint64_t{0};

/// How often the host's words are looked at, by one thread of the card: each look crosses the bus.
inline constexpr std::uint64_t kHostLookNs = 100'000;

/// Tells the host of the group's first error.
static __device__ __forceinline__ void tell_host(InboxControl* own, std::uint64_t error) {
  HostWords* const words = own->words;
  if (words == nullptr || atomicExch(&own->told, 1U) != 0) {
    return;
  }
  volatile std::uint64_t* const failure = &words->failure;
  if (*failure == 0) {  // another inbox of the group may have been first
    *failure = error;
  }
}

/// Tells the host of ranks that are missed.
static __device__ __forceinline__ void tell_missing(InboxControl* own, std::uint32_t missing) {
  HostWords* const words = own->words;
  if (words == nullptr || missing == 0 ||
      (*const_cast<volatile std::uint32_t*>(&own->missing) & missing) == missing) {
    return;
  }
  const std::uint32_t before = atomicOr(&own->missing, missing);
  for (std::uint32_t left = missing & ~before; left != 0; left &= left - 1) {
    *const_cast<volatile std::uint32_t*>(&words->missing[__ffs(static_cast<int>(left)) - 1]) = 1;
  }
}

/// Sets the own error word, unless it is set, and pushes it to every rank, into all inboxes of the
/// group: late ones then leave at entry, and those that wait leave at their next look.
template <int kRanks>
static __device__ __forceinline__ void fail(const Group<kRanks>& g, std::uint64_t word) {
  InboxControl* const own = control(g.own());
  if (atomicCAS_system(reinterpret_cast<unsigned long long*>(&own->error), 0ULL,
                       static_cast<unsigned long long>(word)) != 0) {
    return;
  }
  const auto set = [word](std::uint64_t* to) {
    asm volatile("st.volatile.global.u64 [%0],%1;" ::"l"(to), "l"(word) : "memory");
  };
  const auto set_all = [&](std::byte* inbox) {
    set(&control(inbox)->error);
    for (std::uint32_t i = 0; i < kEpochRecords; ++i) {
      set(&record(inbox, i)->error);
    }
  };
  for (int k = 0; k < g.size(); ++k) {
    set_all(g.peers[k]);
  }
  const HostWords* const words = own->words;
  if (words != nullptr) {
    const auto inboxes = *const_cast<const volatile std::uint64_t*>(&words->inboxes);
    for (std::uint64_t i = 0; i < inboxes && i < kMaxInboxes; ++i) {
      for (int r = 0; r < g.size(); ++r) {
        set_all(words->peers[i][r]);
      }
    }
  }
  tell_host(own, word);
}

/// Whether the host tells waits to end; asked now and then.
static __device__ __forceinline__ bool host_gave_up(InboxControl* own, std::uint64_t now) {
  const HostWords* const words = own->words;
  const std::uint64_t due = *const_cast<volatile std::uint64_t*>(&own->next_look);
  if (words == nullptr || now < due) {
    return false;
  }
  const auto before = atomicCAS(reinterpret_cast<unsigned long long*>(&own->next_look),
                                static_cast<unsigned long long>(due),
                                static_cast<unsigned long long>(now + kHostLookNs));
  return before == due && *const_cast<const volatile std::uint64_t*>(&words->give_up) != 0;
}

/// Tells all peers which call this rank is in. Where ranks make different calls, each waits for
/// words with flags that never come. So whoever has waited for a while announces its call, once a
/// thread, and finds in the own inbox what the others are in; a call that gets on announces
/// nothing.
template <int kRanks>
static __device__ __forceinline__ void announce(const Group<kRanks>& g, std::uint64_t epoch) {
  const std::uint64_t call = g.signature.announcement(epoch);
#pragma unroll 1
  for (int k = 1; k < g.size(); ++k) {
    asm volatile("st.volatile.global.u64 [%0],%1;" ::"l"(announcement(g.peers[k], g.rank)),
                 "l"(call)
                 : "memory");
  }
}

/// What the announcements in the own inbox say of the ranks that a thread misses.
struct Whereabouts {
  std::uint32_t away = 0;   ///< Have not come to this call.
  std::uint32_t other = 0;  ///< Are in another one.
};
template <int kRanks>
static __device__ __forceinline__ Whereabouts look_for(const Group<kRanks>& g, std::uint64_t epoch,
                                                       std::uint32_t missing) {
  Whereabouts found;
  const std::uint64_t mine = g.signature.announcement(epoch);
#pragma unroll 1
  for (std::uint32_t left = missing; left != 0; left &= left - 1) {
    const std::uint32_t bit = left & (0U - left);
    const std::uint64_t theirs = *const_cast<const volatile std::uint64_t*>(
        announcement(g.own(), __ffs(static_cast<int>(left)) - 1));
    const bool here =
        CallSignature::announced_epoch(theirs) == CallSignature::announced_epoch(mine);
    found.away |= here ? 0U : bit;
    found.other |= here && theirs != mine ? bit : 0U;
  }
  return found;
}

/// Ends a wait for the ranks `missing`: says why, unless the group has failed before.
template <int kRanks>
static __device__ __noinline__ void end_wait(const Group<kRanks>& g, std::uint64_t epoch,
                                             std::uint32_t missing) {
  InboxControl* const own = control(g.own());
  const Whereabouts found = look_for(g, epoch, missing);
  // Ranks that have come but do not go on count where no other is missing.
  const std::uint32_t named = found.away != 0 ? found.away : missing;
  if (found.other != 0) {
    const int rank = __ffs(static_cast<int>(found.other)) - 1;
    const std::uint64_t theirs =
        *const_cast<const volatile std::uint64_t*>(announcement(g.own(), rank));
    fail(g, InboxError::encode(epoch, rank, g.signature.call(),
                               CallSignature::announced_call(theirs)));
  } else if (*const_cast<volatile std::uint64_t*>(&own->error) == 0) {
    tell_missing(own, named);
    fail(g, InboxError::encode(epoch, __ffs(static_cast<int>(named)) - 1, g.signature.call()));
  } else {
    tell_missing(own, found.away);
  }
  tell_host(own, *const_cast<volatile std::uint64_t*>(&own->error));
}

/// Looks at the error word, the peers' announcements, the host's word and the clock. Returns when
/// the wait began, or kWaitIsOver. `missing` is 0 in a thread that misses nothing and polls with
/// its warp.
template <int kRanks>
__device__ __forceinline__ std::uint64_t look_around(const Group<kRanks>& g, std::uint64_t epoch,
                                                     std::uint32_t missing, std::uint64_t start) {
  InboxControl* const own = control(g.own());
  const volatile InboxControl* const seen = own;
  const std::uint64_t now = global_time();
  if (start == 0 && missing != 0) {
    announce(g, epoch);
  }
  const bool late = start != 0 && now - start >= seen->limit_ns;
  if (!late && seen->error == 0 &&
      (missing == 0 || (look_for(g, epoch, missing).other == 0 && !host_gave_up(own, now)))) {
    return start != 0 ? start : now;
  }
  if (missing != 0) {
    end_wait(g, epoch, missing);
  }
  return kWaitIsOver;
}

/// The same out of line, for warps that keep nothing across it.
template <int kRanks>
static __device__ __noinline__ std::uint64_t look_around_apart(const Group<kRanks>& g,
                                                               std::uint64_t epoch,
                                                               std::uint32_t missing,
                                                               std::uint64_t start) {
  return look_around(g, epoch, missing, start);
}

/// How long a thread goes on polling.
class Patience {
 public:
  /// Polls between two looks at the clock.
  static constexpr int kPolls = 256;

  /// After kPolls polls, the last of which missed the ranks `missing`. True if the wait is over:
  /// the limit is reached, or another thread or rank has failed, or the host gave up.
  template <int kRanks>
  __device__ __forceinline__ bool is_over(const Group<kRanks>& g, const Call& c,
                                          std::uint32_t missing) {
    start_ = look_around(g, c.epoch(), missing, start_);
    return start_ == kWaitIsOver;
  }
  /// The same for a warp after `poll_in_warp`; the answer is one for all of it.
  template <int kRanks>
  __device__ __forceinline__ bool is_over_in_warp(const Group<kRanks>& g, const Call& c,
                                                  std::uint32_t missing) {
    start_ = look_around_apart(g, c.epoch(), missing, start_);
    return __any_sync(kFullWarp, start_ == kWaitIsOver);
  }

 private:
  std::uint64_t start_ = 0;
};

/// Polls until `poll()`, the ranks whose words are not there yet, as bits, is 0. False if the wait
/// failed. Polls are a loop of their own, so that the rare look around is not in their way.
template <int kRanks, class Poll>
__device__ __forceinline__ bool await(const Group<kRanks>& g, const Call& c, Patience& patience,
                                      const Poll& poll) {
  std::uint32_t missing = 0;
  do {
#pragma unroll 1
    for (int i = 0; i < Patience::kPolls; ++i) {
      missing = poll();
      if (missing == 0) {
        return true;
      }
    }
  } while (!patience.is_over(g, c, missing));
  return false;
}

/// Polls for a while with all threads of a warp. True in all of them as soon as nothing is missing
/// in any; else `missing` has the ranks whose words this thread misses. Whoever misses something
/// looks around and begins anew: little lives in registers there, and nothing of the kind is in a
/// poll's way.
template <class Poll>
__device__ __forceinline__ bool poll_in_warp(std::uint32_t& missing, const Poll& poll) {
#pragma unroll 1
  for (int i = 0; i < Patience::kPolls; ++i) {
    missing = poll();
    if (__all_sync(kFullWarp, missing == 0)) {
      return true;
    }
  }
  return false;
}

// --- flag words
// -----------------------------------------------------------------------------------

/// The threads of a block that do the call's work: all but its last warp, which keeps the books.
__device__ __forceinline__ std::uint32_t workers() { return blockDim.x - kWarp; }
/// This thread's number among all workers of the launch, and how many there are.
__device__ __forceinline__ std::uint32_t worker_number() {
  return blockIdx.x * workers() + threadIdx.x;
}
__device__ __forceinline__ std::uint32_t worker_count() { return gridDim.x * workers(); }

/// Where a word of the lane of `source` lies in every inbox.
template <int kRanks>
__device__ __forceinline__ std::int64_t ll_place(const Group<kRanks>& g, const Call& c, int source,
                                                 std::uint32_t word) {
  return g.ll_first + (std::int64_t{g.ll_words} * source + word) * 16 +
         (c.slot != 0 ? g.ll_slot : 0);
}
/// The same in this rank's lane.
template <int kRanks>
__device__ __forceinline__ std::int64_t ll_own_place(const Group<kRanks>& g, const Call& c,
                                                     std::uint32_t word) {
  return g.ll_own + std::int64_t{16} * word + (c.slot != 0 ? g.ll_slot : 0);
}

__device__ __forceinline__ void ll_store(std::byte* to, uint2 value, std::uint32_t flag) {
  asm volatile("st.volatile.global.v4.u32 [%0],{%1,%2,%3,%4};" ::"l"(to), "r"(value.x), "r"(flag),
               "r"(value.y), "r"(flag)
               : "memory");
}

/// The same where it is wanted, without a branch.
__device__ __forceinline__ void ll_store_if(bool wanted, std::byte* to, uint2 value,
                                            std::uint32_t flag) {
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p,%5,0; @p st.volatile.global.v4.u32 [%0],{%1,%2,%3,%4};}" ::"l"(
          to),
      "r"(value.x), "r"(flag), "r"(value.y), "r"(flag), "r"(static_cast<unsigned>(wanted))
      : "memory");
}

__device__ __forceinline__ uint4 ll_load(const std::byte* from) {
  uint4 v;
  asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}

/// The same where it is wanted; without a branch, so that loads that follow each other are all on
/// their way before the first is looked at.
__device__ __forceinline__ void ll_load_if(bool wanted, const std::byte* from, uint4& v) {
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p,%5,0; @p ld.volatile.global.v4.u32 {%0,%1,%2,%3},[%4];}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(from), "r"(static_cast<unsigned>(wanted))
      : "memory");
}

/// 0 if both halves of a flag word carry the call's flag.
__device__ __forceinline__ std::uint32_t ll_differs(uint4 v, const Call& c) {
  return (v.y ^ c.flag) | (v.w ^ c.flag);
}

/// Where a thread's first word goes in every peer's inbox, worked out before `begin`: what lies
/// between the arrival of the epoch and the first store delays every rank. For a constant number of
/// ranks; where there is none, the first word is sent like all others.
template <int kRanks>
class FirstPlaces {
 public:
  __device__ __forceinline__ FirstPlaces(const Group<kRanks>& g, std::uint32_t word)
      : slot_bytes_(g.ll_slot) {
#pragma unroll
    for (int k = 1; k < kRanks; ++k) {
      at_[k] = settled(g.peers[k] + g.ll_own + std::int64_t{16} * word);
    }
  }
  /// To peers[k], without a branch.
  __device__ __forceinline__ void store_if(bool wanted, const Call& c, int k, uint2 value) const {
    ll_store_if(wanted, at_[k] + (c.slot != 0 ? slot_bytes_ : 0), value, c.flag);
  }

 private:
  std::int64_t slot_bytes_;
  std::byte* at_[kRanks > 0 ? kRanks : 1];
};

/// Whether a thread sends the first of its `words` words as soon as it has the epoch.
template <int kRanks>
__device__ __forceinline__ bool sends_ahead(std::uint32_t words) {
  return kRanks > 0 && threadIdx.x < workers() && worker_number() < words;
}
/// The first word that it has left to send then.
template <int kRanks>
__device__ __forceinline__ std::uint32_t second_word() {
  return worker_number() + (kRanks > 0 ? worker_count() : 0);
}

/// Ranks that a thread polls at once: all of them where the number is a constant.
template <int kRanks>
inline constexpr int kBatch = kRanks > 0 ? kRanks : 8;

/// Sends one word to the same place of every peer's inbox.
template <int kRanks>
__device__ __forceinline__ void ll_send_all(const Group<kRanks>& g, const Call& c,
                                            std::uint32_t word, uint2 value) {
  const std::int64_t place = ll_own_place(g, c, word);
#pragma unroll
  for (int k = 1; k < g.size(); ++k) {
    ll_store(g.peers[k] + place, value, c.flag);
  }
}

/// Whether it is another rank of the group.
template <int kRanks>
__device__ __forceinline__ bool is_peer(const Group<kRanks>& g, int rank) {
  return rank < g.size() && rank != g.rank;
}

/// Waits for a word of each of the ranks [first, first + kBatch) but this one, and returns their
/// payload by rank; what stands at this one means nothing. All loads of a round are in flight
/// together. False if the wait failed.
template <int kRanks>
__device__ __forceinline__ bool ll_receive(const Group<kRanks>& g, const Call& c, int first,
                                           std::uint32_t word, uint2 (&values)[kBatch<kRanks>],
                                           Patience& patience) {
  if constexpr (kRanks == 2) {  // one peer, one load
    const int peer = g.rank ^ 1;
    const std::byte* from = g.own() + ll_place(g, c, peer, word);
    return await(g, c, patience, [&] {
      const uint4 v = ll_load(from);
      values[0] = values[1] = make_uint2(v.x, v.z);
      return ll_differs(v, c) != 0 ? 1U << peer : 0U;
    });
  }
  const std::byte* lane = g.own() + ll_place(g, c, first, word);
  const std::int64_t lane_bytes = std::int64_t{g.ll_words} * 16;
  uint4 words[kBatch<kRanks>] = {};
  const auto poll = [&] {
    std::uint32_t missing = 0;
#pragma unroll
    for (int j = 0; j < kBatch<kRanks>; ++j) {
      ll_load_if(is_peer(g, first + j), lane + j * lane_bytes, words[j]);
    }
#pragma unroll
    for (int j = 0; j < kBatch<kRanks>; ++j) {
      const bool differs = is_peer(g, first + j) && ll_differs(words[j], c) != 0;
      missing |= differs ? 1U << (first + j) : 0U;
    }
    return missing;
  };
  if (!await(g, c, patience, poll)) {
    return false;
  }
#pragma unroll
  for (int j = 0; j < kBatch<kRanks>; ++j) {
    values[j] = make_uint2(words[j].x, words[j].z);
  }
  return true;
}

// --- entering a call
// -------------------------------------------------------------------------------

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

// --- flag lines
// -----------------------------------------------------------------------------------

// A line holds 15 words of 8 bytes and the epoch. A warp moves four lines at a time, a group: 60
// words, of which each thread has two neighbouring ones, and every eighth thread one and the flag.
inline constexpr std::uint32_t kLineWords = kLinePayload / 8;
inline constexpr std::uint32_t kGroupLines = 4;
inline constexpr std::uint32_t kGroupWords = kGroupLines * kLineWords;

/// A thread's part of a group of lines.
struct LinePart {
  std::uint32_t line;    ///< Of the lane.
  std::uint32_t word;    ///< First of the two words.
  std::uint32_t offset;  ///< Bytes into the line.
  bool flag;             ///< Has the flag instead of the second word.

  __device__ __forceinline__ explicit LinePart(std::uint32_t group) {
    const std::uint32_t thread = threadIdx.x & 31U;
    line = group * kGroupLines + (thread >> 3);
    word = line * kLineWords + 2 * (thread & 7U);
    offset = 16 * (thread & 7U);
    flag = (thread & 7U) == 7U;
  }
};

/// Where a thread's part of a line of the lane of `source` lies in every inbox.
template <int kRanks>
__device__ __forceinline__ std::int64_t line_place(const Group<kRanks>& g, const Call& c,
                                                   int source, const LinePart& part) {
  return g.line_first + g.line_lane * source + kLineBytes * part.line + part.offset +
         (c.slot != 0 ? g.line_slot : 0);
}
/// The same in this rank's lane.
template <int kRanks>
__device__ __forceinline__ std::int64_t line_own_place(const Group<kRanks>& g, const Call& c,
                                                       const LinePart& part) {
  return g.line_own + kLineBytes * part.line + part.offset + (c.slot != 0 ? g.line_slot : 0);
}

/// All threads that have a part of the line, in one instruction: see `line_mask`. Lines beyond the
/// payload are left out whole.
__device__ __forceinline__ void line_store(std::byte* to, uint2 first, uint2 second, const Call& c,
                                           const LinePart& part) {
  const auto low = static_cast<std::uint32_t>(c.line_flag);
  const auto high = static_cast<std::uint32_t>(c.line_flag >> 32);
  asm volatile("st.volatile.global.v4.u32 [%0],{%1,%2,%3,%4};" ::"l"(to), "r"(first.x),
               "r"(first.y), "r"(part.flag ? low : second.x), "r"(part.flag ? high : second.y)
               : "memory");
}

/// 0 unless the thread has the flag and it is not the call's.
__device__ __forceinline__ std::uint32_t line_differs(uint4 v, const Call& c,
                                                      const LinePart& part) {
  const auto low = static_cast<std::uint32_t>(c.line_flag);
  const auto high = static_cast<std::uint32_t>(c.line_flag >> 32);
  return part.flag ? (v.z ^ low) | (v.w ^ high) : 0;
}

/// Polls for a warp's part of a line of each of the ranks [first, first + kBatch) but this one;
/// values by rank. `any` is false in threads whose line lies beyond the payload. Returns as
/// `poll_in_warp`.
template <int kRanks>
__device__ __forceinline__ bool receive_lines(const Group<kRanks>& g, const Call& c, int first,
                                              const LinePart& part, bool any,
                                              uint4 (&values)[kBatch<kRanks>],
                                              std::uint32_t& missed) {
  return poll_in_warp(missed, [&] {
    std::uint32_t missing = 0;
#pragma unroll
    for (int j = 0; j < kBatch<kRanks>; ++j) {
      ll_load_if(any && is_peer(g, first + j), g.own() + line_place(g, c, first + j, part),
                 values[j]);
    }
#pragma unroll
    for (int j = 0; j < kBatch<kRanks>; ++j) {
      const bool differs = any && is_peer(g, first + j) && line_differs(values[j], c, part) != 0;
      missing |= differs ? 1U << (first + j) : 0U;
    }
    return missing;
  });
}

/// What a warp does in a call with lines. While every group has a warp of its own, that warp sends
/// the group and then waits for the peers'. Where there are more groups than warps, a quarter of a
/// block's warps send and the others receive: senders wait for the link, and nothing that waits for
/// peers must hold them up. Neighbouring groups are on different multiprocessors.
struct LineRole {
  std::uint32_t groups;
  std::uint32_t first;  ///< Group; then every `step`th.
  std::uint32_t step;
  bool sends;
  bool receives;

  __device__ __forceinline__ explicit LineRole(std::uint32_t words)
      : groups((words + kGroupWords - 1) / kGroupWords) {
    const std::uint32_t warp = threadIdx.x / kWarp;
    const std::uint32_t warps = workers() / kWarp;
    const bool splits = groups > warps * gridDim.x;
    const std::uint32_t senders = splits ? warps / 4 : warps;
    sends = warp < senders;
    receives = !splits || !sends;
    const std::uint32_t place = splits && !sends ? warp - senders : warp;
    first = place * gridDim.x + blockIdx.x;
    step = (splits && !sends ? warps - senders : senders) * gridDim.x;
  }
  /// Whether the warp sends a group at all.
  __device__ __forceinline__ bool leads() const { return sends && first < groups; }
  /// The group to load while the epoch is on its way; one without words in a warp that sends none.
  /// Without a branch: nothing behind one would be under way before the epoch has come.
  __device__ __forceinline__ std::uint32_t ahead() const { return leads() ? first : groups; }
};

/// The threads of the warp whose lines hold payload. Brings the warp together, so that a store of
/// whole lines that follows is one instruction.
__device__ __forceinline__ unsigned line_mask(const LinePart& part, std::uint32_t words) {
  return __ballot_sync(kFullWarp, part.line * kLineWords < words);
}
__device__ __forceinline__ bool is_in(unsigned mask) {
  return (mask >> (threadIdx.x & 31U) & 1U) != 0;
}

/// What a thread sends of a group of lines: two words for each peer, by k, or two for all.
template <int kPairs>
struct LineWords {
  uint2 first[kPairs];
  uint2 second[kPairs];
};

/// Two words for each peer where the number of ranks is a constant; elsewhere they are loaded when
/// they are sent.
template <int kRanks>
using PeerLineWords = LineWords<(kRanks > 0 ? kRanks : 1)>;

/// What differs by peer: `word_for(rank, word)` is a word of what the rank shall have.
template <int kRanks, class WordFor>
__device__ __forceinline__ PeerLineWords<kRanks> load_for_peers(const Group<kRanks>& g,
                                                                std::uint32_t words,
                                                                std::uint32_t group,
                                                                const WordFor& word_for) {
  const LinePart part(group);
  const bool has_second = !part.flag && part.word + 1 < words;
  PeerLineWords<kRanks> loaded = {};
#pragma unroll
  for (int k = 1; k < kRanks; ++k) {
    const int rank = g.rank_at(k);
    loaded.first[k] = part.word < words ? word_for(rank, part.word) : make_uint2(0, 0);
    loaded.second[k] = has_second ? word_for(rank, part.word + 1) : make_uint2(0, 0);
  }
  return loaded;
}

template <int kRanks, class WordFor>
__device__ __forceinline__ void send_to_peers(const Group<kRanks>& g, const Call& c,
                                              std::uint32_t words, std::uint32_t group,
                                              const PeerLineWords<kRanks>& loaded,
                                              const WordFor& word_for) {
  const LinePart part(group);
  const unsigned mask = line_mask(part, words);
  if (!is_in(mask)) {
    return;
  }
  const bool has_second = !part.flag && part.word + 1 < words;
  const std::int64_t place = line_own_place(g, c, part);
#pragma unroll
  for (int k = 1; k < g.size(); ++k) {
    if constexpr (kRanks > 0) {
      line_store(g.peers[k] + place, loaded.first[k], loaded.second[k], c, part);
    } else {
      const int rank = g.rank_at(k);
      const uint2 first = part.word < words ? word_for(rank, part.word) : make_uint2(0, 0);
      const uint2 second = has_second ? word_for(rank, part.word + 1) : make_uint2(0, 0);
      __syncwarp(mask);
      line_store(g.peers[k] + place, first, second, c, part);
    }
  }
}

/// Sends and receives a call's lines as this warp's role says. `load(group)` gives what the thread
/// sends and `send(group, loaded)` sends it; `receive(group, missing)` polls for it and returns as
/// `poll_in_warp`, and is called again while something is missing.
///
/// @param first  What the thread has loaded of the role's first group, if it leads.
template <int kRanks, class Loaded, class Load, class Send, class Receive>
__device__ __forceinline__ void exchange_lines(const Group<kRanks>& g, const Call& c,
                                               const LineRole& role, const Loaded& first,
                                               const Load& load, const Send& send,
                                               const Receive& receive) {
  if (role.leads()) {
    send(role.first, first);
    for (std::uint32_t i = role.first + role.step; i < role.groups; i += role.step) {
      send(i, load(i));
    }
  }
  if (role.receives) {
    delay_point(g, c, 1);
    Patience patience;
    for (std::uint32_t i = role.first; i < role.groups; i += role.step) {
      std::uint32_t missing = 0;
      while (!receive(i, missing)) {
        if (patience.is_over_in_warp(g, c, missing)) {
          return;
        }
      }
    }
  }
}

// --- host side
// ------------------------------------------------------------------------------------

inline void check_table(const PeerTable& table) {
  require(table.size >= 1 && table.size <= kMaxPeers && table.rank >= 0 &&
              table.rank < table.size && table.layout.ranks == table.size &&
              table.layout.max_blocks >= 1,
          "table",
          "expected a rank of 1 to {} and an inbox for all of them, got rank {} of {} "
          "(inbox of {}) with {} blocks",
          kMaxPeers, table.rank, table.size, table.layout.ranks, table.layout.max_blocks);
}

inline void check_ll_words(const PeerTable& table, std::int64_t words, const char* call) {
  require(words <= table.layout.ll_words, call,
          "needs {} bytes of flag words a peer, the inbox has {}", words * 8,
          table.layout.flag_word_capacity());
}

inline void check_lines(const PeerTable& table, std::int64_t words, const char* call) {
  require(words * 8 <= table.layout.flag_line_capacity(), call,
          "needs {} bytes of flag lines a peer, the inbox has {}", words * 8,
          table.layout.flag_line_capacity());
}

/// What a call asks of an inbox by either path, and what is there: payload bytes a peer.
struct PathNeeds {
  std::int64_t sent = 0;  ///< To all peers together.
  std::int64_t words_needed = 0;
  std::int64_t words_there = 0;
  std::int64_t lines_needed = 0;
  std::int64_t lines_there = 0;
};

/// The table's path, or the other one where the inbox has room for that alone.
inline PeerPath choose_path(std::span<const PathRow> table, const char* call,
                            const PathNeeds& needs) {
  const bool words_fit = needs.words_needed <= needs.words_there;
  const bool lines_fit = needs.lines_needed <= needs.lines_there;
  require(words_fit || lines_fit, call,
          "needs {} bytes a peer, the inbox has {} of flag words and {} of flag lines",
          needs.lines_needed, needs.words_there, needs.lines_there);
  const auto row = std::find_if(table.begin(), table.end(), [&](const PathRow& candidate) {
    return needs.sent <= candidate.max_bytes_sent;
  });
  const bool wants_words = row != table.end() && row->path == PeerPath::flag_word;
  return (wants_words ? words_fit : !lines_fit) ? PeerPath::flag_word : PeerPath::flag_line;
}

/// The same for a call that needs `bytes` a peer by either path.
inline PeerPath choose_path(std::span<const PathRow> table, const char* call,
                            const InboxLayout& layout, std::int64_t bytes) {
  return choose_path(table, call,
                     {.sent = bytes * (layout.ranks - 1),
                      .words_needed = bytes,
                      .words_there = layout.flag_word_capacity(),
                      .lines_needed = bytes,
                      .lines_there = layout.flag_line_capacity()});
}

/// The path that a call of so many words a peer takes, for which the inbox has room: the one given,
/// but flag words where there are none, because an empty call signals nevertheless.
inline PeerPath checked_path(const PeerTable& table, PeerPath path, std::int64_t words,
                             const char* call) {
  if (path == PeerPath::flag_word || words == 0) {
    check_ll_words(table, std::max<std::int64_t>(words, 1), call);
    return PeerPath::flag_word;
  }
  check_lines(table, words, call);
  return PeerPath::flag_line;
}

inline int blocks_of(const PeerTable& table) {
  return limited_blocks(table.layout.max_blocks, table.block_limit);
}

/// The call as the ranks must agree on it. Blocks of one number wait for each other, so the limit
/// on them is part of it.
inline CallSignature signature_of(const PeerTable& table, PeerCall call, DType dtype,
                                  std::int64_t bytes, std::int64_t more = 0) {
  return CallSignature::make(call,
                             {static_cast<std::int64_t>(dtype), blocks_of(table), bytes, more});
}

struct Grid {
  int blocks;
  int threads;  ///< With the last warp.
};

/// Grid of a flag-word kernel: a word a worker while the blocks last, in small blocks first.
inline constexpr int kLlThreads = 512 + kWarp;
inline Grid ll_grid(std::int64_t words, const PeerTable& table) {
  const std::int64_t most = blocks_of(table);
  int threads = words <= 64 ? 64 : 128;
  while (threads < 512 && ceil_div(words, threads) > most) {
    threads *= 2;
  }
  return {static_cast<int>(std::clamp<std::int64_t>(ceil_div(words, threads), 1, most)),
          threads + static_cast<int>(kWarp)};
}

/// Grid of a flag-line kernel: a group of lines a warp while the warps last, spread over all
/// blocks first.
template <int kRanks>
inline constexpr int kLineThreads = kRanks >= 1 && kRanks <= 4 ? 1024 : 512;
template <int kRanks>
Grid line_grid(std::int64_t words, const PeerTable& table) {
  const std::int64_t groups = ceil_div(words, kGroupWords);
  const auto blocks = std::clamp<std::int64_t>(groups, 1, blocks_of(table));
  constexpr std::int64_t kMostWarps = kLineThreads<kRanks> / kWarp - 1;
  const auto warps = std::clamp<std::int64_t>(ceil_div(groups, blocks), 1, kMostWarps);
  return {static_cast<int>(blocks), static_cast<int>((warps + 1) * kWarp)};
}

}  // namespace cohort::cuda::detail
