// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cohort/cuda/shapes.hpp"
#include "elements.cuh"
#include "require.hpp"

// What the local and the peer kernels for attention share.

namespace cohort::cuda::detail {

/// A [batch][heads] array of floats.
struct Strided2 {
  float* base = nullptr;
  std::int64_t batch_stride = 0;
  std::int64_t head_stride = 0;

  __device__ __forceinline__ float* at(std::uint32_t b, std::uint32_t h) const {
    return base + b * batch_stride + h * head_stride;
  }
};

inline void check_merge_shape(const MergeShape& s, int n) {
  if (const std::string obstacle = merge_obstacle(s, n); !obstacle.empty()) {
    throw UsageError(obstacle);
  }
}

}  // namespace cohort::cuda::detail
