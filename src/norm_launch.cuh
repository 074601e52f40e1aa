// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include "launch.cuh"
#include "norm_rows.cuh"
#include "require.hpp"

// The host's side of the norm's kernels: checks, grids, and launches in clusters.

namespace cohort::cuda::detail {

/// Most threads of a block: a few warps for each scheduler, because what a block does takes as long
/// as it has instructions to issue.
constexpr int kNormThreads = 512;

inline void check_norm(const Norm& norm) {
  if (auto text = norm_obstacle(norm.shape); !text.empty()) {
    throw UsageError(text);
  }
  require(norm.shape.rows == 0 || (norm.x != nullptr && norm.residual != nullptr &&
                                   norm.weight != nullptr && norm.out != nullptr),
          "x, residual, weight, out", "null pointer");
  require((norm.shape.out_dtype == norm.shape.dtype) == (norm.scale == nullptr), "scale",
          "expected one for an output in f8_e4m3 alone");
  const auto element = size_of(norm.shape.dtype);
  for (const void* const data : {norm.x, static_cast<const void*>(norm.residual), norm.weight}) {
    require(reinterpret_cast<std::uintptr_t>(data) % element == 0, "x, residual, weight",
            "expected aligned elements");
  }
}

/// Threads of a block, with `warps` at most: a warp for each of its groups of a row while there are
/// so many, and as many groups for each of them beyond.
inline int norm_threads(const NormShape& shape, const NormGrid& grid, int warps) {
  const std::int64_t groups = ceil_div(shape.groups(), grid.blocks_of_row);
  return static_cast<int>(ceil_div(groups, ceil_div(groups, warps)) * kWarp);
}

/// Clusters of so many blocks of a kernel that the current card, or what this process has of it,
/// runs at once where nothing else does.
template <class... Params>
int clusters_at_once(void (*kernel)(Params...), int blocks) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kNormThreads);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  const cudaError_t code = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (code == cudaErrorInvalidClusterSize || code == cudaErrorNotSupported) {
    static_cast<void>(cudaGetLastError());  // otherwise the next call would report it
    return 0;
  }
  check_cuda(code, "cudaOccupancyMaxActiveClusters");
  return clusters;
}

template <class... Params>
ClusterRoom cluster_room(void (*kernel)(Params...)) {
  return {.of_2 = clusters_at_once(kernel, 2),
          .of_4 = clusters_at_once(kernel, 4),
          .of_8 = clusters_at_once(kernel, 8)};
}

/// One launch of clusters, one for each row or for some of them.
template <class... Params, class... Args>
void launch_rows(void (*kernel)(Params...), const NormGrid& grid, int threads, cudaStream_t stream,
                 const Args&... args) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(grid.blocks_of_row), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.rows * grid.blocks_of_row));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = grid.blocks_of_row > 1 ? 2 : launches_programmatically() ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...),
             "cudaLaunchKernelEx");
}

}  // namespace cohort::cuda::detail
