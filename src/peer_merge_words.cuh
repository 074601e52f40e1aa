// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "peer_enter.cuh"
#include "peer_merge_lses.cuh"
#include "peer_words.cuh"

// The merge whose payload travels as flag words: for few bytes.

namespace cohort::cuda::detail {
namespace {

/// Where the LSEs of a warp's 32 words travel: behind the payload, `lse_slots` for each 32 words of
/// it. A warp sends those of its own words' rows, one a thread, together with the words, so that
/// none waits for another warp.
template <class Args>
struct LseSlot {
  std::uint32_t chunk;      ///< First of the warp's words.
  std::uint32_t first_row;  ///< Of those.
  std::uint32_t at;         ///< Where the first slot lies in each lane.
  std::uint32_t row;        ///< Whose LSE this thread sends,
  bool sends;               ///< if any.

  __device__ __forceinline__ LseSlot(const Args& a, std::uint32_t word)
      : chunk(word & ~(kWarp - 1)),
        first_row(a.words_per_row.divide(chunk)),
        at(a.words + chunk / kWarp * a.lse_slots),
        row(first_row + (word - chunk)),
        sends(word - chunk < a.lse_slots && chunk < max(a.words, 1U)) {}

  __device__ __forceinline__ std::uint32_t place_of(std::uint32_t of_row) const {
    return at + (of_row - first_row);
  }
  /// Whether it goes to a rank, which merges so many words: the first one always does, because an
  /// empty call signals nevertheless.
  __device__ __forceinline__ bool goes_to(std::uint32_t words) const {
    return sends && chunk < max(words, 1U);
  }
};

/// Merges one word that came as a flag word. False if a wait failed.
template <int kRanks, class T, class Args>
__device__ __forceinline__ bool merge_word(const Group<kRanks>& g, const Call& c, const Args& a,
                                           std::uint32_t word, uint2 own, float own_lse,
                                           Patience& patience) {
  const MergePlace place = a.place(word);
  const std::uint32_t lse_place = LseSlot<Args>(a, word).place_of(place.row);
  std::byte* const to = a.target(place);  // worked out before the word has come
  // One peer of two ranks, one load; else all ranks of a batch but this one.
  constexpr int kPolled = kRanks == 2 ? 1 : kBatch<kRanks>;
  const auto rank_of = [&](int r0, int j) { return kRanks == 2 ? g.rank ^ 1 : r0 + j; };
  float scales[Group<kRanks>::kMost];
  uint4 values[kPolled] = {};
  const auto receive = [&](int r0) {
    uint4 lses[kPolled] = {};
    const bool there = await(g, c, patience, [&] {
      std::uint32_t missing = 0;
#pragma unroll
      for (int j = 0; j < kPolled; ++j) {
        const int r = rank_of(r0, j);
        const bool wanted = kRanks == 2 || is_peer(g, r);
        ll_load_if(wanted, g.own() + ll_place(g, c, r, word), values[j]);
        ll_load_if(wanted, g.own() + ll_place(g, c, r, lse_place), lses[j]);
      }
#pragma unroll
      for (int j = 0; j < kPolled; ++j) {
        const int r = rank_of(r0, j);
        const bool differs = (kRanks == 2 || is_peer(g, r)) &&
                             (ll_differs(values[j], c) | ll_differs(lses[j], c)) != 0;
        missing |= differs ? 1U << r : 0U;
      }
      return missing;
    });
#pragma unroll
    for (int j = 0; j < kBatch<kRanks>; ++j) {
      const int r = r0 + j;
      if (r < g.size()) {
        scales[r] = r == g.rank ? own_lse : __uint_as_float(lses[kRanks == 2 ? 0 : j].x);
      }
    }
    return there;
  };
  for (int r0 = 0; r0 < g.size(); r0 += kBatch<kRanks>) {
    if (!receive(r0)) {
      return false;
    }
  }
  const dcp::RowMass mass = merge_scales(scales, g.size(), a.base, a.load_sink(g.rank, place.row));
  WeightedSum<T> sum;
  for (int r0 = 0; r0 < g.size(); r0 += kBatch<kRanks>) {
#pragma unroll
    for (int j = 0; j < kBatch<kRanks>; ++j) {
      const int r = r0 + j;
      if (r < g.size()) {
        // More ranks than one batch: their words are there, read them again.
        const uint4 value = kRanks > 0 || r == g.rank ? values[kRanks == 2 ? 0 : j]
                                                      : ll_load(g.own() + ll_place(g, c, r, word));
        sum.add(scales[r], r == g.rank ? own : make_uint2(value.x, value.z));
      }
    }
  }
  a.store(to, sum.result());
  if (place.byte == 0 && a.merged_lse.base != nullptr) {
    a.store_lse(place.row, mass_lse(mass, a.base));
  }
  return true;
}

/// Sends a word, and an LSE where the thread has one, to every peer.
template <int kRanks, class T, class Args>
__device__ __forceinline__ void send_word(const Group<kRanks>& g, const Call& c, const Args& a,
                                          std::uint32_t word) {
  const LseSlot<Args> slot(a, word);
  const std::int64_t place = ll_own_place(g, c, word);
  const std::int64_t lse_place = ll_own_place(g, c, slot.place_of(slot.row));
#pragma unroll
  for (int k = 1; k < g.size(); ++k) {
    const int rank = g.rank_at(k);
    const std::uint32_t words = a.words_of(rank);
    if (slot.goes_to(words)) {
      const float lse = a.load_lse_if(slot.row < a.rows_of(rank), rank, slot.row);
      ll_store(g.peers[k] + lse_place, make_uint2(__float_as_uint(lse), 0), c.flag);
    }
    if (word < words) {
      ll_store(g.peers[k] + place, a.template load<T>(rank, a.place(word)), c.flag);
    }
  }
}

/// Lane: `words` words of payload, then the LSEs.
template <int kRanks, class T, class Args>
__global__ void __launch_bounds__(kLlThreads, 1)
    merge_word_kernel(const __grid_constant__ Group<kRanks> g, const __grid_constant__ Args a,
                      std::uint32_t lse_words) {
  Call c;
  Patience patience;
  const std::uint32_t first = worker_number();
  const std::uint32_t step = worker_count();
  const bool ahead = kRanks > 0 && threadIdx.x < workers();
  const LseSlot<Args> slot(a, first);
  const MergePlace at = a.place(first);
  const FirstPlaces<kRanks> places(g, first);
  const std::int64_t to_lse = std::int64_t{16} * (slot.place_of(slot.row) - first);
  const Found found = begin(g);
  // What a thread sends first, loaded while the epoch is on its way.
  uint2 words[Group<kRanks>::kMost];
  float lses[Group<kRanks>::kMost];
#pragma unroll
  for (int k = 1; k < kRanks; ++k) {
    const int rank = g.rank_at(k);
    words[k] = a.template load_if<T>(ahead && first < a.words_of(rank), rank, at);
    lses[k] = a.load_lse_if(ahead && slot.sends && slot.row < a.rows_of(rank), rank, slot.row);
  }
  const auto send_first = [&](bool wanted) {
#pragma unroll
    for (int k = 1; k < kRanks; ++k) {
      const std::uint32_t theirs = a.words_of(g.rank_at(k));
      places.store_if(wanted && slot.goes_to(theirs), c, k, make_uint2(__float_as_uint(lses[k]), 0),
                      to_lse);
      places.store_if(wanted && first < theirs, c, k, words[k]);
    }
  };
  if (!enter(g, found, c, a.words + lse_words, send_first)) {
    return;
  }
#pragma unroll 1
  for (std::uint32_t i = second_word<kRanks>(); (i & ~(kWarp - 1)) < max(a.words, 1U); i += step) {
    send_word<kRanks, T>(g, c, a, i);
  }
  delay_point(g, c, 1);
  const std::uint32_t mine = a.words_of(g.rank);
#pragma unroll 1
  for (std::uint32_t i = first; i < mine; i += step) {
    const MergePlace place = a.place(i);
    const uint2 own = a.template load<T>(g.rank, place);
    const float own_lse = a.load_lse(g.rank, place.row);
    if (!merge_word<kRanks, T>(g, c, a, i, own, own_lse, patience)) {
      return;
    }
  }
  if (mine == 0 && first == 0) {
    await_peers(g, c, a.words, patience);
  }
}

}  // namespace
}  // namespace cohort::cuda::detail
