// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention.cuh"
#include "peer_enter.cuh"
#include "peer_launch.cuh"
#include "peer_lines.cuh"

// The kernels that merge partial attentions in one launch, and how they are launched. Those for the
// plain merge, of one split a rank by head, and for all others are compiled apart.

namespace cohort::cuda::detail {
namespace {

/// Splits that one launch combines while it loads them; more are packed (`peer_merge_obstacle`).
constexpr int kMostSplits = static_cast<int>(kMostPeerSplits);

/// A word of the rows that a rank merges.
struct MergePlace {
  std::uint32_t row;
  std::uint32_t batch;
  std::uint32_t head;  ///< Among those of one rank.
  std::uint32_t byte;  ///< Into the row.
};

/// Of what a rank merges, at most.
inline std::int64_t payload_bytes(const MergeShape& s, int n) {
  return s.rows(n).widest() * s.dim * row_element(s);
}

/// What all kernels are given. `rows` counts the (token, head) rows that a rank merges, at most
/// where ranks merge different numbers, `words` their payload's words of 8 bytes. kAligned: every
/// row starts on 16 bytes.
template <bool kAligned>
struct MergeArgs {
  Rows merged;
  Strided2 merged_lse;
  FastDiv heads;  ///< Of a rank's rows.
  FastDiv words_per_row;
  std::uint32_t rows;
  std::uint32_t words;
  LseBase base;

  MergeArgs(int n, const MergeShape& s, const Merged& m)
      : merged(m.out, m.out_batch_stride, m.out_head_stride, size_of(s.dtype)),
        merged_lse(lses_of(m)),
        heads(s.rows(n).of(0).heads),
        words_per_row(s.dim * row_element(s) / 8),
        rows(static_cast<std::uint32_t>(is_empty(s) ? 0 : s.rows(n).widest())),
        words(static_cast<std::uint32_t>(payload_bytes(s, n) / 8)),
        base(s.base) {}

  __device__ __forceinline__ MergePlace place(std::uint32_t word) const {
    MergePlace p;
    p.row = words_per_row.divide(word);
    p.byte = 8 * (word - p.row * words_per_row.divisor);
    p.batch = heads.divide(p.row);
    p.head = p.row - p.batch * heads.divisor;
    return p;
  }
  __device__ __forceinline__ void store(const MergePlace& p, uint2 value) const {
    store_as(merged.row(p.batch, p.head) + p.byte, value, kAligned || merged.aligned);
  }
  __device__ __forceinline__ void store_lse(std::uint32_t row, float value) const {
    const std::uint32_t batch = heads.divide(row);
    *merged_lse.at(batch, row - batch * heads.divisor) = value;
  }
};

/// One split a rank, without sinks, by head.
template <bool kAligned>
struct PlainMerge : MergeArgs<kAligned> {
  static constexpr bool kGeneral = false;
  Rows out;  ///< Partial.
  Strided2 lse;

  PlainMerge(int n, const MergeShape& s, const Partial& p, const Merged& m)
      : MergeArgs<kAligned>(n, s, m),
        out(p.out, p.out_batch_stride, p.out_head_stride, size_of(s.dtype)),
        lse(lses_of(p)) {}

  [[nodiscard]] bool is_aligned() const { return out.aligned && this->merged.aligned; }
  /// Words, and rows, of what `rank` merges.
  __device__ __forceinline__ std::uint32_t words_of(int) const { return this->words; }
  __device__ __forceinline__ std::uint32_t rows_of(int) const { return this->rows; }
  /// This rank's partial of what `rank` merges.
  template <class T>
  __device__ __forceinline__ uint2 load(int rank, const MergePlace& p) const {
    const std::uint32_t head = static_cast<std::uint32_t>(rank) * this->heads.divisor + p.head;
    return load_as<uint2>(out.row(p.batch, head) + p.byte, kAligned || out.aligned);
  }
  __device__ __forceinline__ float load_lse(int rank, std::uint32_t row) const {
    const std::uint32_t batch = this->heads.divide(row);
    const std::uint32_t head = row - batch * this->heads.divisor;
    return *lse.at(batch, static_cast<std::uint32_t>(rank) * this->heads.divisor + head);
  }
  /// Of one of the rows that `rank` merges.
  __device__ __forceinline__ float load_sink(int, std::uint32_t) const { return dcp::kEmptyLse; }
};

/// Everything else, of up to `kMostSplits` splits.
template <bool kAligned, int kMost>
struct GeneralMerge : MergeArgs<kAligned> {
  static constexpr bool kGeneral = true;
  SplitRows partial;
  RankRows<kMost> ranks;
  Sinks sinks;

  GeneralMerge(int n, const MergeShape& s, const Partial& p, const Merged& m)
      : MergeArgs<kAligned>(n, s, m), partial(s, p), ranks(s.rows(n)), sinks(sinks_of(p)) {}

  [[nodiscard]] bool is_aligned() const { return partial.out.aligned && this->merged.aligned; }
  __device__ __forceinline__ std::uint32_t rows_of(int rank) const {
    return ranks.tokens[rank] * ranks.heads;
  }
  __device__ __forceinline__ std::uint32_t words_of(int rank) const {
    return rows_of(rank) * this->words_per_row.divisor;
  }
  __device__ __forceinline__ dcp::RowPlace<std::uint32_t> row_at(int rank,
                                                                 std::uint32_t row) const {
    return ranks.of(rank).place(row, this->heads.divide(row));
  }
  /// The scales of a row's splits, and their LSE. No scales where the row is empty.
  __device__ __forceinline__ float weigh(int rank, std::uint32_t row,
                                         float (&scales)[kMostSplits]) const {
    const auto at = row_at(rank, row);
    const float* const lses = partial.lse.at(at.token, at.head);
#pragma unroll
    for (int s = 0; s < kMostSplits; ++s) {
      scales[s] = s < partial.splits ? lses[s * partial.lse_split] : dcp::kEmptyLse;
    }
    const bool empty = partial.is_empty(at.token);
#pragma unroll
    for (int s = 0; s < kMostSplits; ++s) {
      scales[s] = empty ? dcp::kEmptyLse : scales[s];
    }
    return dcp::merge_weights_with(scales, kMostSplits, partial.split_base.exp(),
                                   partial.split_base.log(), scales);
  }
  /// A row's word of every split, all on their way together; nothing where `rank` has fewer words.
  __device__ __forceinline__ void load_splits(int rank, std::uint32_t word,
                                              uint2 (&words)[kMostSplits]) const {
    const bool wanted = word < words_of(rank);
    const MergePlace p = this->place(wanted ? word : 0);
    const auto at = ranks.of(rank).place(p.row, p.batch);
    const std::byte* const from = partial.out.row(at.token, at.head) + p.byte;
#pragma unroll
    for (int s = 0; s < kMostSplits; ++s) {
      words[s] = wanted && s < partial.splits
                     ? load_as<uint2>(from + s * partial.out_split, kAligned || partial.out.aligned)
                     : make_uint2(0, 0);
    }
  }
  /// As it is, where there is one split: an empty row's word is sent and not read.
  __device__ __forceinline__ uint2 load_plain(int rank, std::uint32_t word) const {
    if (word >= words_of(rank)) {
      return make_uint2(0, 0);
    }
    const MergePlace p = this->place(word);
    const auto at = ranks.of(rank).place(p.row, p.batch);
    return load_as<uint2>(partial.out.row(at.token, at.head) + p.byte,
                          kAligned || partial.out.aligned);
  }
  template <class T>
  __device__ __forceinline__ uint2 load(int rank, const MergePlace& p) const {
    const std::uint32_t word = p.row * this->words_per_row.divisor + p.byte / 8;
    if (partial.splits == 1) {
      return load_plain(rank, word);
    }
    uint2 words[kMostSplits];
    load_splits(rank, word, words);
    float scales[kMostSplits] = {};
    if (p.row < rows_of(rank)) {
      weigh(rank, p.row, scales);
    }
    WeightedSum<T> sum;
#pragma unroll
    for (int s = 0; s < kMostSplits; ++s) {
      sum.add(scales[s], words[s]);
    }
    return sum.result();
  }
  /// A thread's two words of a group of lines, in a whole warp: thread i weighs the group's row i,
  /// and hands the scales to those that need them.
  template <class T>
  __device__ __forceinline__ void load_lines(int rank, std::uint32_t group, uint2& first,
                                             uint2& second) const {
    const LinePart part(group);
    if (partial.splits == 1) {
      first = load_plain(rank, part.word);
      second = part.flag ? make_uint2(0, 0) : load_plain(rank, part.word + 1);
      return;
    }
    uint2 first_words[kMostSplits];
    uint2 second_words[kMostSplits];
    load_splits(rank, part.word, first_words);
    load_splits(rank, part.word + 1, second_words);
    const std::uint32_t first_row = this->words_per_row.divide(group * kGroupWords);
    const std::uint32_t row = first_row + (threadIdx.x & 31U);
    float scales[kMostSplits] = {};
    if (row < rows_of(rank) && row <= this->words_per_row.divide((group + 1) * kGroupWords - 1)) {
      weigh(rank, row, scales);
    }
    const auto lane_of = [&](std::uint32_t word) {
      return static_cast<int>(this->words_per_row.divide(word) - first_row);
    };
    WeightedSum<T> first_sum;
    WeightedSum<T> second_sum;
#pragma unroll
    for (int s = 0; s < kMostSplits; ++s) {
      first_sum.add(__shfl_sync(kFullWarp, scales[s], lane_of(part.word)), first_words[s]);
      second_sum.add(__shfl_sync(kFullWarp, scales[s], lane_of(part.word + 1)), second_words[s]);
    }
    first = first_sum.result();
    second = second_sum.result();
  }
  __device__ __forceinline__ float load_lse(int rank, std::uint32_t row) const {
    if (partial.splits > 1) {
      float scales[kMostSplits];
      return weigh(rank, row, scales);
    }
    const auto at = row_at(rank, row);
    return partial.is_empty(at.token) ? dcp::kEmptyLse : *partial.lse.at(at.token, at.head);
  }
  __device__ __forceinline__ float load_sink(int rank, std::uint32_t row) const {
    return sinks.base == nullptr ? dcp::kEmptyLse : sinks.at(row_at(rank, row).head);
  }
};

/// The LSEs of rows 2i and 2i+1 of those that `rank` merges.
template <class Args>
__device__ __forceinline__ uint2 load_lses(const Args& a, int rank, std::uint32_t i) {
  const std::uint32_t rows = a.rows_of(rank);
  const float first = 2 * i < rows ? a.load_lse(rank, 2 * i) : 0.0F;
  const float second = 2 * i + 1 < rows ? a.load_lse(rank, 2 * i + 1) : 0.0F;
  return make_uint2(__float_as_uint(first), __float_as_uint(second));
}

/// Kernels for a constant number of ranks take aligned rows; those for any number, which speak the
/// same protocol, take any. So a rank's alignment is its own affair, and whether its rows have to
/// be made as well.
template <int kRanks>
using PlainFor = PlainMerge<(kRanks > 0)>;
template <int kRanks>
using GeneralFor = GeneralMerge<(kRanks > 0), Group<kRanks>::kMost>;

/// Sends the LSEs, two a flag word, from word `at` of each lane on: words `first` and every
/// worker_count()th. With `words` 0 the one word of an empty call.
template <int kRanks, class Args>
__device__ __forceinline__ void send_lses(const Group<kRanks>& g, const Call& c, const Args& a,
                                          std::uint32_t at, std::uint32_t first,
                                          std::uint32_t count) {
  const std::uint32_t step = worker_count();
#pragma unroll 1
  for (std::uint32_t i = first; i < count; i += step) {
    const std::int64_t place = ll_own_place(g, c, at + i);
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
/// @param at       Where the LSEs begin in each lane.
template <int kRanks, class Args>
__device__ __forceinline__ void cover_lse(const Group<kRanks>& g, const Call& c, const Args& a,
                                          bool& all_run, std::uint32_t at, std::uint32_t i) {
  if (i >= (blockIdx.x + 1) * workers() && !all_run) {
    all_run = all_arrived(g, c);
    if (!all_run) {
      send_lse(g, a, ll_own_place(g, c, at + i), c.flag, i);
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
    cover_lse(g, c, a, all_run, 0, row / 2);
  }
  __syncwarp();
}

__device__ __forceinline__ float lse_of(uint4 flag_word, std::uint32_t row) {
  return __uint_as_float((row & 1U) != 0 ? flag_word.z : flag_word.x);
}

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
  uint2 own_first;
  uint2 own_second;
  if constexpr (Args::kGeneral) {
    a.template load_lines<T>(g.rank, group, own_first, own_second);
  } else {
    own_first = a.template load<T>(g.rank, first_place);
    own_second = a.template load<T>(g.rank, second_place);
  }
  const float own_lse = has_row ? a.load_lse(g.rank, row) : 0.0F;
  float scales[Group<kRanks>::kMost];
  uint4 values[kBatch<kRanks>] = {};
  const auto receive = [&](int r0, bool again) {
    uint4 lses[kBatch<kRanks>] = {};
    return poll_in_warp(missed, [&] {
      std::uint32_t missing = 0;
#pragma unroll
      for (int j = 0; j < kBatch<kRanks>; ++j) {
        const bool wanted = is_peer(g, r0 + j);
        ll_load_if(wanted && has_line, g.own() + line_place(g, c, r0 + j, part), values[j]);
        ll_load_if(wanted && has_row && !again, g.own() + ll_place(g, c, r0 + j, row / 2), lses[j]);
      }
#pragma unroll
      for (int j = 0; j < kBatch<kRanks>; ++j) {
        const int r = r0 + j;
        std::uint32_t differs = 0;
        if (is_peer(g, r)) {
          differs = (has_line ? line_differs(values[j], c, part) : 0) |
                    (has_row && !again ? ll_differs(lses[j], c) : 0);
        }
        missing |= differs != 0 ? 1U << r : 0U;
        if (r < g.size() && !again) {
          scales[r] = r == g.rank ? own_lse : lse_of(lses[j], row);
        }
      }
      return missing;
    });
  };
  for (int r0 = 0; r0 < g.size(); r0 += kBatch<kRanks>) {
    if (!receive(r0, false)) {
      return false;
    }
  }
  if (has_row) {
    const float merged_lse = merge_scales(scales, g.size(), a.base, a.load_sink(g.rank, row));
    // The group with a row's first word has the row.
    if (a.merged_lse.base != nullptr && row * a.words_per_row.divisor >= first_word) {
      a.store_lse(row, merged_lse);
    }
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
        first_sum.add(scale_of(first_place), r == g.rank ? own_first : low(values[j]));
        second_sum.add(scale_of(second_place), r == g.rank ? own_second : high(values[j]));
      }
    }
  }
  if (has_first) {
    a.store(first_place, first_sum.result());
  }
  if (has_second) {
    a.store(second_place, second_sum.result());
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
  Call c;
  const LineRole role(a.words);
  const auto load = [&](std::uint32_t group) { return load_rows<kRanks, T>(g, a, group); };
  const FirstPlaces<kRanks> places(g, worker_number());
  const Found found = begin(g);
  // Loaded while the epoch is on its way.
  const FirstLses<kRanks> lses(g, a, lse_words);
  PeerLineWords<kRanks> first = {};
  if (role.leads()) {
    first = load(role.first);
  }
  const auto send_first = [&](bool wanted) {
#pragma unroll
    for (int k = 1; k < kRanks; ++k) {
      places.store_if(wanted && lses.any, c, k, lses.lses[k]);
    }
  };
  if (!enter(g, found, c, lse_words, send_first)) {
    return;
  }
  send_lses(g, c, a, 0, second_word<kRanks>(), lse_words);
  bool all_run = false;
  exchange_lines(
      g, c, role, first, load,
      [&](std::uint32_t group, const PeerLineWords<kRanks>& loaded) {
        send_rows<kRanks, T>(g, c, a, group, loaded);
      },
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

/// One launch with arguments `ArgsFor<ranks>`. `with_kernels(n, call)` calls `call` with the number
/// of ranks as a constant, for which there are kernels, or 0.
template <template <int> class ArgsFor, class WithKernels>
void launch_merge(const WithKernels& with_kernels, const PeerTable& t, const MergeShape& s,
                  const Partial& partial, const Merged& merged, PeerPath path,
                  cudaStream_t stream) {
  const ArgsFor<0> any(t.size, s, partial, merged);
  const CallSignature signature = signature_of(s, blocks_of(t));
  const bool words = path == PeerPath::flag_word || any.words == 0;
  const std::int64_t lse_words = std::max<std::int64_t>(ceil_div(any.rows, 2), 1);
  check_ll_words(t, (words ? any.words : 0) + lse_words, "peer_merge");
  if (!words) {
    check_lines(t, any.words, "peer_merge");
  }
  with_float_type(s.dtype, "dtype", [&]<class T>(T*) {
    with_kernels(any.is_aligned() ? t.size : 0, [&](auto n) {
      using Args = ArgsFor<n()>;
      const Args args(t.size, s, partial, merged);
      const Grid grid = words ? ll_grid(args.words + lse_words, t) : line_grid<n()>(args.words, t);
      launch(words ? merge_word_kernel<n(), T, Args> : merge_line_kernel<n(), T, Args>, grid.blocks,
             grid.threads, stream, Group<n()>(t, signature), args,
             static_cast<std::uint32_t>(lse_words));
    });
  });
}

template <template <int> class ArgsFor, class WithKernels>
void load_merge_kernels(const WithKernels& with_kernels, int n) {
  const auto load_for = [&]<class T>(T*) {
    with_kernels(n, [](auto r) {
      load(merge_word_kernel<r(), T, ArgsFor<r()>>);
      load(merge_line_kernel<r(), T, ArgsFor<r()>>);
    });
  };
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    with_float_type(dtype, "dtype", load_for);
  }
}

}  // namespace

/// Merges other than the plain one; as `launch_merge`.
void merge_general(const PeerTable& table, const MergeShape& shape, const Partial& partial,
                   const Merged& merged, PeerPath path, cudaStream_t stream);

}  // namespace cohort::cuda::detail
