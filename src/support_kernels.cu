// SPDX-License-Identifier: Apache-2.0
#include "cohort/cuda/support_kernels.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <string>

#include "cohort/cuda/card.hpp"
#include "cohort/cuda/quick_questions.hpp"
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
  await_predecessor();
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
  await_predecessor();
  const std::int64_t count = a.batch * a.heads;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    const std::int64_t b = i / a.heads;
    const std::int64_t h = i % a.heads;
    float lses[kMaxLseRanks];
    float& merged = a.merged[b * a.merged_batch_stride + h * a.merged_head_stride];
    if (a.local_tokens != nullptr && a.local_tokens[b * a.local_tokens_stride] <= 0) {
      merged = dcp::kEmptyLse;
      continue;
    }
    for (int r = 0; r < a.ranks; ++r) {
      lses[r] = a.lses[r * a.rank_stride + b * a.batch_stride + h * a.head_stride];
    }
    const float sink = a.sink != nullptr ? a.sink[h * a.sink_stride] : dcp::kEmptyLse;
    merged = mass_lse(merge_scales(lses, a.ranks, a.base, sink), a.base);
  }
}

__global__ void place_step_kernel(const __grid_constant__ dcp::KvRows rows) {
  await_predecessor();
  const std::int64_t count = rows.batch * rows.queries;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    rows.place(i / rows.queries, i % rows.queries);
  }
}

int blocks_for(std::int64_t count) {
  constexpr std::int64_t kMaxBlocks = 1056;  // several for each multiprocessor of a large card
  return static_cast<int>(std::clamp<std::int64_t>(ceil_div(count, kThreads), 1, kMaxBlocks));
}

/// nvcc's list of what it compiles for.
#define COHORT_TEXT_OF(...) #__VA_ARGS__
#define COHORT_TEXT(...) COHORT_TEXT_OF(__VA_ARGS__)
constexpr char kBuiltFor[] = COHORT_TEXT(__CUDA_ARCH_LIST__);
#undef COHORT_TEXT
#undef COHORT_TEXT_OF

Capability capability_of(int device) {
  Capability card;
  check_cuda(cudaDeviceGetAttribute(&card.major, cudaDevAttrComputeCapabilityMajor, device),
             "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&card.minor, cudaDevAttrComputeCapabilityMinor, device),
             "cudaDeviceGetAttribute");
  return card;
}

bool look_up_programmatic_launch(int device) {
  int driver = 0;
  check_cuda(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  cudaFuncAttributes attributes{};
  check_cuda(cudaFuncGetAttributes(&attributes, merge_lse_kernel), "cudaFuncGetAttributes");
  return cuda::launches_programmatically(capability_of(device), driver, attributes.ptxVersion);
}

}  // namespace

int current_device() {
  if (const auto current = cohort::detail::current_device_quickly()) {
    return *current;
  }
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

bool launches_programmatically() {
  enum : std::int8_t { unknown, no, yes };
  static std::array<std::atomic<std::int8_t>, 64> known{};  // by ordinal; more are asked each time
  const auto device = static_cast<std::size_t>(current_device());
  if (device < known.size()) {
    if (const auto answer = known[device].load(std::memory_order_relaxed); answer != unknown) {
      return answer == yes;
    }
  }
  const bool answer = look_up_programmatic_launch(static_cast<int>(device));
  if (device < known.size()) {
    known[device].store(answer ? yes : no, std::memory_order_relaxed);
  }
  return answer;
}

void load_support() {
  load(visibility_guard_kernel);
  load(convert_kernel<__half>);
  load(convert_kernel<__nv_bfloat16>);
  load(merge_lse_kernel);
  load(place_step_kernel);
}

}  // namespace detail

void require_code() {
  cudaFuncAttributes attributes{};
  const cudaError_t code = cudaFuncGetAttributes(&attributes, detail::merge_lse_kernel);
  if (code == cudaErrorNoKernelImageForDevice || code == cudaErrorInvalidDeviceFunction ||
      code == cudaErrorUnsupportedPtxVersion || code == cudaErrorInvalidKernelImage) {
    static_cast<void>(cudaGetLastError());  // otherwise the next call would report it
    const int device = detail::current_device();
    cudaDeviceProp properties{};
    detail::check_cuda(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
    throw ConfigError("cuda_backend: " + no_code_text(properties.name,
                                                      detail::capability_of(device),
                                                      detail::kBuiltFor));
  }
  detail::check_cuda(code, "cudaFuncGetAttributes");
}

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

void place_step(const dcp::KvRows& rows, cudaStream_t stream) {
  const std::int64_t count = rows.batch * rows.queries;
  if (count == 0) {
    return;
  }
  detail::launch(detail::place_step_kernel, detail::blocks_for(count), detail::kThreads, stream,
                 rows);
}

}  // namespace cohort::cuda
