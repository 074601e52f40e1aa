// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "peer_enter.cuh"
#include "peer_lines.cuh"
#include "peer_merge_args.cuh"

// The LSEs of a merge in lines: they travel as flag words, two in each, and every word of a row
// waits for them.

namespace cohort::cuda::detail {
namespace {

/// The LSEs of rows 2i and 2i+1 of those that `rank` merges.
template <class Args>
__device__ __forceinline__ uint2 load_lses(const Args& a, int rank, std::uint32_t i) {
  const std::uint32_t rows = a.rows_of(rank);
  const float first = 2 * i < rows ? a.load_lse(rank, 2 * i) : 0.0F;
  const float second = 2 * i + 1 < rows ? a.load_lse(rank, 2 * i + 1) : 0.0F;
  return make_uint2(__float_as_uint(first), __float_as_uint(second));
}

/// Sends the LSEs from the start of each lane on: words `first` and every worker_count()th.
template <int kRanks, class Args>
__device__ __forceinline__ void send_lses(const Group<kRanks>& g, const Call& c, const Args& a,
                                          std::uint32_t first, std::uint32_t count) {
  const std::uint32_t step = worker_count();
#pragma unroll 1
  for (std::uint32_t i = first; i < count; i += step) {
    const std::int64_t place = ll_own_place(g, c, i);
#pragma unroll
    for (int k = 1; k < g.size(); ++k) {
      ll_store(g.peers[k] + place, load_lses(a, g.rank_at(k), i), c.flag);
    }
  }
}

/// The first LSEs that a thread sends to each peer, loaded while the epoch is on its way.
template <int kRanks>
struct FirstLses {
  uint2 lses[Group<kRanks>::kMost];
  bool any;

  template <class Args>
  __device__ __forceinline__ FirstLses(const Group<kRanks>& g, const Args& a, std::uint32_t count)
      : any(sends_ahead<kRanks>(count)) {
#pragma unroll
    for (int k = 1; k < kRanks; ++k) {
      lses[k] = any ? load_lses(a, g.rank_at(k), worker_number()) : make_uint2(0, 0);
    }
  }
};

/// Out of line: few blocks come here, in the first moments of a large call.
template <int kRanks, class Args>
static __device__ __noinline__ void send_lse(const Group<kRanks>& g, const Args& a,
                                             std::int64_t place, std::uint32_t flag,
                                             std::uint32_t i) {
#pragma unroll 1
  for (int k = 1; k < g.size(); ++k) {
    ll_store(g.peers[k] + place, load_lses(a, g.rank_at(k), i), flag);
  }
}

/// Sends the LSE word `i` that a thread is about to wait for itself, where the block that was to
/// send it may not run yet: behind a block that waits for it, it might never. So a block needs its
/// peers' block of the same number alone, and a merge gets on with one multiprocessor. A word that
/// is sent twice is the same.
///
/// @param all_run  What an earlier call found: whether all blocks run.
template <int kRanks, class Args>
__device__ __forceinline__ void cover_lse(const Group<kRanks>& g, const Call& c, const Args& a,
                                          bool& all_run, std::uint32_t i) {
  if (i >= (blockIdx.x + 1) * workers() && !all_run) {
    all_run = all_arrived(g, c);
    if (!all_run) {
      send_lse(g, a, ll_own_place(g, c, i), c.flag, i);
    }
  }
}

/// The same for all rows of a group of lines, in a whole warp.
template <int kRanks, class Args>
__device__ __forceinline__ void cover_lses(const Group<kRanks>& g, const Call& c, const Args& a,
                                           bool& all_run, std::uint32_t group) {
  const std::uint32_t first_word = group * kGroupWords;
  const std::uint32_t last_row =
      a.words_per_row.divide(min(first_word + kGroupWords, a.words_of(g.rank)) - 1);
  if (last_row / 2 < (blockIdx.x + 1) * workers()) {
    return;  // its own block or an earlier one has sent them
  }
  const std::uint32_t row = a.words_per_row.divide(first_word) + (threadIdx.x & 31U);
  if (row <= last_row) {
    cover_lse(g, c, a, all_run, row / 2);
  }
  __syncwarp();
}

__device__ __forceinline__ float lse_of(uint4 flag_word, std::uint32_t row) {
  return __uint_as_float((row & 1U) != 0 ? flag_word.z : flag_word.x);
}

/// Where this rank merges nothing, it waits for the first LSE word of every peer: a call that has
/// ended proves that they have entered it.
template <int kRanks>
__device__ __forceinline__ void await_peers(const Group<kRanks>& g, const Call& c, std::uint32_t at,
                                            Patience& patience) {
  for (int r0 = 0; r0 < g.size(); r0 += kBatch<kRanks>) {
    uint2 values[kBatch<kRanks>];
    if (!ll_receive(g, c, r0, at, values, patience)) {
      return;
    }
  }
}

}  // namespace
}  // namespace cohort::cuda::detail
