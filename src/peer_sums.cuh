// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "byte_view.cuh"
#include "peer_enter.cuh"
#include "peer_lines.cuh"
#include "require.hpp"

// The ranks' sums of words and of lines, for the reduce-scatter and the all-reduce.

namespace cohort::cuda::detail {

/// The ranks' sum of a word, in rank order. False if the wait for a peer's failed.
template <class T, int kRanks>
__device__ __forceinline__ bool sum_word(const Group<kRanks>& g, const Call& c, std::uint32_t word,
                                         uint2 own, uint2& sum, Patience& patience) {
  Sum<T> total;
  for (int r0 = 0; r0 < g.size(); r0 += kBatch<kRanks>) {
    uint2 values[kBatch<kRanks>];
    if (!ll_receive(g, c, r0, word, values, patience)) {
      return false;
    }
#pragma unroll
    for (int j = 0; j < kBatch<kRanks>; ++j) {
      if (r0 + j < g.size()) {
        const bool mine = r0 + j == g.rank;
        total.add(make_uint2(mine ? own.x : values[j].x, mine ? own.y : values[j].y));
      }
    }
  }
  sum = total.result();
  return true;
}

/// A thread's words of the ranks' sum of a group of lines, in rank order; `own(word)` is this
/// rank's. Returns as `poll_in_warp`.
template <class T, int kRanks, class Own>
__device__ __forceinline__ bool sum_lines(const Group<kRanks>& g, const Call& c,
                                          std::uint32_t words, std::uint32_t group, const Own& own,
                                          LineWords<1>& sum, std::uint32_t& missing) {
  const LinePart part(group);
  const LineWords<1> mine = load_for_all(words, group, own);
  Sum<T> first;
  Sum<T> second;
  for (int r0 = 0; r0 < g.size(); r0 += kBatch<kRanks>) {
    uint4 values[kBatch<kRanks>] = {};
    if (!receive_lines(g, c, r0, part, part.line * kLineWords < words, values, missing)) {
      return false;
    }
#pragma unroll
    for (int j = 0; j < kBatch<kRanks>; ++j) {
      if (r0 + j < g.size()) {
        const bool is_own = r0 + j == g.rank;
        first.add(make_uint2(is_own ? mine.first[0].x : values[j].x,
                             is_own ? mine.first[0].y : values[j].y));
        second.add(make_uint2(is_own ? mine.second[0].x : values[j].z,
                              is_own ? mine.second[0].y : values[j].w));
      }
    }
  }
  sum.first[0] = first.result();
  sum.second[0] = second.result();
  return true;
}

/// What a sum's tensors must be.
inline void check_sum_view(DType dtype, const void* in, const void* out, std::int64_t bytes) {
  require(dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16, "dtype",
          "expected f32, f16 or bf16, got {}", to_string(dtype));
  const auto element = size_of(dtype);
  require(bytes == 0 || (in != nullptr && out != nullptr), "in, out", "null pointer");
  require(reinterpret_cast<std::uintptr_t>(in) % element == 0 &&
              reinterpret_cast<std::uintptr_t>(out) % element == 0 &&
              bytes % static_cast<std::int64_t>(element) == 0,
          "in, out", "expected whole, aligned elements");
}

}  // namespace cohort::cuda::detail
