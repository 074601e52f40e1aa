// SPDX-License-Identifier: Apache-2.0
#include "../bench/cohort_bench/exact.hpp"

#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cohort/dcp/lse_merge.hpp"
#include "support/catch.hpp"

using namespace cohort::bench;
using cohort::DType;

TEST_CASE("sums over the ranks are whole numbers that bf16 holds") {
  for (const int ranks : {1, 2, 3, 4, 8, 16, 64}) {
    for (std::int64_t i = 0; i < 300; ++i) {
      std::int64_t sum = 0;
      for (int r = 0; r < ranks; ++r) {
        sum += input_value(r, i, ranks);
      }
      REQUIRE(summed_value(i, ranks) == sum);
      REQUIRE(sum < 256);
      REQUIRE(cohort::bf16_to_float(cohort::float_to_bf16(static_cast<float>(sum))) ==
              static_cast<float>(sum));
    }
  }
}

TEST_CASE("the merged value is what the library's arithmetic gives, to the bit") {
  for (const int ranks : {1, 2, 3, 4, 5, 8}) {
    for (std::int64_t row = 0; row < 20; ++row) {
      std::vector<float> scales;
      for (int r = 0; r < ranks; ++r) {
        scales.push_back(partial_lse(r, row, ranks));
      }
      cohort::dcp::merge_weights(scales.data(), ranks, cohort::LseBase::two, scales.data(),
                                 nullptr);
      for (std::int64_t i = row * 32; i < row * 32 + 32; ++i) {
        float sum = 0;
        for (int r = 0; r < ranks; ++r) {
          const auto value = static_cast<float>(partial_value(r, i, ranks));
          REQUIRE(cohort::bf16_to_float(cohort::float_to_bf16(value)) == value);
          const float term = scales[static_cast<std::size_t>(r)] * value;
          REQUIRE(term == std::floor(term));  // the staged plan rounds it to the partial's type
          sum += term;
        }
        REQUIRE(sum == static_cast<float>(merged_value(i, row, ranks)));
        REQUIRE(sum < 256);
      }
    }
  }
}

TEST_CASE("ranks differ, so that a result of the wrong rank is seen") {
  int different = 0;
  for (std::int64_t i = 0; i < 64; ++i) {
    different += input_value(0, i, 2) != input_value(1, i, 2) ? 1 : 0;
    CHECK(partial_value(0, i, 2) != partial_value(1, i, 2));
  }
  CHECK(different == 64);
}

TEST_CASE("wrong elements are counted in every type, NaN among them") {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    const auto value = [](std::int64_t i) { return i % 7; };
    auto bytes = encode(dtype, 100, value);
    CHECK(bytes.size() == 100 * cohort::size_of(dtype));
    CHECK(count_wrong(dtype, bytes, value) == 0);
    for (std::size_t i = 0; i < 3 * cohort::size_of(dtype); ++i) {
      bytes[i] = std::byte{0xff};
    }
    CHECK(count_wrong(dtype, bytes, value) == 3);
    CHECK(count_wrong(dtype, bytes, [](std::int64_t) { return 9; }) == 100);
  }
}
