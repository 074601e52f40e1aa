// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "peer_enter.cuh"
#include "peer_lines.cuh"
#include "peer_merge_lses.cuh"

// The merge whose payload travels in lines: for many bytes.

namespace cohort::cuda::detail {
namespace {

/// Merges a group of lines. A group spans at most 31 rows, because a row has at least two words:
/// thread i has the LSEs of the group's row i and hands their scales to those that need them.
/// Returns as `poll_in_warp`.
template <int kRanks, class T, class Args>
__device__ __forceinline__ bool merge_lines(const Group<kRanks>& g, const Call& c, const Args& a,
                                            std::uint32_t group, std::uint32_t& missed) {
  const LinePart part(group);
  const std::uint32_t words = a.words_of(g.rank);
  const std::uint32_t first_word = group * kGroupWords;
  const std::uint32_t last_word = min(first_word + kGroupWords, words) - 1;
  const std::uint32_t first_row = a.words_per_row.divide(first_word);
  const std::uint32_t row = first_row + (threadIdx.x & 31U);
  const bool has_row = row <= a.words_per_row.divide(last_word);
  const bool has_line = part.line * kLineWords < words;
  const bool has_first = part.word < words;
  const bool has_second = !part.flag && part.word + 1 < words;
  const MergePlace first_place = a.place(has_first ? part.word : first_word);
  const MergePlace second_place = a.place(has_second ? part.word + 1 : first_word);
  // Worked out before the lines have come.
  std::byte* const first_to = a.target(first_place);
  std::byte* const second_to = a.target(second_place);
  uint2 own_first;
  uint2 own_second;
  if constexpr (Args::kGeneral) {
    a.template load_lines<T>(g.rank, group, own_first, own_second);
  } else {
    own_first = a.template load<T>(g.rank, first_place);
    own_second = a.template load<T>(g.rank, second_place);
  }
  const float own_lse = has_row ? a.load_lse(g.rank, row) : 0.0F;
  // One peer of two ranks, one load; else all ranks of a batch but this one.
  constexpr int kPolled = kRanks == 2 ? 1 : kBatch<kRanks>;
  const auto rank_of = [&](int r0, int j) { return kRanks == 2 ? g.rank ^ 1 : r0 + j; };
  float scales[Group<kRanks>::kMost];
  uint4 values[kPolled] = {};
  const auto receive = [&](int r0, bool again) {
    uint4 lses[kPolled] = {};
    const bool there = poll_in_warp(missed, [&] {
      std::uint32_t missing = 0;
#pragma unroll
      for (int j = 0; j < kPolled; ++j) {
        const int r = rank_of(r0, j);
        const bool wanted = kRanks == 2 || is_peer(g, r);
        ll_load_if(wanted && has_line, g.own() + line_place(g, c, r, part), values[j]);
        ll_load_if(wanted && has_row && !again, g.own() + ll_place(g, c, r, row / 2), lses[j]);
      }
#pragma unroll
      for (int j = 0; j < kPolled; ++j) {
        const int r = rank_of(r0, j);
        std::uint32_t differs = 0;
        if (kRanks == 2 || is_peer(g, r)) {
          differs = (has_line ? line_differs(values[j], c, part) : 0) |
                    (has_row && !again ? ll_differs(lses[j], c) : 0);
        }
        missing |= differs != 0 ? 1U << r : 0U;
      }
      return missing;
    });
#pragma unroll
    for (int j = 0; j < kBatch<kRanks>; ++j) {
      const int r = r0 + j;
      if (r < g.size() && !again) {
        scales[r] = r == g.rank ? own_lse : lse_of(lses[kRanks == 2 ? 0 : j], row);
      }
    }
    return there;
  };
  for (int r0 = 0; r0 < g.size(); r0 += kBatch<kRanks>) {
    if (!receive(r0, false)) {
      return false;
    }
  }
  dcp::RowMass mass;
  if (has_row) {
    mass = merge_scales(scales, g.size(), a.base, a.load_sink(g.rank, row));
  }
  WeightedSum<T> first_sum;
  WeightedSum<T> second_sum;
  for (int r0 = 0; r0 < g.size(); r0 += kBatch<kRanks>) {
    if (kRanks == 0 && !receive(r0, true)) {
      return false;  // more ranks than one batch: the lines are there already, read them again
    }
#pragma unroll
    for (int j = 0; j < kBatch<kRanks>; ++j) {
      const int r = r0 + j;
      if (r < g.size()) {
        const auto scale_of = [&](const MergePlace& place) {
          return __shfl_sync(kFullWarp, scales[r], static_cast<int>(place.row - first_row));
        };
        const uint4 value = values[kRanks == 2 ? 0 : j];
        first_sum.add(scale_of(first_place), r == g.rank ? own_first : low(value));
        second_sum.add(scale_of(second_place), r == g.rank ? own_second : high(value));
      }
    }
  }
  if (has_first) {
    a.store(first_to, first_sum.result());
  }
  if (has_second) {
    a.store(second_to, second_sum.result());
  }
  // The group with a row's first word has the row.
  if (has_row && a.merged_lse.base != nullptr && row * a.words_per_row.divisor >= first_word) {
    a.store_lse(row, mass_lse(mass, a.base));
  }
  return true;
}

/// What a thread sends of a group of lines, where the number of ranks is a constant.
template <int kRanks, class T, class Args>
__device__ __forceinline__ PeerLineWords<kRanks> load_rows(const Group<kRanks>& g, const Args& a,
                                                           std::uint32_t group) {
  if constexpr (Args::kGeneral) {
    PeerLineWords<kRanks> loaded = {};
#pragma unroll
    for (int k = 1; k < kRanks; ++k) {
      a.template load_lines<T>(g.rank_at(k), group, loaded.first[k], loaded.second[k]);
    }
    return loaded;
  } else {
    return load_for_peers(g, a.words, group, [&](int rank, std::uint32_t word) {
      return a.template load<T>(rank, a.place(word));
    });
  }
}

/// Sends each peer a group of the lines that it merges.
template <int kRanks, class T, class Args>
__device__ __forceinline__ void send_rows(const Group<kRanks>& g, const Call& c, const Args& a,
                                          std::uint32_t group,
                                          const PeerLineWords<kRanks>& loaded) {
  if constexpr (Args::kGeneral) {
    const LinePart part(group);
    const std::int64_t place = line_own_place(g, c, part);
#pragma unroll 1
    for (int k = 1; k < g.size(); ++k) {
      const int rank = g.rank_at(k);
      uint2 first = loaded.first[0];
      uint2 second = loaded.second[0];
      if constexpr (kRanks == 2) {
        first = loaded.first[1];
        second = loaded.second[1];
      } else {
        a.template load_lines<T>(rank, group, first, second);
      }
      if (is_in(line_mask(part, a.words_of(rank)))) {
        line_store(g.peers[k] + place, first, second, c, part);
      }
      __syncwarp();
    }
  } else {
    send_to_peers(g, c, a.words, group, loaded, [&](int rank, std::uint32_t word) {
      return a.template load<T>(rank, a.place(word));
    });
  }
}

/// Payload in lines, LSEs in flag words.
template <int kRanks, class T, class Args>
__global__ void __launch_bounds__(kLineThreads<kRanks>, 1)
    merge_line_kernel(const __grid_constant__ Group<kRanks> g, const __grid_constant__ Args a,
                      std::uint32_t lse_words) {
  // Where ranks merge as many words each, the first ones are on their way as soon as the epoch is
  // there.
  constexpr bool kAhead = kRanks > 0 && !Args::kGeneral;
  Call c;
  const LineRole role(a.words);
  const auto load = [&](std::uint32_t group) { return load_rows<kRanks, T>(g, a, group); };
  const FirstPlaces<kRanks> places(g, worker_number());
  const FirstLines<kRanks, kAhead> lines(g, role.leads(), role.first, a.words);
  const Found found = begin(g);
  // Loaded while the epoch is on its way.
  const FirstLses<kRanks> lses(g, a, lse_words);
  PeerLineWords<kRanks> first = {};
  if (role.leads()) {
    first = load(role.first);
  }
  const auto send_ahead = [&](bool wanted) {
#pragma unroll
    for (int k = 1; k < kRanks; ++k) {
      places.store_if(wanted && lses.any, c, k, lses.lses[k]);
    }
    lines.send(wanted, c, first);
  };
  if (!enter(g, found, c, lse_words, send_ahead)) {
    return;
  }
  send_lses(g, c, a, second_word<kRanks>(), lse_words);
  bool all_run = false;
  const auto send = [&](std::uint32_t group, const PeerLineWords<kRanks>& loaded) {
    send_rows<kRanks, T>(g, c, a, group, loaded);
  };
  const auto send_first = [&] {
    if constexpr (!kAhead) {
      send(role.first, first);
    }
  };
  exchange_lines(g, c, role, send_first, load, send,
                 [&](std::uint32_t group, std::uint32_t& missing) {
                   if (Args::kGeneral && group * kGroupWords >= a.words_of(g.rank)) {
                     return true;  // others merge more
                   }
                   cover_lses(g, c, a, all_run, group);
                   return merge_lines<kRanks, T>(g, c, a, group, missing);
                 });
  if (Args::kGeneral && a.words_of(g.rank) == 0 && worker_number() == 0) {
    Patience patience;
    await_peers(g, c, 0, patience);
  }
}

}  // namespace
}  // namespace cohort::cuda::detail
