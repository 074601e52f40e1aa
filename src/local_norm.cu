// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <atomic>
#include <cstdint>
#include <limits>

#include "cohort/cuda/block_budget.hpp"
#include "norm_launch.cuh"

// The residual and RMS norm alone.

namespace cohort::cuda {
namespace detail {
namespace {

template <bool kAligned, class T>
__global__ void __launch_bounds__(kNormThreads, 1) norm_kernel(const __grid_constant__ NormTask a) {
  __shared__ NormShared shared;
  open_norm(a, shared, 0);
  const NormPart part(a, blockDim.x / kWarp);
  await_predecessor();
  await_opened(a);
  const float inverse_scale = load_inverse_scale(a);
  const std::uint32_t step = gridDim.x >> a.cluster;
  std::uint32_t turn = 0;
#pragma unroll 1
  for (std::uint32_t row = blockIdx.x >> a.cluster; row < a.rows; row += step, turn ^= 1) {
    const std::byte* const x = a.x + row * a.row_bytes;
    const bool any = part.first < a.groups;
    const LineWords<1> first = load_norm_group<kAligned>(a, x, part.first, any);
    const NormAhead ahead = NormAhead::load<kAligned>(a, row, part.first, any);
    static_cast<void>(norm_row<kAligned, T>(a, shared, turn, row, part, ahead, inverse_scale,
                                            [&](std::uint32_t group, LineWords<1>& sum) {
                                              sum = group == part.first
                                                        ? first
                                                        : load_norm_group<kAligned>(a, x, group);
                                              return true;
                                            }));
  }
}

/// The largest cluster that the device runs at all.
int look_up_largest_cluster() {
  if (!launches_programmatically()) {
    return 1;
  }
  const ClusterRoom room = least(cluster_room(norm_kernel<true, __nv_bfloat16>),
                                 cluster_room(norm_kernel<false, __nv_bfloat16>));
  return room.of_8 > 0 ? 8 : room.of_4 > 0 ? 4 : room.of_2 > 0 ? 2 : 1;
}

/// Any number of the clusters that the current device runs: none waits for another.
ClusterRoom runnable_clusters() {
  static std::array<std::atomic<std::int8_t>, 64>
      known{};  // 0: not asked; more are asked each time
  const auto device = static_cast<std::size_t>(current_device());
  int largest = device < known.size() ? known[device].load(std::memory_order_relaxed) : 0;
  if (largest == 0) {
    largest = look_up_largest_cluster();
    if (device < known.size()) {
      known[device].store(static_cast<std::int8_t>(largest), std::memory_order_relaxed);
    }
  }
  constexpr int kAny = std::numeric_limits<int>::max();
  return {.of_2 = largest >= 2 ? kAny : 0,
          .of_4 = largest >= 4 ? kAny : 0,
          .of_8 = largest >= 8 ? kAny : 0};
}

}  // namespace

void load_local_norm() {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    with_float_type(dtype, "dtype", []<class T>(T*) {
      load(norm_kernel<false, T>);
      load(norm_kernel<true, T>);
    });
  }
  static_cast<void>(runnable_clusters());  // asked now, and not while ranks wait
}

void report_local_norm(std::vector<KernelInfo>& report) {
  report.push_back(describe("rms_norm bf16", norm_kernel<true, __nv_bfloat16>, kNormThreads));
}

}  // namespace detail

using namespace detail;

void rms_norm(const Norm& norm, cudaStream_t stream) {
  check_norm(norm);
  if (norm.shape.rows == 0) {
    return;
  }
  constexpr std::int64_t kMaxBlocks = 1056;  // several for each multiprocessor of a large card
  constexpr std::int64_t kAtOnce = 128;      // nothing is waited for that is not of the row
  const NormGrid grid = norm_grid(norm.shape, kMaxBlocks, kAtOnce, runnable_clusters());
  const NormTask task(norm, static_cast<int>(grid.blocks_of_row));
  const int threads = norm_threads(norm.shape, grid, kNormThreads / static_cast<int>(kWarp));
  with_float_type(norm.shape.dtype, "dtype", [&]<class T>(T*) {
    launch_rows(task.aligned ? norm_kernel<true, T> : norm_kernel<false, T>, grid, threads, stream,
                task);
  });
}

}  // namespace cohort::cuda
