#pragma once

#include <cstddef>
#include <cstdint>

#include "elements.cuh"

// What peer kernels are made of: entering a call, flag words, block flags and bounded waits.
//
// Memory order. Four kinds of words are written by one rank and awaited by another; `volatile`
// accesses in PTX are relaxed with system scope (PTX ISA, "Memory Consistency Model").
//
//  1. Flag words (ll_store, ll_load). Flag and payload share one 8-byte half of a 16-byte aligned
//     vector access, so whoever sees the flag sees the payload; nothing else is released by it. The
//     halves are checked apart: no atomicity beyond 8 bytes is assumed. NCCL's LL protocol rests on
//     the same property (NCCL, src/device/prims_ll.h).
//  2. Block flags (signal_chunk, wait_chunk). The block's payload stores happen before
//     __syncthreads(), which orders them before the signalling thread's st.release.sys (release is
//     cumulative over the barrier). The waiting thread's ld.acquire.sys that observes it, then
//     __syncthreads(), order them before the block's payload loads.
//  3. The epoch. Written by one thread of the launch after all blocks have read it
//     (advance_epoch); read by the next launch, behind cudaGridDependencySynchronize(), which
//     waits for the completion of the writing launch and its memory.
//  4. The error word. Relaxed: it carries its whole meaning in itself.
//
// Reuse of a slot needs reads of epoch e to be over before stores of e+2 land; inbox.hpp says why
// they are. The link from a kernel's reads to the next kernel's signal is the kernel boundary.

namespace cohort::cuda::detail {

/// One call, as a thread sees it.
struct Call {
  std::uint64_t epoch;
  std::uint32_t flag;  ///< Lower half of the epoch: what flag words carry.
  std::uint32_t slot;
};

__device__ __forceinline__ InboxControl* control(std::byte* inbox) {
  return reinterpret_cast<InboxControl*>(inbox);
}

__device__ __forceinline__ std::uint64_t global_time() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

/// For tests: some blocks, at some epochs, wait up to some ten microseconds.
static __device__ __noinline__ void delay_randomly(std::uint32_t seed, int rank, std::uint32_t flag,
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

__device__ __forceinline__ void delay_point(const PeerTable& t, const Call& c,
                                            std::uint32_t point) {
  if (t.delay_seed != 0) {
    delay_randomly(t.delay_seed, t.rank, c.flag, point);
  }
}

static_assert(offsetof(InboxControl, epoch) == 0 && offsetof(InboxControl, error) == 8,
              "read_epoch() reads both in one load");

/// First statement of every peer kernel, in all threads. Loads of what earlier work has written may
/// follow at once; `read_epoch` comes before the first store that a peer sees.
__device__ __forceinline__ void begin() {
  // Before the first load that depends on earlier work and before the first remote store. Reached
  // by every thread, also of failing groups: otherwise this launch could complete before its
  // predecessor and its successor would see neither's memory.
  cudaGridDependencySynchronize();
}

/// The call's epoch. False if the group has failed.
__device__ __forceinline__ bool read_epoch(const PeerTable& t, Call& c) {
  std::uint64_t previous;
  std::uint64_t error;
  asm volatile("ld.volatile.global.v2.u64 {%0,%1},[%2];"
               : "=l"(previous), "=l"(error)
               : "l"(&control(t.peers[t.rank])->epoch)
               : "memory");
  c.epoch = next_epoch(previous);
  c.flag = static_cast<std::uint32_t>(c.epoch);
  c.slot = c.flag & 1U;
  delay_point(t, c, 0);
  return error == 0;
}

// --- addresses
// ------------------------------------------------------------------------------------

__device__ __forceinline__ std::byte* ll_lane(const PeerTable& t, int at, std::uint32_t slot,
                                              int source) {
  return t.peers[at] + t.layout.ll_offset +
         (static_cast<std::int64_t>(slot) * t.size + source) * t.layout.ll_words * 16;
}

__device__ __forceinline__ std::byte* bulk_lane(const PeerTable& t, int at, std::uint32_t slot,
                                                int lane) {
  return t.peers[at] + t.layout.bulk_offset +
         (static_cast<std::int64_t>(slot) * t.size + lane) * t.layout.bulk_lane_bytes;
}

__device__ __forceinline__ std::uint64_t* block_flag(const PeerTable& t, int at, std::uint32_t slot,
                                                     int source) {
  return reinterpret_cast<std::uint64_t*>(
      t.peers[at] + t.layout.flags_offset +
      ((static_cast<std::int64_t>(slot) * t.size + source) * t.layout.max_blocks + blockIdx.x) *
          16);
}

// --- the epoch
// ------------------------------------------------------------------------------------

/// Makes this call's epoch the last one and wipes one old flag word a lane. All threads of all
/// blocks, once, off the critical path: after the sends. Contains __syncthreads().
///
/// @param ll_used  Words of each lane that this call uses; the same on all ranks.
///
/// The epoch: every thread has used the value that it read (in its first stores, or in the branch
/// on the error word) before __syncthreads(), thread 0's arrival comes after, and the store depends
/// on the last arrival. So a read that returned the new epoch would have to depend on itself, which
/// PTX excludes ("No-Thin-Air"), and no block of this launch observes it. The arrival is relaxed on
/// purpose: acquire-release would first wait for the sends to be acknowledged by the peers. One
/// word serves launches of every grid size.
///
/// Wiping: a flag word could match by accident if it was last written 2^32 epochs ago. Call e
/// clears word (e/2 mod ll_words) of every lane of its own slot unless the call uses that word, in
/// which case it is written with e. Nobody else touches an unused word of slot e until a peer
/// reaches e+2. So every word is 0 or at most 2*ll_words epochs old.
__device__ __forceinline__ void advance_epoch(const PeerTable& t, const Call& c,
                                              std::uint32_t ll_used) {
  InboxControl* own = control(t.peers[t.rank]);
  __syncthreads();
  if (threadIdx.x == 0) {
    bool last = true;
    if (gridDim.x > 1) {
      std::uint32_t before;
      asm volatile("atom.relaxed.gpu.global.inc.u32 %0,[%1],%2;"
                   : "=r"(before)
                   : "l"(&own->arrived), "r"(gridDim.x - 1)
                   : "memory");
      last = before == gridDim.x - 1;  // and `arrived` is 0 again
    }
    if (last) {
      asm volatile("st.volatile.global.u64 [%0],%1;" ::"l"(&own->epoch), "l"(c.epoch) : "memory");
    }
  } else if (blockIdx.x == 0 && threadIdx.x <= static_cast<unsigned>(t.size)) {
    const std::uint32_t word =
        static_cast<std::uint32_t>(c.epoch >> 1) % static_cast<std::uint32_t>(t.layout.ll_words);
    if (word >= ll_used) {
      std::byte* lane = ll_lane(t, t.rank, c.slot, static_cast<int>(threadIdx.x) - 1);
      *reinterpret_cast<uint4*>(lane + std::int64_t{16} * word) = make_uint4(0, 0, 0, 0);
    }
  }
}

// --- bounded waits
// --------------------------------------------------------------------------------

/// Sets the own error word, unless it is set, and pushes it to every peer: late ones then leave at
/// entry, and those that wait in this call leave at their next look.
static __device__ __noinline__ void report_missing(const PeerTable& t, std::uint64_t epoch,
                                                   int missing) {
  const std::uint64_t word = InboxError::encode(epoch, missing);
  auto* own = reinterpret_cast<unsigned long long*>(&control(t.peers[t.rank])->error);
  if (atomicCAS_system(own, 0ULL, static_cast<unsigned long long>(word)) != 0) {
    return;
  }
  for (int p = 0; p < t.size; ++p) {
    if (p != t.rank) {
      asm volatile("st.volatile.global.u64 [%0],%1;" ::"l"(&control(t.peers[p])->error), "l"(word)
                   : "memory");
    }
  }
}

inline constexpr std::uint64_t kWaitIsOver = ~std::uint64_t{0};

/// Looks at the error word and the clock. Returns when the wait began, or kWaitIsOver.
static __device__ __noinline__ std::uint64_t look_at_clock(const PeerTable& t, std::uint64_t epoch,
                                                           int missing, std::uint64_t start) {
  const volatile InboxControl* own = control(t.peers[t.rank]);
  if (own->error != 0) {
    return kWaitIsOver;
  }
  const std::uint64_t now = global_time();
  if (start == 0) {
    return now;
  }
  if (now - start < own->limit_ns) {
    return start;
  }
  report_missing(t, epoch, missing);
  return kWaitIsOver;
}

/// How long a thread goes on polling.
class Patience {
 public:
  /// After a poll that missed rank `missing`. True if the wait is over: the limit is reached, or
  /// another thread or rank has failed.
  __device__ __forceinline__ bool is_over(const PeerTable& t, const Call& c, int missing) {
    if ((++polls_ % kPollsPerLook) != 0) {
      return false;
    }
    start_ = look_at_clock(t, c.epoch, missing, start_);
    return start_ == kWaitIsOver;
  }

 private:
  static constexpr std::uint32_t kPollsPerLook = 256;
  std::uint32_t polls_ = 0;
  std::uint64_t start_ = 0;
};

// --- flag words
// -----------------------------------------------------------------------------------

__device__ __forceinline__ void ll_store(std::byte* lane, std::uint32_t word, uint2 value,
                                         std::uint32_t flag) {
  asm volatile(
      "st.volatile.global.v4.u32 [%0],{%1,%2,%3,%4};" ::"l"(lane + std::int64_t{16} * word),
      "r"(value.x), "r"(flag), "r"(value.y), "r"(flag)
      : "memory");
}

__device__ __forceinline__ uint4 ll_load(const std::byte* lane, std::uint32_t word) {
  uint4 v;
  asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(lane + std::int64_t{16} * word)
               : "memory");
  return v;
}

/// Ranks that a thread polls at once: all of them where the number is a constant.
template <int kRanks>
inline constexpr int kBatch = kRanks > 0 ? kRanks : 8;

template <int kRanks>
__device__ __forceinline__ int ranks_of(const PeerTable& t) {
  return kRanks > 0 ? kRanks : t.size;
}

/// Sends one word to the same place of every peer's inbox.
template <int kRanks>
__device__ __forceinline__ void ll_send_all(const PeerTable& t, const Call& c, std::uint32_t word,
                                            uint2 value) {
#pragma unroll
  for (int p = 0; p < ranks_of<kRanks>(t); ++p) {
    if (p != t.rank) {
      ll_store(ll_lane(t, p, c.slot, t.rank), word, value, c.flag);
    }
  }
}

/// Waits for the given words from ranks [first, first + kBatch) but this one, and returns their
/// payload: values[k][j] is word k of rank first + j. All loads of a round are in flight together.
/// False if the wait failed.
template <int kRanks, int kWords>
__device__ __forceinline__ bool ll_receive(const PeerTable& t, const Call& c, int first,
                                           const std::uint32_t (&words)[kWords],
                                           uint2 (&values)[kWords][kBatch<kRanks>],
                                           Patience& patience) {
  const int n = ranks_of<kRanks>(t);
  const std::byte* lane = ll_lane(t, t.rank, c.slot, first);
  const std::int64_t lane_bytes = t.layout.ll_words * 16;
  while (true) {
    std::uint32_t wrong = 0;
    int missing = first;
#pragma unroll
    for (int j = 0; j < kBatch<kRanks>; ++j) {
      if (first + j < n && first + j != t.rank) {
        std::uint32_t differs = 0;
#pragma unroll
        for (int k = 0; k < kWords; ++k) {
          const uint4 v = ll_load(lane + j * lane_bytes, words[k]);
          values[k][j] = make_uint2(v.x, v.z);
          differs |= (v.y ^ c.flag) | (v.w ^ c.flag);
        }
        missing = differs != 0 ? first + j : missing;
        wrong |= differs;
      }
    }
    if (wrong == 0) {
      return true;
    }
    if (patience.is_over(t, c, missing)) {
      return false;
    }
  }
}

// --- block flags
// ----------------------------------------------------------------------------------

/// Tells every peer's block of the same index that this block's chunk is complete. Flags grow
/// within an epoch and with epochs (48 bits of them), so `>=` needs no wiping. All threads of the
/// block.
__device__ __forceinline__ void signal_chunk(const PeerTable& t, const Call& c,
                                             std::uint32_t chunk) {
  __syncthreads();
  const int p = static_cast<int>(threadIdx.x);
  if (p < t.size && p != t.rank) {
    asm volatile("st.release.sys.global.u64 [%0],%1;" ::"l"(block_flag(t, p, c.slot, t.rank)),
                 "l"((c.epoch << 16) | (chunk + 1))
                 : "memory");
  }
}

/// Waits for the same chunk of every peer. All threads of the block; false in all if it failed.
__device__ __forceinline__ bool wait_chunk(const PeerTable& t, const Call& c, std::uint32_t chunk,
                                           Patience& patience) {
  bool failed = false;
  const int p = static_cast<int>(threadIdx.x);
  if (p < t.size && p != t.rank) {
    const std::uint64_t* flag = block_flag(t, t.rank, c.slot, p);
    while (true) {
      std::uint64_t value;
      asm volatile("ld.acquire.sys.global.u64 %0,[%1];" : "=l"(value) : "l"(flag) : "memory");
      if (value >= ((c.epoch << 16) | (chunk + 1))) {
        break;
      }
      if (patience.is_over(t, c, p)) {
        failed = true;
        break;
      }
    }
  }
  return __syncthreads_or(failed ? 1 : 0) == 0;
}

/// The first words that a thread sends to each rank, loaded while the epoch is on its way. Where
/// the number of ranks is no constant nothing is loaded ahead.
template <int kRanks>
class Ahead {
 public:
  /// `load(p)` is the word for rank p.
  template <class Load>
  __device__ __forceinline__ Ahead(const PeerTable& t, bool any, const Load& load) {
    if constexpr (kRanks > 0) {
#pragma unroll
      for (int p = 0; p < kRanks; ++p) {
        words_[p] = any && p != t.rank ? load(p) : make_uint2(0, 0);
      }
    }
  }

  /// The word for rank p if `is_first`, otherwise a fresh one.
  template <class Load>
  __device__ __forceinline__ uint2 get(int p, bool is_first, const Load& load) const {
    if constexpr (kRanks > 0) {
      if (is_first) {
        return words_[p];
      }
    }
    return load(p);
  }

 private:
  uint2 words_[kRanks > 0 ? kRanks : 1];
};

// --- host side
// ------------------------------------------------------------------------------------

inline void check_table(const PeerTable& table) {
  require(table.size >= 1 && table.size <= kMaxPeers && table.rank >= 0 &&
              table.rank < table.size && table.layout.ranks == table.size &&
              table.max_blocks >= 1 && table.max_blocks <= table.layout.max_blocks,
          "table",
          fmt::format("expected a rank of 1 to {} and at most {} blocks, got rank {} of {} "
                      "(inbox of {}) with {} blocks",
                      kMaxPeers, table.layout.max_blocks, table.rank, table.size,
                      table.layout.ranks, table.max_blocks));
}

inline void check_ll_words(const PeerTable& table, std::int64_t words, const char* call) {
  require(words <= table.layout.ll_words, call,
          fmt::format("needs {} bytes of flag words a peer, the inbox has {}", words * 8,
                      table.layout.ll_words * 8));
}

/// Blocks of 256 threads that kernels with chunks have on a multiprocessor, guaranteed by their
/// launch bounds.
inline constexpr int kBulkThreads = 256;
inline constexpr int kBulkBlocksPerSm = 2;
inline constexpr std::int64_t kChunkBytes = 16 << 10;  ///< Per peer: four vectors a thread.
inline constexpr int kChunkUnroll = static_cast<int>(kChunkBytes / 16 / kBulkThreads);

/// Upper limit of such a kernel's blocks: all of them are resident, as `max_blocks` are of any
/// kernel.
inline int bulk_blocks(const PeerTable& table) {
  return std::min(table.max_blocks * kBulkBlocksPerSm, table.layout.max_blocks);
}

/// Grid of a flag-word kernel: a word a thread while the blocks last. At least 64 threads, because
/// threads 1 to n of the first block wipe.
struct Grid {
  int blocks;
  int threads;
};
inline constexpr int kLlThreads = 512;
inline Grid ll_grid(std::int64_t words, int max_blocks) {
  const int threads = words <= kLlThreads
                          ? static_cast<int>(std::max<std::int64_t>(64, ceil_div(words, 32) * 32))
                          : 256;
  return {static_cast<int>(std::clamp<std::int64_t>(ceil_div(words, threads), 1, max_blocks)),
          threads};
}

}  // namespace cohort::cuda::detail
