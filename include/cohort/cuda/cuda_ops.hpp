// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "cohort/cuda/handles.hpp"
#include "cohort/cuda/kernels.hpp"
#include "cohort/cuda/shapes.hpp"
#include "cohort/cuda/support_kernels.hpp"
#include "cohort/error.hpp"
#include "cohort/tensor.hpp"
#include "cohort/transport.hpp"

/// \file
/// The arithmetic of `TensorOps` by the library's kernels, and the views of tensors that kernels
/// take.

namespace cohort {

namespace detail {

/// The indices of two views of one shape, with the dimensions joined that both views step through
/// without a gap, and extents of 1 gone.
struct JoinedDims {
  std::array<std::int64_t, kMaxDims + 1> shape{};
  std::array<std::int64_t, kMaxDims + 1> a{};
  std::array<std::int64_t, kMaxDims + 1> b{};
  std::size_t size = 0;

  /// Appends the next inner dimension.
  void push(std::int64_t extent, std::int64_t stride_a, std::int64_t stride_b) {
    if (extent == 1) {
      return;
    }
    if (size > 0 && a[size - 1] == stride_a * extent && b[size - 1] == stride_b * extent) {
      shape[size - 1] *= extent;
      a[size - 1] = stride_a;
      b[size - 1] = stride_b;
      return;
    }
    shape[size] = extent;
    a[size] = stride_a;
    b[size] = stride_b;
    ++size;
  }
};

[[nodiscard]] inline JoinedDims join_dims(const Dims& shape, const Dims& a, const Dims& b) {
  JoinedDims joined;
  for (int d = 0; d < shape.size(); ++d) {
    joined.push(shape[d], a[d], b[d]);
  }
  return joined;
}

/// Copies by joined dimensions, one launch for each index of those beyond what a kernel takes.
inline void copy_joined(const void* from, DType from_dtype, void* to, DType to_dtype,
                        const JoinedDims& dims, std::size_t first, cudaStream_t stream) {
  const std::size_t left = dims.size - first;
  static_assert(cuda::kMaxConvertDims == cuda::kMaxCopyDims);
  if (left > static_cast<std::size_t>(cuda::kMaxCopyDims)) {
    for (std::int64_t i = 0; i < dims.shape[first]; ++i) {
      const auto step = [&](std::int64_t stride, DType dtype) {
        return i * stride * static_cast<std::int64_t>(size_of(dtype));
      };
      copy_joined(static_cast<const std::byte*>(from) + step(dims.a[first], from_dtype), from_dtype,
                  static_cast<std::byte*>(to) + step(dims.b[first], to_dtype), to_dtype, dims,
                  first + 1, stream);
    }
    return;
  }
  const std::span shape(dims.shape.data() + first, left);
  const std::span a(dims.a.data() + first, left);
  const std::span b(dims.b.data() + first, left);
  if (from_dtype == to_dtype) {
    cuda::strided_copy(from, a, to, b, shape, from_dtype, stream);
  } else if (from_dtype == DType::f32) {
    cuda::convert_copy(from, a, to, b, shape, to_dtype, stream);
  } else {
    throw UsageError(
        fmt::format("copy: cannot convert {} to {}", to_string(from_dtype), to_string(to_dtype)));
  }
}

/// Copies between two lists of dimensions, in stream order.
inline void copy_joined(const void* from, DType from_dtype, void* to, DType to_dtype,
                        JoinedDims dims, cudaStream_t stream) {
  for (std::size_t d = 0; d < dims.size; ++d) {
    if (dims.shape[d] == 0) {
      return;
    }
  }
  if (dims.size == 0) {  // a single element
    dims.shape[0] = dims.a[0] = dims.b[0] = 1;
    dims.size = 1;
  }
  const bool plain = dims.size == 1 && dims.a[0] == 1 && dims.b[0] == 1 && from_dtype == to_dtype;
  if (plain) {
    if (from != to) {
      cuda_check(
          cudaMemcpyAsync(to, from, static_cast<std::size_t>(dims.shape[0]) * size_of(from_dtype),
                          cudaMemcpyDeviceToDevice, stream),
          "cudaMemcpyAsync");
    }
    return;
  }
  copy_joined(from, from_dtype, to, to_dtype, dims, 0, stream);
}

/// Copies elements between views of one shape.
inline void copy_view(const ConstTensorView& from, const TensorView& to, cudaStream_t stream) {
  copy_joined(from.data(), from.dtype(), to.data(), to.dtype(),
              join_dims(from.shape(), from.strides(), to.strides()), stream);
}

/// Of partials with the dimension of the splits.
[[nodiscard]] inline cuda::Partial partial_of(const Partials& partials) {
  const Dims& out = partials.out.strides();
  const Dims& lse = partials.lse.strides();
  cuda::Partial partial{.out = partials.out.data(),
                        .out_batch_stride = out[1],
                        .out_head_stride = out[2],
                        .lse = static_cast<const float*>(partials.lse.data()),
                        .lse_batch_stride = lse[1],
                        .lse_head_stride = lse[2],
                        .out_split_stride = out[0],
                        .lse_split_stride = lse[0]};
  if (partials.sink) {
    partial.sink = static_cast<const float*>(partials.sink->data());
    partial.sink_stride = partials.sink->strides()[0];
  }
  if (partials.local_tokens) {
    partial.local_tokens = static_cast<const std::int32_t*>(partials.local_tokens->data());
    partial.local_tokens_stride = partials.local_tokens->strides()[0];
  }
  return partial;
}

[[nodiscard]] inline cuda::Merged merged_of(const MergeArguments& arguments) {
  cuda::Merged merged{.out = arguments.merged.data(),
                      .out_batch_stride = arguments.merged.strides()[0],
                      .out_head_stride = arguments.merged.strides()[1]};
  if (arguments.lse) {
    merged.lse = static_cast<float*>(arguments.lse->data());
    merged.lse_batch_stride = arguments.lse->strides()[0];
    merged.lse_head_stride = arguments.lse->strides()[1];
  }
  return merged;
}

/// Of partials [S, B, H, D] that are merged into those rows.
[[nodiscard]] inline cuda::MergeShape merge_shape_of(const ConstTensorView& out,
                                                     const dcp::MergeRows& rows) {
  const Dims& shape = out.shape();
  return {.batch = shape[1],
          .heads = shape[2],
          .dim = shape[3],
          .dtype = out.dtype(),
          .splits = shape[0],
          .result = rows.result,
          .whole = rows.whole,
          .counts = rows.counts};
}
[[nodiscard]] inline cuda::MergeShape merge_shape_of(const MergeArguments& arguments) {
  cuda::MergeShape shape = merge_shape_of(arguments.partials.out, arguments.rows);
  shape.base = arguments.partials.base;
  shape.sink = arguments.partials.sink.has_value();
  shape.gathers_lse = shape.result == MergeResult::replicated && arguments.lse.has_value();
  return shape;
}

[[nodiscard]] inline cuda::Query query_of(const ConstTensorView& q_nope,
                                          const ConstTensorView& q_pe) {
  return {.nope = q_nope.data(),
          .nope_batch_stride = q_nope.strides()[0],
          .nope_head_stride = q_nope.strides()[1],
          .pe = q_pe.data(),
          .pe_batch_stride = q_pe.strides()[0],
          .pe_head_stride = q_pe.strides()[1],
          .batch = q_nope.size(0),
          .heads = q_nope.size(1),
          .nope_dim = q_nope.size(2),
          .pe_dim = q_pe.size(2),
          .dtype = q_nope.dtype()};
}

/// Of rows [B, hidden] that are normed into that type.
[[nodiscard]] inline cuda::NormShape norm_shape_of(const ConstTensorView& x, DType out) {
  return {.rows = x.shape()[0], .hidden = x.shape()[1], .dtype = x.dtype(), .out_dtype = out};
}

/// A checked norm.
[[nodiscard]] inline cuda::Norm norm_of(const NormArguments& arguments) {
  const ResidualNorm& norm = arguments.norm;
  return {.shape = norm_shape_of(arguments.x, arguments.out.dtype()),
          .x = arguments.x.data(),
          .residual = norm.residual.data(),
          .weight = norm.weight.data(),
          .out = arguments.out.data(),
          .scale = norm.scale ? static_cast<const float*>(norm.scale->data()) : nullptr,
          .epsilon = norm.epsilon};
}

[[nodiscard]] inline cudaStream_t native(StreamRef stream) noexcept {
  return static_cast<cudaStream_t>(stream.native());
}

}  // namespace detail

/// `TensorOps` on one device.
class CudaOps final : public TensorOps {
 public:
  explicit CudaOps(int device) : device_(device) {}

  [[nodiscard]] std::string merge_obstacle(const ConstTensorView& out,
                                           const dcp::MergeRows& rows) const override {
    return cuda::merge_obstacle(detail::merge_shape_of(out, rows), rows.ranks);
  }
  [[nodiscard]] std::string query_obstacle(const ConstTensorView& q_nope,
                                           const ConstTensorView& q_pe) const override {
    return cuda::query_obstacle(detail::query_of(q_nope, q_pe));
  }

  [[nodiscard]] std::string norm_obstacle(const ConstTensorView& x, DType out) const override {
    return cuda::norm_obstacle(detail::norm_shape_of(x, out));
  }

  void copy(const ConstTensorView& from, const TensorView& to, StreamRef stream) override {
    const DeviceGuard guard(device_);
    detail::copy_view(from, to, detail::native(stream));
  }

  void place_step(const dcp::KvRows& rows, StreamRef stream) override {
    const DeviceGuard guard(device_);
    cuda::place_step(rows, detail::native(stream));
  }

  void pack_query(const ConstTensorView& q_nope, const ConstTensorView& q_pe,
                  const TensorView& packed, StreamRef stream) override {
    if (packed.numel() == 0) {
      return;
    }
    const DeviceGuard guard(device_);
    cuda::pack_query(detail::query_of(q_nope, q_pe), packed.data(), packed.strides()[0],
                     packed.strides()[1], detail::native(stream));
  }

  void local_lse(const Partials& partials, const TensorView& lse, StreamRef stream) override {
    const DeviceGuard guard(device_);
    const cuda::Partial partial = detail::partial_of(partials);
    cuda::merge_lse({.lses = partial.lse,
                     .rank_stride = partial.lse_split_stride,
                     .batch_stride = partial.lse_batch_stride,
                     .head_stride = partial.lse_head_stride,
                     .merged = static_cast<float*>(lse.data()),
                     .merged_batch_stride = lse.strides()[0],
                     .merged_head_stride = lse.strides()[1],
                     .ranks = static_cast<int>(partials.splits()),
                     .batch = lse.size(0),
                     .heads = lse.size(1),
                     .base = partials.base,
                     .local_tokens = partial.local_tokens,
                     .local_tokens_stride = partial.local_tokens_stride},
                    detail::native(stream));
  }

  void correct_partial(const Partials& partials, const ConstTensorView& lses, int rank,
                       const TensorView& corrected, StreamRef stream) override {
    if (partials.out.numel() == 0) {
      return;
    }
    const DeviceGuard guard(device_);
    const int ranks = static_cast<int>(lses.size(0));
    // Whole rows whoever merges them, so the heads need not be divided.
    cuda::MergeShape shape = detail::merge_shape_of(
        partials.out, {.result = MergeResult::replicated, .ranks = 1, .whole = true});
    shape.base = partials.base;
    cuda::correct_partial(shape, ranks, rank, detail::partial_of(partials),
                          static_cast<const float*>(lses.data()), corrected.data(),
                          corrected.strides()[0], corrected.strides()[1], corrected.dtype(),
                          detail::native(stream));
  }

  void merge_lse(const ConstTensorView& lses, const MergeArguments& arguments, int rank,
                 StreamRef stream) override {
    const DeviceGuard guard(device_);
    const auto block = arguments.rows.of(rank);
    const ConstTensorView mine =
        lses.slice(1, block.first_token, block.tokens).slice(2, block.first_head, block.heads);
    const cuda::Merged merged = detail::merged_of(arguments);
    const cuda::Partial partial = detail::partial_of(arguments.partials);
    cuda::merge_lse(
        {.lses = static_cast<const float*>(mine.data()),
         .rank_stride = mine.strides()[0],
         .batch_stride = mine.strides()[1],
         .head_stride = mine.strides()[2],
         .merged = merged.lse,
         .merged_batch_stride = merged.lse_batch_stride,
         .merged_head_stride = merged.lse_head_stride,
         .ranks = static_cast<int>(mine.size(0)),
         .batch = block.tokens,
         .heads = block.heads,
         .base = arguments.partials.base,
         .sink = partial.sink == nullptr ? nullptr
                                         : partial.sink + block.first_head * partial.sink_stride,
         .sink_stride = partial.sink_stride},
        detail::native(stream));
  }

  void rms_norm(const NormArguments& arguments, StreamRef stream) override {
    const DeviceGuard guard(device_);
    cuda::rms_norm(detail::norm_of(arguments), detail::native(stream));
  }

  void pack_partial(const MergeArguments& arguments, const TensorView& pieces,
                    StreamRef stream) override {
    if (arguments.partials.out.numel() == 0) {
      return;
    }
    const DeviceGuard guard(device_);
    const int ranks = arguments.rows.ranks;
    const cuda::MergeShape shape = detail::merge_shape_of(arguments);
    check_pieces(pieces, shape, ranks);
    cuda::pack_partial(shape, ranks, detail::partial_of(arguments.partials), pieces.data(),
                       detail::native(stream));
  }

  void merge_pieces(const ConstTensorView& pieces, const MergeArguments& arguments, int rank,
                    StreamRef stream) override {
    if (arguments.merged.numel() == 0) {
      return;
    }
    const DeviceGuard guard(device_);
    const int ranks = arguments.rows.ranks;
    const cuda::MergeShape shape = detail::merge_shape_of(arguments);
    check_pieces(pieces, shape, ranks);
    cuda::merge_pieces(shape, ranks, rank, pieces.data(), detail::partial_of(arguments.partials),
                       detail::merged_of(arguments), detail::native(stream));
  }

 private:
  /// A buffer of another layout would be overrun.
  static void check_pieces(const ConstTensorView& pieces, const cuda::MergeShape& shape,
                           int ranks) {
    const auto expected = static_cast<std::int64_t>(cuda::packed_piece_bytes(shape, ranks));
    if (pieces.size(1) != expected || !pieces.is_contiguous()) {
      throw UsageError(fmt::format("pieces: expected {} pieces of {} bytes without gaps, got {}",
                                   ranks, expected, to_string(pieces)));
    }
  }

  int device_;
};

}  // namespace cohort
