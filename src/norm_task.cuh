// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_fp8.h>

#include <bit>
#include <cstddef>
#include <cstdint>

#include "byte_view.cuh"
#include "cohort/cuda/kernels.hpp"
#include "elements.cuh"
#include "peer_lines.cuh"

// What the norm's kernels are told, and how they load and store a row's words.

namespace cohort::cuda::detail {

/// What a norm's kernels are told beside the group.
struct NormTask {
  const std::byte* x;
  std::byte* residual;
  const std::byte* weight;
  std::byte* out;
  const float* scale;  ///< Null for an output in the type of the sum.
  std::int64_t row_bytes;
  std::int64_t out_row_bytes;
  float epsilon;
  float inverse_hidden;
  std::uint32_t rows;
  std::uint32_t hidden;
  std::uint32_t words;    ///< Of a row.
  std::uint32_t groups;   ///< Of a row.
  std::uint32_t cluster;  ///< The blocks of a row, as a power of two: those of a cluster.
  bool aligned;           ///< Rows are whole words, and begin where words may lie.

  NormTask(const Norm& n, int blocks_of_row)
      : x(static_cast<const std::byte*>(n.x)),
        residual(static_cast<std::byte*>(n.residual)),
        weight(static_cast<const std::byte*>(n.weight)),
        out(static_cast<std::byte*>(n.out)),
        scale(n.shape.out_dtype == n.shape.dtype ? nullptr : n.scale),
        row_bytes(n.shape.row_bytes()),
        out_row_bytes(n.shape.hidden * static_cast<std::int64_t>(size_of(n.shape.out_dtype))),
        epsilon(n.epsilon),
        inverse_hidden(1.0F / static_cast<float>(n.shape.hidden)),
        rows(static_cast<std::uint32_t>(n.shape.rows)),
        hidden(static_cast<std::uint32_t>(n.shape.hidden)),
        words(static_cast<std::uint32_t>(n.shape.row_words())),
        groups(static_cast<std::uint32_t>(n.shape.groups())),
        cluster(static_cast<std::uint32_t>(std::countr_zero(static_cast<unsigned>(blocks_of_row)))),
        aligned(row_bytes % 8 == 0 && is_aligned<uint2>(n.x) && is_aligned<uint2>(n.residual) &&
                is_aligned<uint2>(n.weight) &&
                // Eight bytes of the sum are eight of the output, or as many as they have elements.
                reinterpret_cast<std::uintptr_t>(n.out) %
                        (scale == nullptr ? 8 : 8 / size_of(n.shape.dtype)) ==
                    0) {}

  __device__ __forceinline__ bool is_fp8() const { return scale != nullptr; }
  /// Blocks of a row.
  __device__ __forceinline__ std::uint32_t blocks() const { return 1U << cluster; }
};

/// A word of a row of which `bytes` are left from there on. Where the number of ranks is a
/// constant everything is aligned.
template <bool kAligned>
__device__ __forceinline__ uint2 load_norm_word(const NormTask& a, const std::byte* row,
                                                std::uint32_t word) {
  const std::byte* const at = row + std::int64_t{8} * word;
  if (kAligned || a.aligned) {
    return *reinterpret_cast<const uint2*>(at);
  }
  return low(load_unaligned(
      at, static_cast<unsigned>(min(std::int64_t{8}, a.row_bytes - std::int64_t{8} * word))));
}

template <bool kAligned>
__device__ __forceinline__ void store_norm_word(const NormTask& a, std::byte* row,
                                                std::uint32_t word, uint2 value) {
  std::byte* const at = row + std::int64_t{8} * word;
  if (kAligned || a.aligned) {
    *reinterpret_cast<uint2*>(at) = value;
    return;
  }
  store_unaligned(
      at, join(value, make_uint2(0, 0)),
      static_cast<unsigned>(min(std::int64_t{8}, a.row_bytes - std::int64_t{8} * word)));
}

/// A thread's words of a group of a row, zeros beyond it; all zeros unless wanted.
template <bool kAligned>
__device__ __forceinline__ LineWords<1> load_norm_group(const NormTask& a, const std::byte* row,
                                                        std::uint32_t group, bool wanted = true) {
  return load_for_all(wanted ? a.words : 0, group,
                      [&](std::uint32_t word) { return load_norm_word<kAligned>(a, row, word); });
}

template <class T>
__device__ __forceinline__ uint2 add_words(uint2 a, uint2 b) {
  float x[Word<T>::kElements];
  float y[Word<T>::kElements];
  Word<T>::unpack(a, x);
  Word<T>::unpack(b, y);
#pragma unroll
  for (int k = 0; k < Word<T>::kElements; ++k) {
    x[k] = __fadd_rn(x[k], y[k]);
  }
  return Word<T>::pack(x);
}

template <class T>
__device__ __forceinline__ float add_squares(float sum, uint2 word) {
  float x[Word<T>::kElements];
  Word<T>::unpack(word, x);
#pragma unroll
  for (int k = 0; k < Word<T>::kElements; ++k) {
    sum = __fmaf_rn(x[k], x[k], sum);
  }
  return sum;
}

/// Of a warp's values, in all of its threads alike.
__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int distance = static_cast<int>(kWarp) / 2; distance > 0; distance /= 2) {
    value = __fadd_rn(value, __shfl_xor_sync(kFullWarp, value, distance));
  }
  return value;
}

/// To the nearest, within the largest; NaN stays.
__device__ __forceinline__ std::uint16_t to_e4m3(float low, float high) {
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}

/// Stores what a word of the residual becomes.
template <bool kAligned, class T>
__device__ __forceinline__ void store_normed(const NormTask& a, std::byte* row, std::uint32_t word,
                                             uint2 residual, uint2 weight, float factor,
                                             float inverse_scale) {
  constexpr int kElements = Word<T>::kElements;
  float x[kElements];
  float w[kElements];
  Word<T>::unpack(residual, x);
  Word<T>::unpack(weight, w);
#pragma unroll
  for (int k = 0; k < kElements; ++k) {
    x[k] = __fmul_rn(__fmul_rn(x[k], factor), w[k]);
  }
  if (!a.is_fp8()) {
    store_norm_word<kAligned>(a, row, word, Word<T>::pack(x));
    return;
  }
#pragma unroll
  for (int k = 0; k < kElements; ++k) {
    x[k] = __fmul_rn(x[k], inverse_scale);
  }
  std::byte* const at = row + std::int64_t{kElements} * word;
  std::uint32_t bits = to_e4m3(x[0], x[1]);
  if constexpr (kElements == 4) {
    bits |= static_cast<std::uint32_t>(to_e4m3(x[2], x[3])) << 16;
  }
  if (kAligned || a.aligned) {
    if constexpr (kElements == 4) {
      *reinterpret_cast<std::uint32_t*>(at) = bits;
    } else {
      *reinterpret_cast<std::uint16_t*>(at) = static_cast<std::uint16_t>(bits);
    }
    return;
  }
  store_unaligned(at, make_uint4(bits, 0, 0, 0),
                  min(static_cast<unsigned>(kElements), a.hidden - kElements * word));
}

}  // namespace cohort::cuda::detail
