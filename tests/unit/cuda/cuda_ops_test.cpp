// SPDX-License-Identifier: Apache-2.0
#include "cohort/cuda/cuda_ops.hpp"

#include "cohort/cuda/cuda_peer_kernels.hpp"
#include "support/catch.hpp"

using namespace cohort;
using cohort::detail::along_dim;
using cohort::detail::join_dims;

namespace {

/// A view that is looked at and never followed.
ConstTensorView view(DType dtype, Dims shape) {
  static const double somewhere = 0;
  return {&somewhere, dtype, shape};
}

}  // namespace

TEST_CASE("dimensions without gaps between them are one", "[cuda_ops]") {
  const Dims shape{2, 3, 4};
  const auto plain = join_dims(shape, contiguous_strides(shape), contiguous_strides(shape));
  REQUIRE(plain.size == 1);
  CHECK(plain.shape[0] == 24);
  CHECK(plain.a[0] == 1);

  // The second view has a gap behind each row of 4: only the outer two join.
  const auto gapped = join_dims(shape, contiguous_strides(shape), {30, 10, 1});
  REQUIRE(gapped.size == 2);
  CHECK(gapped.shape[0] == 6);
  CHECK(gapped.a[0] == 4);
  CHECK(gapped.b[0] == 10);
  CHECK(gapped.shape[1] == 4);

  const auto ones = join_dims({1, 5, 1}, {99, 1, 77}, {3, 1, 2});
  REQUIRE(ones.size == 1);
  CHECK(ones.shape[0] == 5);
  CHECK(join_dims({1, 1}, {1, 1}, {1, 1}).size == 0);

  // A transposed view joins with nothing.
  CHECK(join_dims({2, 3}, {1, 2}, {3, 1}).size == 2);
}

TEST_CASE("a gather along a dimension is described by strides in bytes", "[cuda_ops]") {
  const auto dims = along_dim(view(DType::bf16, {5, 3, 4}), view(DType::bf16, {5, 6, 4}), 1);
  REQUIRE(dims.has_value());
  CHECK(dims->outer == 5);
  CHECK(dims->inner_bytes == 3 * 4 * 2);
  CHECK(dims->share_outer_stride == 24);
  CHECK(dims->full_outer_stride == 48);
  CHECK(dims->full_rank_stride == 24);

  const auto first = along_dim(view(DType::f32, {3, 4}), view(DType::f32, {6, 4}), 0);
  REQUIRE(first.has_value());
  CHECK(first->outer == 1);
  CHECK(first->inner_bytes == 48);
  CHECK(first->full_rank_stride == 48);
}

TEST_CASE("layouts that the kernels cannot walk are told", "[cuda_ops]") {
  const auto full = view(DType::f32, {4, 6, 8});
  const auto share = view(DType::f32, {4, 3, 8});
  CHECK(along_dim(share, full, 1).has_value());
  CHECK(along_dim(share.slice(0, 1, 2), full.slice(0, 1, 2), 1).has_value());
  // A share with gaps within a rank's run, and outer dimensions with two strides.
  CHECK_FALSE(along_dim(share.slice(2, 0, 4), full.slice(2, 0, 4), 1).has_value());
  const auto deep = view(DType::f32, {2, 4, 3, 8});
  const auto deep_full = view(DType::f32, {2, 4, 6, 8});
  CHECK(along_dim(deep, deep_full, 2).has_value());
  CHECK_FALSE(along_dim(deep.slice(1, 0, 2), deep_full.slice(1, 0, 2), 2).has_value());
}
