// SPDX-License-Identifier: Apache-2.0
#include "device_kernels.hpp"

#include "cohort/cuda/cuda_check.hpp"

namespace cohort::bench {

namespace {

constexpr int kThreads = 512;

__global__ void spin_kernel(long long cycles, bool next_waits) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (next_waits) {
    cudaTriggerProgrammaticLaunchCompletion();
  }
#endif
  const long long start = clock64();
  while (clock64() - start < cycles) {
  }
}

__global__ void __launch_bounds__(kThreads)
    copy_kernel(int4* __restrict__ to, const int4* __restrict__ from, std::size_t count) {
  constexpr int kUnroll = 4;  // loads in flight for each thread
  const std::size_t step = static_cast<std::size_t>(gridDim.x) * kThreads;
  std::size_t i = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; i + (kUnroll - 1) * step < count; i += kUnroll * step) {
    int4 values[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      values[u] = from[i + u * step];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      to[i + u * step] = values[u];
    }
  }
  for (; i < count; i += step) {
    to[i] = from[i];
  }
}

}  // namespace

void launch_spin(long long cycles, bool next_waits, cudaStream_t stream) {
  spin_kernel<<<1, 1, 0, stream>>>(cycles, next_waits);
  cuda_check(cudaGetLastError(), "spin_kernel");
}

void launch_copy(void* to, const void* from, std::size_t bytes, int blocks, cudaStream_t stream) {
  copy_kernel<<<blocks, kThreads, 0, stream>>>(static_cast<int4*>(to),
                                               static_cast<const int4*>(from), bytes / 16);
  cuda_check(cudaGetLastError(), "copy_kernel");
}

}  // namespace cohort::bench
