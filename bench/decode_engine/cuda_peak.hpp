// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "cohort/cuda/cuda_check.hpp"
#include "peak.hpp"

namespace decode_engine {

[[nodiscard]] inline int attribute_of(int device, cudaDeviceAttr which) {
  int value = 0;
  cohort::cuda_check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

/// Of the clocks that the driver names. A multiprocessor of compute capability 9.0 does 2048 fused
/// multiply-adds of dense bf16 in a cycle (NVIDIA, "H100 Tensor Core GPU Architecture", 2022); of
/// others nothing is known here.
[[nodiscard]] inline Peak peak_of(int device) {
  const auto attribute = [device](cudaDeviceAttr which) {
    return static_cast<double>(attribute_of(device, which));
  };
  if (attribute(cudaDevAttrComputeCapabilityMajor) != 9) {
    return {};
  }
  return {.bytes = 2e3 * attribute(cudaDevAttrMemoryClockRate) *
                   attribute(cudaDevAttrGlobalMemoryBusWidth) / 8,
          .flops =
              4096e3 * attribute(cudaDevAttrMultiProcessorCount) * attribute(cudaDevAttrClockRate)};
}

}  // namespace decode_engine
