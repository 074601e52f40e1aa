// SPDX-License-Identifier: Apache-2.0
#include "cuda_kernels.hpp"

#include <cuda_bf16.h>
#include <fmt/format.h>
#include <math_constants.h>

#include <algorithm>

#include "cohort/cuda/cuda_check.hpp"
#include "cohort/error.hpp"
#include "rotation.hpp"

namespace decode_engine::kernels {

namespace {

constexpr int kThreads = 256;
constexpr int kManyThreads = 1024;  // of kernels with a block for each sequence

__device__ __nv_bfloat16* native(BFloat16* x) { return reinterpret_cast<__nv_bfloat16*>(x); }
__device__ const __nv_bfloat16* native(const BFloat16* x) {
  return reinterpret_cast<const __nv_bfloat16*>(x);
}
__device__ float wide(const BFloat16* x, std::int64_t i) { return __bfloat162float(native(x)[i]); }
__device__ void store(BFloat16* x, std::int64_t i, float value) {
  native(x)[i] = __float2bfloat16_rn(value);
}

/// The result of all threads' values, on each of them. Blocks have whole warps.
template <class T, class Combine>
__device__ T over_block(T value, T neutral, Combine combine) {
  __shared__ T warps[32];
  const unsigned lane = threadIdx.x % 32;
  for (int step = 16; step > 0; step /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffff, value, step));
  }
  __syncthreads();  // the last call's values have been read
  if (lane == 0) {
    warps[threadIdx.x / 32] = value;
  }
  __syncthreads();
  value = lane < blockDim.x / 32 ? warps[lane] : neutral;
  for (int step = 16; step > 0; step /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffff, value, step));
  }
  return value;
}
__device__ float sum_over_block(float value) {
  return over_block(value, 0.0F, [](float a, float b) { return a + b; });
}
__global__ void noise_kernel(BFloat16* to, Noise noise, Block block) {
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < block.elements();
       i += step) {
    const dcp_decode::Numbers numbers = noise.row(block.first_row + i / block.columns);
    store(to, i, noise.element(numbers, block.first_column + i % block.columns));
  }
}

__global__ void embed_kernel(const std::int32_t* tokens, const BFloat16* table, BFloat16* hidden,
                             std::int64_t width) {
  const std::int64_t from = tokens[blockIdx.x] * width;
  for (std::int64_t i = threadIdx.x; i < width; i += kThreads) {
    native(hidden)[blockIdx.x * width + i] = native(table)[from + i];
  }
}

/// In front of all loads and stores, in all threads: this launch may have begun early.
__device__ void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}
/// Once all blocks were here, the next kernel may begin that waits so.
__device__ void launch_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

/// Of `kManyThreads`, which hold the row in registers.
__device__ void add_and_normalize_row(BFloat16* hidden, const BFloat16* sums, const BFloat16* gain,
                                      BFloat16* y, std::int64_t number, std::int64_t width) {
  constexpr int kEach = static_cast<int>(kMostWidth) / kManyThreads;
  const std::int64_t row = number * width;
  float x[kEach] = {};
  float add[kEach] = {};
  float scales[kEach] = {};
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const std::int64_t i = k * kManyThreads + threadIdx.x;
    if (i < width) {
      x[k] = wide(hidden, row + i);
      add[k] = sums == nullptr ? 0 : wide(sums, row + i);
      scales[k] = wide(gain, i);
    }
  }
  float squares = 0;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    x[k] = __bfloat162float(__float2bfloat16_rn(x[k] + add[k]));
    squares += x[k] * x[k];
  }
  const float scale = rsqrtf(sum_over_block(squares) / static_cast<float>(width) +
                             static_cast<float>(kNormEpsilon));
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const std::int64_t i = k * kManyThreads + threadIdx.x;
    if (i < width) {
      if (sums != nullptr) {
        store(hidden, row + i, x[k]);
      }
      store(y, row + i, x[k] * scale * scales[k]);
    }
  }
}

/// A block for each row.
__global__ void __launch_bounds__(kManyThreads)
    add_and_normalize_kernel(BFloat16* hidden, const BFloat16* sums, const BFloat16* gain,
                             BFloat16* y, std::int64_t width) {
  add_and_normalize_row(hidden, sums, gain, y, blockIdx.x, width);
}

__device__ void rotate_pair(const BFloat16* from, BFloat16* to, std::int64_t pair, Turn turn) {
  const float a = wide(from, 2 * pair);
  const float b = wide(from, 2 * pair + 1);
  store(to, 2 * pair, a * turn.cos - b * turn.sin);
  store(to, 2 * pair + 1, a * turn.sin + b * turn.cos);
}

/// A block for each head and sequence.
__global__ void rotate_kernel(const __grid_constant__ Rotation r) {
  if (r.next_waits) {
    launch_next_kernel();
  }
  wait_for_kernel_before();
  const std::int64_t h = blockIdx.x;
  const std::int64_t b = blockIdx.y;
  for (std::int64_t pair = threadIdx.x; pair < r.rope / 2; pair += blockDim.x) {
    rotate_pair(r.from + b * r.from_sequence + h * r.from_head,
                r.to + b * r.to_sequence + h * r.to_head, pair, r.turns[b * r.rope / 2 + pair]);
  }
}

/// Of a block.
__device__ void keep_row(const CacheRow& c, std::int64_t b) {
  const std::int64_t width = c.latent + c.rope;
  if (c.slots[b] < 0) {
    return;
  }
  const BFloat16* from = c.kv + b * width;
  BFloat16* to = c.cache + (b * c.capacity + c.slots[b]) * width;
  float squares = 0;
  for (std::int64_t i = threadIdx.x; i < c.latent; i += blockDim.x) {
    squares += wide(from, i) * wide(from, i);
  }
  const float scale = rsqrtf(sum_over_block(squares) / static_cast<float>(c.latent) +
                             static_cast<float>(kNormEpsilon));
  for (std::int64_t i = threadIdx.x; i < c.latent; i += blockDim.x) {
    store(to, i, wide(from, i) * scale * wide(c.gain, i));
  }
  for (std::int64_t pair = threadIdx.x; pair < c.rope / 2; pair += blockDim.x) {
    rotate_pair(from + c.latent, to + c.latent, pair, c.turns[b * c.rope / 2 + pair]);
  }
}

/// A block for each sequence.
__global__ void keep_kernel(const __grid_constant__ CacheRow c) { keep_row(c, blockIdx.x); }

/// A block for each row of either.
__global__ void __launch_bounds__(kManyThreads)
    normalize_and_keep_kernel(BFloat16* x, const BFloat16* gain, BFloat16* y, std::int64_t width,
                              const __grid_constant__ CacheRow c) {
  if (blockIdx.x < c.batch) {
    add_and_normalize_row(x, nullptr, gain, y, blockIdx.x, width);
  } else {
    keep_row(c, blockIdx.x - c.batch);
  }
}

__global__ void gate_kernel(const BFloat16* x, BFloat16* y, std::int64_t rows, std::int64_t width) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < rows * width) {
    const std::int64_t row = i / width;
    const float a = wide(x, row * 2 * width + i % width);
    store(y, i, a / (1 + __expf(-a)) * wide(x, (row * 2 + 1) * width + i % width));
  }
}

/// A logit and its place, so that the larger of two is the larger logit or the first of equals.
__device__ unsigned long long candidate(float logit, std::int64_t place) {
  const unsigned bits = __float_as_uint(logit);
  const unsigned ordered = (bits >> 31) != 0 ? ~bits : bits | 0x80000000U;
  return (static_cast<unsigned long long>(ordered) << 32) | ~static_cast<unsigned>(place);
}

/// A block for each row.
__global__ void __launch_bounds__(kManyThreads)
    choose_kernel(const float* logits, std::int64_t stride, std::int32_t* tokens,
                  std::int64_t vocabulary) {
  constexpr int kAtOnce = 8;
  const float* row = logits + blockIdx.x * stride;
  unsigned long long best = 0;
  for (std::int64_t first = threadIdx.x; first < vocabulary; first += kAtOnce * kManyThreads) {
    float some[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const std::int64_t i = first + k * kManyThreads;
      some[k] = i < vocabulary ? row[i] : -CUDART_INF_F;
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const std::int64_t i = first + k * kManyThreads;
      best = i < vocabulary ? max(best, candidate(some[k], i)) : best;
    }
  }
  best = over_block(best, 0ULL,
                    [](unsigned long long a, unsigned long long b) { return a > b ? a : b; });
  if (threadIdx.x == 0) {
    tokens[blockIdx.x] = static_cast<std::int32_t>(~static_cast<unsigned>(best));
  }
}

/// A block for each sequence.
__global__ void lengthen_kernel(std::int32_t* lengths, Turn* turns, std::int64_t rope) {
  const std::int64_t b = blockIdx.x;
  const std::int32_t position = lengths[b];  // of the new token
  __syncthreads();
  if (threadIdx.x == 0) {
    lengths[b] = position + 1;
  }
  for (std::int64_t pair = threadIdx.x; pair < rope / 2; pair += blockDim.x) {
    double sin = 0;
    double cos = 0;
    // As rotation_angle. In fp64: at position 131,071 an angle in fp32 is off by 0.004.
    const double angle =
        position * pow(kRotationBase, -2.0 * static_cast<double>(pair) / static_cast<double>(rope));
    sincos(angle, &sin, &cos);
    turns[b * rope / 2 + pair] = {static_cast<float>(cos), static_cast<float>(sin)};
  }
}

template <class Kernel, class... Arguments>
void launch(Kernel kernel, dim3 blocks, int threads, cudaStream_t stream, Arguments... arguments) {
  if (blocks.x == 0 || blocks.y == 0) {
    return;
  }
  kernel<<<blocks, threads, 0, stream>>>(arguments...);
  cohort::cuda_check(cudaGetLastError(), "kernel launch");
}

unsigned blocks_for(std::int64_t elements) {
  return static_cast<unsigned>((elements + kThreads - 1) / kThreads);
}

void check_width(std::int64_t width) {
  if (width > kMostWidth) {
    throw cohort::ConfigError(
        fmt::format("{} elements of a row: expected {} at most", width, kMostWidth));
  }
}

}  // namespace

void fill_with_noise(BFloat16* to, const Noise& noise, const Block& block, cudaStream_t stream) {
  launch(noise_kernel, dim3(std::min(4096U, blocks_for(block.elements()))), kThreads, stream, to,
         noise, block);
}
void embed(const std::int32_t* tokens, const BFloat16* table, BFloat16* hidden, std::int64_t batch,
           std::int64_t width, cudaStream_t stream) {
  launch(embed_kernel, dim3(static_cast<unsigned>(batch)), kThreads, stream, tokens, table, hidden,
         width);
}
void add_and_normalize(BFloat16* hidden, const BFloat16* sums, const BFloat16* gain, BFloat16* y,
                       std::int64_t rows, std::int64_t width, cudaStream_t stream) {
  check_width(width);
  launch(add_and_normalize_kernel, dim3(static_cast<unsigned>(rows)), kManyThreads, stream, hidden,
         sums, gain, y, width);
}
void normalize_and_keep(BFloat16* x, const BFloat16* gain, BFloat16* y, std::int64_t width,
                        const CacheRow& row, cudaStream_t stream) {
  check_width(width);
  launch(normalize_and_keep_kernel, dim3(static_cast<unsigned>(2 * row.batch)), kManyThreads,
         stream, x, gain, y, width, row);
}
void rotate(const Rotation& r, cudaStream_t stream) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(r.heads), static_cast<unsigned>(r.batch));
  config.blockDim = 32;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  cohort::cuda_check(cudaLaunchKernelEx(&config, rotate_kernel, r), "kernel launch");
}
void keep(const CacheRow& row, cudaStream_t stream) {
  launch(keep_kernel, dim3(static_cast<unsigned>(row.batch)), kThreads, stream, row);
}
void gate(const BFloat16* x, BFloat16* y, std::int64_t rows, std::int64_t width,
          cudaStream_t stream) {
  launch(gate_kernel, dim3(blocks_for(rows * width)), kThreads, stream, x, y, rows, width);
}
void choose(const float* logits, std::int64_t stride, std::int32_t* tokens, std::int64_t rows,
            std::int64_t vocabulary, cudaStream_t stream) {
  launch(choose_kernel, dim3(static_cast<unsigned>(rows)), kManyThreads, stream, logits, stride,
         tokens, vocabulary);
}
void lengthen(std::int32_t* lengths, Turn* turns, std::int64_t batch, std::int64_t rope,
              cudaStream_t stream) {
  launch(lengthen_kernel, dim3(static_cast<unsigned>(batch)), 32, stream, lengths, turns, rope);
}

}  // namespace decode_engine::kernels
