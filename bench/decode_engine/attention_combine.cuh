// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <math_constants.h>

#include "attention_splits.hpp"
#include "cuda_kernels.hpp"

/// \file
/// The kernel that combines attention's splits.

namespace decode_engine::kernels {

constexpr int kCombining = 512;  // threads, of which 128 take 4 columns each of every fourth split

__device__ __forceinline__ float over_warp(float value, bool largest) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(0xffffffff, value, step);
    value = largest ? fmaxf(value, other) : value + other;
  }
  return value;
}

/// A block for each head of a sequence.
__global__ void __launch_bounds__(kCombining)
    combine_kernel(const __grid_constant__ Attention a, const __grid_constant__ Splits splits) {
  constexpr int kEach = kMostAttentionSplits / 32;  // of a lane
  constexpr int kSets = kCombining / 128;
  __shared__ float weights[kMostAttentionSplits];
  __shared__ float4 sums[kSets][128];
  const std::int64_t rows = a.batch * a.heads;
  const std::int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < 32) {
    float lses[kEach];
    float largest = -CUDART_INF_F;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int split = thread + 32 * i;
      lses[i] = split < splits.count ? splits.lses[split * rows + row] : -CUDART_INF_F;
      largest = fmaxf(largest, lses[i]);
    }
    largest = over_warp(largest, true);
    float total = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      lses[i] = largest == -CUDART_INF_F ? 0 : exp2f((lses[i] - largest) * 1.44269504F);
      total += lses[i];
    }
    total = over_warp(total, false);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      weights[thread + 32 * i] = total > 0 ? lses[i] / total : 0;
    }
    if (thread == 0) {
      a.lse[row] = total > 0 ? largest + logf(total) : -CUDART_INF_F;
    }
  }
  __syncthreads();
  const std::int64_t b = row / a.heads;
  const std::int64_t h = row % a.heads;
  const int set = thread / 128;
  const int column = thread % 128 * 4;
  float4 sum = make_float4(0, 0, 0, 0);
  if (column < a.latent) {
#pragma unroll 8
    for (int split = set; split < splits.count; split += kSets) {
      const float weight = weights[split];
      const float4 part =
          *reinterpret_cast<const float4*>(splits.sums + (split * rows + row) * a.latent + column);
      sum.x += weight * part.x;
      sum.y += weight * part.y;
      sum.z += weight * part.z;
      sum.w += weight * part.w;
    }
  }
  sums[set][thread % 128] = sum;
  __syncthreads();
  if (set == 0 && column < a.latent) {
#pragma unroll
    for (int other = 1; other < kSets; ++other) {
      const float4 part = sums[other][thread];
      sum.x += part.x;
      sum.y += part.y;
      sum.z += part.z;
      sum.w += part.w;
    }
    auto* const to =
        reinterpret_cast<__nv_bfloat162*>(a.out + (h * a.batch + b) * a.latent + column);
    to[0] = __floats2bfloat162_rn(sum.x, sum.y);
    to[1] = __floats2bfloat162_rn(sum.z, sum.w);
  }
}

}  // namespace decode_engine::kernels
