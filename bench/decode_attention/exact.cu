// SPDX-License-Identifier: Apache-2.0
#include "exact.hpp"

#include <cuda_bf16.h>
#include <fmt/format.h>
#include <math_constants.h>

#include "cohort/cuda/cuda_check.hpp"
#include "cohort/error.hpp"

namespace decode_attention {

namespace {

using decode_engine::Attention;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__device__ double wide(const cohort::BFloat16* x, std::int64_t i) {
  return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(x)[i]);
}

__device__ double over_warp(double value, bool largest) {
  for (int step = 16; step > 0; step /= 2) {
    const double other = __shfl_xor_sync(0xffffffff, value, step);
    value = largest ? fmax(value, other) : value + other;
  }
  return value;
}
__device__ double over_block(double value, bool largest) {
  __shared__ double warps[kWarps];
  value = over_warp(value, largest);
  __syncthreads();  // the last call's values have been read
  if (threadIdx.x % 32 == 0) {
    warps[threadIdx.x / 32] = value;
  }
  __syncthreads();
  value = warps[0];
  for (int i = 1; i < kWarps; ++i) {
    value = largest ? fmax(value, warps[i]) : value + warps[i];
  }
  return value;
}

/// A block's sequence and head.
struct Row {
  std::int64_t index = blockIdx.x;
  std::int64_t sequence, head;

  __device__ explicit Row(const Attention& a) : sequence(index / a.heads), head(index % a.heads) {}
};

__global__ void attend_kernel(Attention a, Exact exact) {
  extern __shared__ double weights[];
  const Row row(a);
  const std::int64_t width = a.latent + a.rope;
  const cohort::BFloat16* const q = a.q + (row.head * a.batch + row.sequence) * width;
  const cohort::BFloat16* const cache = a.cache + row.sequence * a.capacity * width;
  const int tokens = a.counts[row.sequence];
  const int thread = static_cast<int>(threadIdx.x);
  for (int token = thread / 32; token < tokens; token += kWarps) {
    double score = 0;
    for (std::int64_t i = thread % 32; i < width; i += 32) {
      score += wide(q, i) * wide(cache, token * width + i);
    }
    score = over_warp(score, false);
    if (thread % 32 == 0) {
      weights[token] = score * a.scale;
    }
  }
  __syncthreads();
  double largest = -CUDART_INF;
  for (int token = thread; token < tokens; token += kThreads) {
    largest = fmax(largest, weights[token]);
  }
  largest = over_block(largest, true);
  double total = 0;
  for (int token = thread; token < tokens; token += kThreads) {
    weights[token] = exp(weights[token] - largest);
    total += weights[token];
  }
  total = over_block(total, false);  // behind whose barrier all weights are there
  for (std::int64_t column = thread; column < a.latent; column += kThreads) {
    double sum = 0;
    double magnitude = 0;
    for (int token = 0; token < tokens; ++token) {
      const double value = weights[token] * wide(cache, token * width + column);
      sum += value;
      magnitude += fabs(value);
    }
    exact.out[row.index * a.latent + column] = total > 0 ? sum / total : 0;
    exact.magnitude[row.index * a.latent + column] = total > 0 ? magnitude / total : 0;
  }
  if (thread == 0) {
    exact.lse[row.index] = total > 0 ? largest + log(total) : -CUDART_INF;
  }
}

__global__ void count_kernel(Attention a, Exact exact, unsigned long long* wrong) {
  const Row row(a);
  const cohort::BFloat16* const out = a.out + (row.head * a.batch + row.sequence) * a.latent;
  for (std::int64_t i = threadIdx.x; i < a.latent; i += kThreads) {
    const double right = exact.out[row.index * a.latent + i];
    // 1.1 for sums in fp32. What is not a number is not within the bound.
    const double bound = 1.1 * exact.magnitude[row.index * a.latent + i] / 256 + fabs(right) / 512;
    if (!(fabs(wide(out, i) - right) <= bound)) {
      atomicAdd(wrong, 1);
    }
  }
  const double lse = exact.lse[row.index];
  if (threadIdx.x == 0 && a.lse[row.index] != lse &&
      !(fabs(static_cast<double>(a.lse[row.index]) - lse) <= 1.1 / 512)) {
    atomicAdd(wrong, 1);
  }
}

unsigned rows_of(const Attention& a) { return static_cast<unsigned>(a.batch * a.heads); }

}  // namespace

void attend_exactly(const Attention& a, const Exact& exact, cudaStream_t stream) {
  if (a.capacity > kMostTokens) {
    throw cohort::ConfigError(
        fmt::format("{} tokens: attention in fp64 takes {} at most", a.capacity, kMostTokens));
  }
  constexpr std::size_t kMostBytes = kMostTokens * sizeof(double);
  cohort::cuda_check(
      cudaFuncSetAttribute(attend_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostBytes),
      "cudaFuncSetAttribute");
  attend_kernel<<<rows_of(a), kThreads, kMostBytes, stream>>>(a, exact);
  cohort::cuda_check(cudaGetLastError(), "kernel launch");
}

void count_wrong(const Attention& a, const Exact& exact, unsigned long long* wrong,
                 cudaStream_t stream) {
  count_kernel<<<rows_of(a), kThreads, 0, stream>>>(a, exact, wrong);
  cohort::cuda_check(cudaGetLastError(), "kernel launch");
}

}  // namespace decode_attention
