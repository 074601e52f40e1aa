// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <math_constants.h>

#include "attention_splits.hpp"
#include "attention_work.cuh"
#include "cuda_kernels.hpp"

/// \file
/// The kernel that combines attention's splits.

namespace decode_engine::kernels {

constexpr int kCombining = 128;  ///< Threads of a set: 4 columns each.

__device__ __forceinline__ float over_warp(float value, bool largest) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(0xffffffff, value, step);
    value = largest ? fmaxf(value, other) : value + other;
  }
  return value;
}

/// A block for each head of a sequence. Sets of threads take turns with the parts, of which each
/// reads the first `kAhead` while weights are worked out.
template <int kSets, int kAhead>
__global__ void __launch_bounds__(kSets* kCombining)
    combine_kernel(const __grid_constant__ Attention a, const __grid_constant__ Splits splits) {
  constexpr int kEach = kMostAttentionSplits / 32;  // of a lane
  __shared__ float weights[kMostAttentionSplits];
  __shared__ float4 sums[kSets][kCombining];
  if (a.next_waits) {
    wgmma::launch_next_kernel();
  }
  const int parts = splits.count;
  const std::int64_t rows = a.batch * a.heads;
  const std::int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const int set = thread / kCombining;
  const int column = thread % kCombining * 4;
  const bool has_column = column < a.latent;
  const float* const from = splits.sums + row * a.latent + column;
  const auto result = [&] {
    return a.out + (row % a.heads * a.batch + row / a.heads) * a.latent + column;
  };
  // Where these lie is looked up meanwhile.
  wgmma::prefetch(splits.lses + row);
  if (has_column) {
    wgmma::prefetch(from);
    wgmma::prefetch(result());
  }
  wgmma::wait_for_kernel_before();
  float4 first[kAhead > 0 ? kAhead : 1];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const int part = set + i * kSets;
    first[i] = has_column && part < parts
                   ? *reinterpret_cast<const float4*>(from + part * rows * a.latent)
                   : make_float4(0, 0, 0, 0);
  }
  float largest = -CUDART_INF_F;
  float total = 0;
  if (thread < 32) {
    float lses[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int part = thread + 32 * i;
      lses[i] = part < parts ? splits.lses[part * rows + row] : -CUDART_INF_F;
      largest = fmaxf(largest, lses[i]);
    }
    largest = over_warp(largest, true);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      lses[i] = largest == -CUDART_INF_F ? 0 : exp2f((lses[i] - largest) * 1.44269504F);
      total += lses[i];
    }
    total = over_warp(total, false);
    const float inverse = total > 0 ? 1 / total : 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      weights[thread + 32 * i] = lses[i] * inverse;
    }
  }
  __syncthreads();
  if (thread == 0) {
    a.lse[row] = total > 0 ? largest + logf(total) : -CUDART_INF_F;
  }
  float4 sum = make_float4(0, 0, 0, 0);
  const auto add = [&](const float4& part, float weight) {
    sum.x += weight * part.x;
    sum.y += weight * part.y;
    sum.z += weight * part.z;
    sum.w += weight * part.w;
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (const int part = set + i * kSets; part < parts) {
      add(first[i], weights[part]);
    }
  }
  if (has_column) {
#pragma unroll 8
    for (int part = set + kAhead * kSets; part < parts; part += kSets) {
      add(*reinterpret_cast<const float4*>(from + part * rows * a.latent), weights[part]);
    }
  }
  if constexpr (kSets > 1) {
    sums[set][thread % kCombining] = sum;
    __syncthreads();
    if (set > 0) {
      return;
    }
#pragma unroll
    for (int other = 1; other < kSets; ++other) {
      add(sums[other][thread], 1);
    }
  }
  if (has_column) {
    const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(sum.x, sum.y),
                                     __floats2bfloat162_rn(sum.z, sum.w)};
    *reinterpret_cast<uint2*>(result()) = reinterpret_cast<const uint2&>(pairs);
  }
}

}  // namespace decode_engine::kernels
