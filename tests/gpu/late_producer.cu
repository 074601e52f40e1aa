// SPDX-License-Identifier: Apache-2.0
#include "gpu/late_producer.hpp"

#include <cuda_bf16.h>

#include <stdexcept>

namespace cohort::test {
namespace {

constexpr int kBlocks = 16;
constexpr int kThreads = 256;
constexpr long long kSpinCycles = 20000;

__device__ float produced(std::int64_t i, std::uint32_t round, int rank) {
  return static_cast<float>((i * 7 + static_cast<std::int64_t>(round) * 13 + rank * 5) % 64);
}

__global__ void advance_kernel(std::uint32_t* counter) { *counter += 1; }

__global__ void produce_kernel(__nv_bfloat16* data, std::int64_t count,
                               const std::uint32_t* counter, int rank) {
  cudaTriggerProgrammaticLaunchCompletion();
  const std::uint32_t round = *counter;
  if (blockIdx.x == 0) {
    for (const long long begin = clock64(); clock64() - begin < kSpinCycles;) {
    }
  }
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    data[i] = __float2bfloat16(produced(i, round, rank));
  }
}

__global__ void gathered_kernel(const __nv_bfloat16* data, std::int64_t share, int ranks,
                                const std::uint32_t* counter, unsigned long long* wrong) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < share * ranks; i += step) {
    const float expected = produced(i % share, *counter, static_cast<int>(i / share));
    if (__bfloat162float(data[i]) != expected) {
      atomicAdd(wrong, 1ULL);
    }
  }
}

__global__ void scattered_kernel(const __nv_bfloat16* data, std::int64_t share, int ranks, int rank,
                                 const std::uint32_t* counter, unsigned long long* wrong) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < share;
       i += step) {
    float expected = 0;
    for (int r = 0; r < ranks; ++r) {
      expected += produced(rank * share + i, *counter, r);
    }
    if (__bfloat162float(data[i]) != __bfloat162float(__float2bfloat16(expected))) {
      atomicAdd(wrong, 1ULL);
    }
  }
}

void check_launch() {
  if (const cudaError_t code = cudaGetLastError(); code != cudaSuccess) {
    throw std::runtime_error(cudaGetErrorString(code));
  }
}

}  // namespace

void advance(std::uint32_t* counter, cudaStream_t stream) {
  advance_kernel<<<1, 1, 0, stream>>>(counter);
  check_launch();
}

void produce_late(BFloat16* data, std::int64_t count, const std::uint32_t* counter, int rank,
                  cudaStream_t stream) {
  produce_kernel<<<kBlocks, kThreads, 0, stream>>>(reinterpret_cast<__nv_bfloat16*>(data), count,
                                                   counter, rank);
  check_launch();
}

void check_gathered(const BFloat16* data, std::int64_t share, int ranks,
                    const std::uint32_t* counter, std::uint64_t* wrong, cudaStream_t stream) {
  gathered_kernel<<<kBlocks, kThreads, 0, stream>>>(reinterpret_cast<const __nv_bfloat16*>(data),
                                                    share, ranks, counter,
                                                    reinterpret_cast<unsigned long long*>(wrong));
  check_launch();
}

void check_scattered(const BFloat16* data, std::int64_t share, int ranks, int rank,
                     const std::uint32_t* counter, std::uint64_t* wrong, cudaStream_t stream) {
  scattered_kernel<<<kBlocks, kThreads, 0, stream>>>(reinterpret_cast<const __nv_bfloat16*>(data),
                                                     share, ranks, rank, counter,
                                                     reinterpret_cast<unsigned long long*>(wrong));
  check_launch();
}

}  // namespace cohort::test
