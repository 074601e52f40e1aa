// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cohort/dcp/partials.hpp>
#include <cstdint>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;

TEST_CASE("whatever ranks have to agree on of a merge changes what they compare", "[dcp]") {
  std::vector<float> memory(64);
  const std::vector<std::int64_t> counts{1, 1};
  const std::vector<std::int64_t> others{2, 0};
  const auto floats = [&](const Dims& shape) {
    return TensorView(memory.data(), DType::f32, shape);
  };
  const MergeArguments good{
      .partials = {floats({1, 2, 2, 4}), floats({1, 2, 2})},
      .rows = {MergeResult::by_token, 2, 2, 2, counts},
  };
  const auto form = [&](const auto& change) {
    MergeArguments other = good;
    change(other);
    return dcp::merge_form(other);
  };
  const std::int64_t same = dcp::merge_form(good);
  // A rank's own affairs: where its tensors lie, whether it gives tokens, and most LSEs.
  CHECK(same == form([&](auto& x) {
          x.partials.out = TensorView(memory.data() + 4, DType::f32, {1, 2, 2, 4}, {0, 4, 8, 1});
        }));
  CHECK(same == form([&](auto& x) {
          x.partials.local_tokens = TensorView(memory.data(), DType::i32, {2});
        }));
  CHECK(same == form([&](auto& x) { x.lse = floats({1, 2}); }));

  std::vector<std::int64_t> forms{same};
  forms.push_back(form([&](auto& x) { x.partials.out = floats({2, 2, 2, 4}); }));
  forms.push_back(form([&](auto& x) { x.partials.out = floats({1, 2, 4, 2}); }));
  forms.push_back(form([&](auto& x) {
    x.partials.out = TensorView(memory.data(), DType::bf16, {1, 2, 2, 4});
  }));
  forms.push_back(form([](auto& x) { x.partials.base = LseBase::two; }));
  forms.push_back(form([&](auto& x) { x.partials.sink = floats({2}); }));
  forms.push_back(form([&](auto& x) { x.rows.counts = others; }));
  forms.push_back(form([](auto& x) { x.rows.counts = {}, x.rows.result = MergeResult::by_head; }));
  forms.push_back(
      form([](auto& x) { x.rows.counts = {}, x.rows.result = MergeResult::replicated; }));
  forms.push_back(form([&](auto& x) {
    x.rows.counts = {}, x.rows.result = MergeResult::replicated, x.lse = floats({2, 2});
  }));
  std::sort(forms.begin(), forms.end());
  CHECK(std::adjacent_find(forms.begin(), forms.end()) == forms.end());
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
