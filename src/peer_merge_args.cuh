// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention.cuh"
#include "peer_group.cuh"
#include "peer_lines.cuh"

// What the kernels that merge partial attentions are given, and how they read this rank's partials
// and write what is merged: the plain merge, of one split a rank by head, and all others.

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

/// Rows of a warp's 32 words, at most.
inline std::int64_t lse_slots_of(const MergeShape& s) {
  const std::int64_t row = std::max<std::int64_t>(s.dim * row_element(s) / 8, 2);
  return row % kWarp == 0 ? 1 : kWarp % row == 0 ? kWarp / row : (kWarp - 2) / row + 2;
}
/// Flag words of LSEs beside the payload, where that travels in flag words as well.
inline std::int64_t lse_words_of(const MergeShape& s, int n) {
  const std::int64_t words = payload_bytes(s, n) / 8;
  return std::max<std::int64_t>(ceil_div(words, kWarp), 1) * lse_slots_of(s);
}
/// Of LSEs where the payload travels in lines: two rows' in a word.
inline std::int64_t lse_pairs_of(const MergeShape& s, int n) {
  return std::max<std::int64_t>(ceil_div(is_empty(s) ? 0 : s.rows(n).widest(), 2), 1);
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
  std::uint32_t lse_slots;  ///< Rows of a warp's words, at most.
  LseBase base;

  MergeArgs(int n, const MergeShape& s, const Merged& m)
      : merged(m.out, m.out_batch_stride, m.out_head_stride, size_of(s.dtype)),
        merged_lse(lses_of(m)),
        heads(s.rows(n).of(0).heads),
        words_per_row(s.dim * row_element(s) / 8),
        rows(static_cast<std::uint32_t>(is_empty(s) ? 0 : s.rows(n).widest())),
        words(static_cast<std::uint32_t>(payload_bytes(s, n) / 8)),
        lse_slots(static_cast<std::uint32_t>(lse_slots_of(s))),
        base(s.base) {}

  __device__ __forceinline__ MergePlace place(std::uint32_t word) const {
    MergePlace p;
    p.row = words_per_row.divide(word);
    p.byte = 8 * (word - p.row * words_per_row.divisor);
    p.batch = heads.divide(p.row);
    p.head = p.row - p.batch * heads.divisor;
    return p;
  }
  /// Where a merged word goes, worked out now.
  __device__ __forceinline__ std::byte* target(const MergePlace& p) const {
    return settled(merged.row(p.batch, p.head) + p.byte);
  }
  __device__ __forceinline__ void store(std::byte* to, uint2 value) const {
    store_settled(to, value, kAligned || merged.aligned);
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
  /// The same two where they are wanted, without a branch: behind one, what follows would wait.
  template <class T>
  __device__ __forceinline__ uint2 load_if(bool wanted, int rank, const MergePlace& p) const {
    if constexpr (!kAligned) {
      return wanted ? load<T>(rank, p) : make_uint2(0, 0);
    }
    const std::uint32_t head = static_cast<std::uint32_t>(rank) * this->heads.divisor + p.head;
    uint2 value = make_uint2(0, 0);
    asm volatile("{.reg .pred p; setp.ne.u32 p,%3,0; @p ld.global.v2.u32 {%0,%1},[%2];}"
                 : "+r"(value.x), "+r"(value.y)
                 : "l"(out.row(p.batch, head) + p.byte), "r"(static_cast<unsigned>(wanted))
                 : "memory");
    return value;
  }
  __device__ __forceinline__ float load_lse_if(bool wanted, int rank, std::uint32_t row) const {
    const std::uint32_t batch = this->heads.divide(row);
    const std::uint32_t head = row - batch * this->heads.divisor;
    float value = 0;
    asm volatile(
        "{.reg .pred p; setp.ne.u32 p,%2,0; @p ld.global.f32 %0,[%1];}"
        : "+f"(value)
        : "l"(lse.at(batch, static_cast<std::uint32_t>(rank) * this->heads.divisor + head)),
          "r"(static_cast<unsigned>(wanted))
        : "memory");
    return value;
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
  template <class T>
  __device__ __forceinline__ uint2 load_if(bool wanted, int rank, const MergePlace& p) const {
    return wanted ? load<T>(rank, p) : make_uint2(0, 0);
  }
  __device__ __forceinline__ float load_lse_if(bool wanted, int rank, std::uint32_t row) const {
    return wanted ? load_lse(rank, row) : 0.0F;
  }
  __device__ __forceinline__ float load_sink(int rank, std::uint32_t row) const {
    return sinks.base == nullptr ? dcp::kEmptyLse : sinks.at(row_at(rank, row).head);
  }
};

/// Kernels for a constant number of ranks take aligned rows; those for any number, which speak the
/// same protocol, take any. So a rank's alignment is its own affair, and whether its rows have to
/// be made as well.
template <int kRanks>
using PlainFor = PlainMerge<(kRanks > 0)>;
template <int kRanks>
using GeneralFor = GeneralMerge<(kRanks > 0), Group<kRanks>::kMost>;

}  // namespace
}  // namespace cohort::cuda::detail
