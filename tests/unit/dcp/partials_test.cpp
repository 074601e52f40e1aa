// SPDX-License-Identifier: Apache-2.0
#include <cohort/dcp/partials.hpp>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;

TEST_CASE("one split gets the dimension of the splits, with its strides", "[dcp]") {
  std::vector<float> memory(64);
  const TensorView out(memory.data(), DType::f32, {2, 3, 4}, {4, 8, 1});
  const TensorView split = dcp::as_one_split(out);
  CHECK(split.shape() == Dims{1, 2, 3, 4});
  CHECK(split.strides() == Dims{0, 4, 8, 1});
  CHECK(split.data() == out.data());
  const TensorView lse = dcp::as_one_split(TensorView(memory.data(), DType::f32, {2, 3}));
  CHECK(lse.shape() == Dims{1, 2, 3});
  CHECK(lse.strides() == Dims{0, 3, 1});
}

TEST_CASE("partials are plain where rows can be taken as they are", "[dcp]") {
  std::vector<float> memory(64);
  Partials partials{TensorView(memory.data(), DType::f32, {2, 3, 4}),
                    TensorView(memory.data(), DType::f32, {2, 3})};
  CHECK(partials.splits() == 1);
  CHECK(partials.is_plain());
  partials.sink = TensorView(memory.data(), DType::f32, {3});
  CHECK(partials.is_plain());
  partials.local_tokens = TensorView(memory.data(), DType::i32, {2});
  CHECK_FALSE(partials.is_plain());
  partials.local_tokens.reset();
  partials.out = TensorView(memory.data(), DType::f32, {2, 2, 3, 4});
  CHECK(partials.splits() == 2);
  CHECK_FALSE(partials.is_plain());
}
