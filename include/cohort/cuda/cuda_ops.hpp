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

[[nodiscard]] inline cuda::Partial partial_of(const ConstTensorView& out,
                                              const ConstTensorView& lse) {
  return {.out = out.data(),
          .out_batch_stride = out.strides()[0],
          .out_head_stride = out.strides()[1],
          .lse = static_cast<const float*>(lse.data()),
          .lse_batch_stride = lse.strides()[0],
          .lse_head_stride = lse.strides()[1]};
}

[[nodiscard]] inline cuda::Merged merged_of(const TensorView& out, const TensorView* lse) {
  cuda::Merged merged{
      .out = out.data(), .out_batch_stride = out.strides()[0], .out_head_stride = out.strides()[1]};
  if (lse != nullptr) {
    merged.lse = static_cast<float*>(lse->data());
    merged.lse_batch_stride = lse->strides()[0];
    merged.lse_head_stride = lse->strides()[1];
  }
  return merged;
}

/// Of a view [B, H, D] that holds all heads.
[[nodiscard]] inline cuda::MergeShape merge_shape_of(const ConstTensorView& out, LseBase base) {
  return {.batch = out.size(0),
          .heads = out.size(1),
          .dim = out.size(2),
          .dtype = out.dtype(),
          .base = base};
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

[[nodiscard]] inline cudaStream_t native(StreamRef stream) noexcept {
  return static_cast<cudaStream_t>(stream.native());
}

}  // namespace detail

/// `TensorOps` on one device.
class CudaOps final : public TensorOps {
 public:
  explicit CudaOps(int device) : device_(device) {}

  [[nodiscard]] std::string merge_obstacle(const ConstTensorView& out, int ranks) const override {
    return cuda::merge_obstacle(detail::merge_shape_of(out, LseBase::e), ranks);
  }
  [[nodiscard]] std::string query_obstacle(const ConstTensorView& q_nope,
                                           const ConstTensorView& q_pe) const override {
    return cuda::query_obstacle(detail::query_of(q_nope, q_pe));
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

  void correct_partial(const ConstTensorView& out, const ConstTensorView& lses, int rank,
                       LseBase base, const TensorView& corrected, StreamRef stream) override {
    if (out.numel() == 0) {
      return;
    }
    const DeviceGuard guard(device_);
    // The kernel takes this rank's LSEs from `lses`, so the partial's own are not needed.
    const cuda::Partial partial{.out = out.data(),
                                .out_batch_stride = out.strides()[0],
                                .out_head_stride = out.strides()[1]};
    cuda::correct_partial(detail::merge_shape_of(out, base), static_cast<int>(lses.size(0)), rank,
                          partial, static_cast<const float*>(lses.data()), corrected.data(),
                          corrected.strides()[0], corrected.strides()[1], corrected.dtype(),
                          nullptr, detail::native(stream));
  }

  void merge_lse(const ConstTensorView& lses, LseBase base, const TensorView& merged_lse,
                 StreamRef stream) override {
    const DeviceGuard guard(device_);
    cuda::merge_lse({.lses = static_cast<const float*>(lses.data()),
                     .rank_stride = lses.strides()[0],
                     .batch_stride = lses.strides()[1],
                     .head_stride = lses.strides()[2],
                     .merged = static_cast<float*>(merged_lse.data()),
                     .merged_batch_stride = merged_lse.strides()[0],
                     .merged_head_stride = merged_lse.strides()[1],
                     .ranks = static_cast<int>(lses.size(0)),
                     .batch = merged_lse.size(0),
                     .heads = merged_lse.size(1),
                     .base = base},
                    detail::native(stream));
  }

  void pack_partial(const ConstTensorView& out, const ConstTensorView& lse,
                    const TensorView& pieces, StreamRef stream) override {
    if (out.numel() == 0) {
      return;
    }
    const DeviceGuard guard(device_);
    const int ranks = static_cast<int>(pieces.size(0));
    const auto shape = detail::merge_shape_of(out, LseBase::e);
    check_pieces(pieces, shape, ranks);
    cuda::pack_partial(shape, ranks, detail::partial_of(out, lse), pieces.data(),
                       detail::native(stream));
  }

  void merge_pieces(const ConstTensorView& pieces, LseBase base, const TensorView& merged,
                    const TensorView* merged_lse, StreamRef stream) override {
    if (merged.numel() == 0) {
      return;
    }
    const DeviceGuard guard(device_);
    const int ranks = static_cast<int>(pieces.size(0));
    const cuda::MergeShape shape{.batch = merged.size(0),
                                 .heads = merged.size(1) * ranks,
                                 .dim = merged.size(2),
                                 .dtype = merged.dtype(),
                                 .base = base};
    check_pieces(pieces, shape, ranks);
    cuda::merge_pieces(shape, ranks, pieces.data(), detail::merged_of(merged, merged_lse),
                       detail::native(stream));
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
