#include "cohort/cuda/support_kernels.hpp"

#include <algorithm>
#include <cstdint>

#include "elements.cuh"
#include "launch.cuh"

namespace cohort::cuda {
namespace detail {
namespace {

constexpr int kThreads = 256;

__global__ void visibility_guard_kernel() {}

/// Shape and strides by value; unused leading dimensions have extent 1.
struct Index {
  std::int64_t shape[kMaxConvertDims];
  std::int64_t in[kMaxConvertDims];
  std::int64_t out[kMaxConvertDims];
};

template <class Out>
__global__ void convert_kernel(const float* in, Out* out, const __grid_constant__ Index index,
                               std::int64_t count) {
  cudaGridDependencySynchronize();
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    std::int64_t rest = i;
    std::int64_t from = 0;
    std::int64_t to = 0;
#pragma unroll
    for (int d = kMaxConvertDims - 1; d >= 0; --d) {
      const std::int64_t position = index.shape[d] == 1 ? 0 : rest % index.shape[d];
      rest = index.shape[d] == 1 ? rest : rest / index.shape[d];
      from += position * index.in[d];
      to += position * index.out[d];
    }
    out[to] = static_cast<Out>(in[from]);
  }
}

__global__ void merge_lse_kernel(const __grid_constant__ LseMerge a) {
  cudaGridDependencySynchronize();
  const std::int64_t count = a.batch * a.heads;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    const std::int64_t b = i / a.heads;
    const std::int64_t h = i % a.heads;
    float lses[kMaxLseRanks];
    for (int r = 0; r < a.ranks; ++r) {
      lses[r] = a.lses[r * a.rank_stride + b * a.batch_stride + h * a.head_stride];
    }
    a.merged[b * a.merged_batch_stride + h * a.merged_head_stride] =
        merge_scales(lses, a.ranks, a.base);
  }
}

int blocks_for(std::int64_t count) {
  constexpr std::int64_t kMaxBlocks = 1056;  // several for each multiprocessor of a large card
  return static_cast<int>(std::clamp<std::int64_t>(ceil_div(count, kThreads), 1, kMaxBlocks));
}

}  // namespace
}  // namespace detail

void launch_visibility_guard(cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(1);
  config.stream = stream;
  detail::check_cuda(cudaLaunchKernelEx(&config, detail::visibility_guard_kernel),
                     "cudaLaunchKernelEx");
}

void convert_copy(const void* in, std::span<const std::int64_t> in_strides, void* out,
                  std::span<const std::int64_t> out_strides, std::span<const std::int64_t> shape,
                  DType out_dtype, cudaStream_t stream) {
  detail::require(shape.size() <= kMaxConvertDims && in_strides.size() == shape.size() &&
                      out_strides.size() == shape.size(),
                  "shape", "expected one length for all spans, of at most 5");
  detail::Index index{};
  std::fill(std::begin(index.shape), std::end(index.shape), 1);
  std::int64_t count = 1;
  const std::size_t skipped = kMaxConvertDims - shape.size();
  for (std::size_t d = 0; d < shape.size(); ++d) {
    index.shape[skipped + d] = shape[d];
    index.in[skipped + d] = in_strides[d];
    index.out[skipped + d] = out_strides[d];
    count *= shape[d];
  }
  if (count == 0) {
    return;
  }
  const auto* const source = static_cast<const float*>(in);
  const int blocks = detail::blocks_for(count);
  switch (out_dtype) {
    case DType::f16:
      return detail::launch(detail::convert_kernel<__half>, blocks, detail::kThreads, stream,
                            source, static_cast<__half*>(out), index, count);
    case DType::bf16:
      return detail::launch(detail::convert_kernel<__nv_bfloat16>, blocks, detail::kThreads, stream,
                            source, static_cast<__nv_bfloat16*>(out), index, count);
    default:
      throw UsageError(
          fmt::format("out_dtype: expected f16 or bf16, got {}", to_string(out_dtype)));
  }
}

void merge_lse(const LseMerge& arguments, cudaStream_t stream) {
  detail::require(arguments.ranks >= 1 && arguments.ranks <= kMaxLseRanks, "lses",
                  "expected the LSEs of 1 to 256 ranks");
  const std::int64_t count = arguments.batch * arguments.heads;
  if (count == 0) {
    return;
  }
  detail::launch(detail::merge_lse_kernel, detail::blocks_for(count), detail::kThreads, stream,
                 arguments);
}

}  // namespace cohort::cuda
