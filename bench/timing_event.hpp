// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "cohort/cuda/cuda_check.hpp"
#include "cohort/cuda/handles.hpp"

namespace cohort::bench {

/// An event that notes the time, which the library's own do not.
[[nodiscard]] inline UniqueEvent make_timing_event(int device) {
  const DeviceGuard guard(device);
  cudaEvent_t event = nullptr;
  cuda_check(cudaEventCreate(&event), "cudaEventCreate");
  return UniqueEvent(event);
}

}  // namespace cohort::bench
