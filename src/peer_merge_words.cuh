// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "peer_enter.cuh"
#include "peer_merge_lses.cuh"
#include "peer_words.cuh"

// The merge whose payload travels as flag words: for few bytes.

namespace cohort::cuda::detail {
namespace {

/// Merges one word that came as a flag word. False if a wait failed.
template <int kRanks, class T, class Args>
__device__ __forceinline__ bool merge_word(const Group<kRanks>& g, const Call& c, const Args& a,
                                           std::uint32_t word, Patience& patience, bool& all_run) {
  const MergePlace place = a.place(word);
  cover_lse(g, c, a, all_run, a.words, place.row / 2);
  const uint2 own = a.template load<T>(g.rank, place);
  const float own_lse = a.load_lse(g.rank, place.row);
  float scales[Group<kRanks>::kMost];
  uint4 values[kBatch<kRanks>] = {};
  const auto receive = [&](int r0) {
    uint4 lses[kBatch<kRanks>] = {};
    return await(g, c, patience, [&] {
      std::uint32_t missing = 0;
#pragma unroll
      for (int j = 0; j < kBatch<kRanks>; ++j) {
        const bool wanted = is_peer(g, r0 + j);
        ll_load_if(wanted, g.own() + ll_place(g, c, r0 + j, word), values[j]);
        ll_load_if(wanted, g.own() + ll_place(g, c, r0 + j, a.words + place.row / 2), lses[j]);
      }
#pragma unroll
      for (int j = 0; j < kBatch<kRanks>; ++j) {
        const int r = r0 + j;
        const bool differs =
            is_peer(g, r) && (ll_differs(values[j], c) | ll_differs(lses[j], c)) != 0;
        missing |= differs ? 1U << r : 0U;
        if (r < g.size()) {
          scales[r] = r == g.rank ? own_lse : lse_of(lses[j], place.row);
        }
      }
      return missing;
    });
  };
  for (int r0 = 0; r0 < g.size(); r0 += kBatch<kRanks>) {
    if (!receive(r0)) {
      return false;
    }
  }
  const float merged_lse = merge_scales(scales, g.size(), a.base, a.load_sink(g.rank, place.row));
  WeightedSum<T> sum;
  for (int r0 = 0; r0 < g.size(); r0 += kBatch<kRanks>) {
#pragma unroll
    for (int j = 0; j < kBatch<kRanks>; ++j) {
      const int r = r0 + j;
      if (r < g.size()) {
        // More ranks than one batch: their words are there, read them again.
        const uint4 value =
            kRanks > 0 || r == g.rank ? values[j] : ll_load(g.own() + ll_place(g, c, r, word));
        sum.add(scales[r], r == g.rank ? own : make_uint2(value.x, value.z));
      }
    }
  }
  a.store(place, sum.result());
  if (place.byte == 0 && a.merged_lse.base != nullptr) {
    a.store_lse(place.row, merged_lse);
  }
  return true;
}

/// Lane: `words` words of payload, then the LSEs.
template <int kRanks, class T, class Args>
__global__ void __launch_bounds__(kLlThreads, 1)
    merge_word_kernel(const __grid_constant__ Group<kRanks> g, const __grid_constant__ Args a,
                      std::uint32_t lse_words) {
  Call c;
  Patience patience;
  const Found found = begin(g);
  const std::uint32_t first = worker_number();
  const std::uint32_t step = worker_count();
  // The words for all peers, loaded while the epoch is on its way, where their number is a
  // constant.
  uint2 outgoing[kRanks > 0 ? kRanks : 1];
  const auto load = [&](std::uint32_t i) {
    if constexpr (kRanks > 0) {
      const MergePlace place = a.place(i);
#pragma unroll
      for (int k = 1; k < kRanks; ++k) {
        outgoing[k] = a.template load<T>(g.rank_at(k), place);
      }
    }
  };
  if (first < a.words) {
    load(first);
  }
  if (!enter(g, found, c, a.words + lse_words)) {
    return;
  }
  send_lses(g, c, a, a.words, first, lse_words);  // first, because every word of a row needs them
#pragma unroll 1
  for (std::uint32_t i = first; i < a.words;) {
    const std::int64_t place = ll_own_place(g, c, i);
#pragma unroll
    for (int k = 1; k < g.size(); ++k) {
      if (Args::kGeneral && i >= a.words_of(g.rank_at(k))) {
        continue;
      }
      ll_store(g.peers[k] + place,
               kRanks > 0 ? outgoing[k] : a.template load<T>(g.rank_at(k), a.place(i)), c.flag);
    }
    i += step;
    if (i < a.words) {
      load(i);
    }
  }
  delay_point(g, c, 1);
  bool all_run = false;
#pragma unroll 1
  for (std::uint32_t i = first; i < a.words_of(g.rank); i += step) {
    if (!merge_word<kRanks, T>(g, c, a, i, patience, all_run)) {
      return;
    }
  }
  if (a.words_of(g.rank) == 0 && first == 0) {
    await_peers(g, c, a.words, patience);
  }
}

}  // namespace
}  // namespace cohort::cuda::detail
