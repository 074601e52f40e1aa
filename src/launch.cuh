// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cohort/cuda/kernels.hpp"
#include "cohort/error.hpp"
#include "require.hpp"

// Launching, and what the launchers check.

namespace cohort::cuda::detail {

inline void check_cuda(cudaError_t code, const char* call) {
  if (code != cudaSuccess) {
    throw TransportError({.call = call, .native_code = code}, cudaGetErrorString(code));
  }
}

/// In all threads of every kernel, before the first load of what earlier work has written and the
/// first store: this launch may have begun before the one in front of it has ended.
__device__ __forceinline__ void await_predecessor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

/// In all threads: once every block was here or has ended, the card may launch the next kernel
/// where that takes the attribute.
__device__ __forceinline__ void launch_successor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

/// The device that is current.
[[nodiscard]] int current_device();

/// Whether the current device takes the attribute; see card.hpp.
[[nodiscard]] bool launches_programmatically();

/// One launch. Programmatic: the kernel's blocks may be scheduled while the predecessor drains,
/// where there is such a thing. Every kernel starts with await_predecessor() in all threads.
template <class... Params, class... Args>
void launch_as(bool programmatic, void (*kernel)(Params...), int blocks, int threads,
               cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = programmatic && launches_programmatically() ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...),
             "cudaLaunchKernelEx");
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), int blocks, int threads, cudaStream_t stream,
            const Args&... args) {
  launch_as(true, kernel, blocks, threads, stream, args...);
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Calls `call` with the number of ranks as a constant: 2 to 8, or 0 for any other.
template <class Call>
void with_ranks(int n, const Call& call) {
  switch (n) {
    case 2:
      return call(std::integral_constant<int, 2>{});
    case 3:
      return call(std::integral_constant<int, 3>{});
    case 4:
      return call(std::integral_constant<int, 4>{});
    case 5:
      return call(std::integral_constant<int, 5>{});
    case 6:
      return call(std::integral_constant<int, 6>{});
    case 7:
      return call(std::integral_constant<int, 7>{});
    case 8:
      return call(std::integral_constant<int, 8>{});
    default:
      return call(std::integral_constant<int, 0>{});
  }
}

/// The same with the numbers that cards come in, 2, 4 and 8, where `kSpecial`; 0 for any other.
template <bool kSpecial, class Call>
void with_card_ranks(int n, const Call& call) {
  if constexpr (kSpecial) {
    switch (n) {
      case 2:
        return call(std::integral_constant<int, 2>{});
      case 4:
        return call(std::integral_constant<int, 4>{});
      case 8:
        return call(std::integral_constant<int, 8>{});
      default:
        break;
    }
  }
  call(std::integral_constant<int, 0>{});
}

/// What a kernel is compiled to, for `kernel_report`.
template <class... Params>
KernelInfo describe(const char* name, void (*kernel)(Params...), int threads) {
  cudaFuncAttributes attributes{};
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  KernelInfo info{.name = name,
                  .registers = attributes.numRegs,
                  .local_bytes = attributes.localSizeBytes,
                  .shared_bytes = attributes.sharedSizeBytes,
                  .threads = threads,
                  .blocks_per_sm = 0};
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&info.blocks_per_sm, kernel, threads, 0),
             "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return info;
}

/// Has the current device load a kernel; see `load_kernels`.
template <class... Params>
void load(void (*kernel)(Params...)) {
  cudaFuncAttributes attributes{};
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
}

// Each source file loads its own kernels, and reports them.
void load_gather(int n);
void load_reduce(int n);
void load_all_reduce(int n);
void load_norm(int n);
void load_merge(int n);
void load_general_merge(int n);
void load_copy();
void load_local_merge();
void load_local_norm();
void load_support();
void report_copy(std::vector<KernelInfo>& report);
void report_local_merge(std::vector<KernelInfo>& report);
void report_local_norm(std::vector<KernelInfo>& report);
void report_gather(int n, std::vector<KernelInfo>& report);
void report_reduce(int n, std::vector<KernelInfo>& report);
void report_all_reduce(int n, std::vector<KernelInfo>& report);
void report_norm(int n, std::vector<KernelInfo>& report);
void report_merge(int n, std::vector<KernelInfo>& report);
void report_general_merge(int n, std::vector<KernelInfo>& report);

}  // namespace cohort::cuda::detail
