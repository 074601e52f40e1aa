// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cohort/host/partial_rows.hpp>
#include <limits>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using host::PartialRows;

TEST_CASE("a row is its splits' weighted sum, or empty where there are no tokens", "[host]") {
  std::vector<float> out{2, 4, 100, 100, 6, 8, 10, 12};  // [2, 2, 1, 2]
  std::vector<float> lses{3, -std::numeric_limits<float>::infinity(), 3, 1};
  std::vector<std::int32_t> tokens{5, 1};
  Partials partials{TensorView(out.data(), DType::f32, {2, 2, 1, 2}),
                    TensorView(lses.data(), DType::f32, {2, 2, 1}), LseBase::two};
  partials.local_tokens = TensorView(tokens.data(), DType::i32, {2});
  PartialRows rows(partials);
  float row[2] = {};
  CHECK(rows.read(0, 0, row) == 4.0F);  // log2(2^3 + 2^3)
  CHECK(row[0] == 4.0F);
  CHECK(row[1] == 6.0F);
  CHECK(rows.lse(0, 0) == 4.0F);
  CHECK(rows.read(1, 0, row) == 1.0F);  // the second split alone
  CHECK(row[0] == 10.0F);
  CHECK(row[1] == 12.0F);
  tokens[0] = 0;
  CHECK(rows.lse(0, 0) == dcp::kEmptyLse);
  CHECK(rows.read(0, 0, row) == dcp::kEmptyLse);
}

TEST_CASE("heads without a sink have an empty one", "[host]") {
  std::vector<float> sinks{1, 9, 2};
  Partials partials;
  CHECK(host::sink_of(partials, 1) == dcp::kEmptyLse);
  partials.sink = TensorView(sinks.data(), DType::f32, {2}, {2});
  CHECK(host::sink_of(partials, 1) == 2.0F);
}
