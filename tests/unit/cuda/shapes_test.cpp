// SPDX-License-Identifier: Apache-2.0
#include "cohort/cuda/shapes.hpp"

#include <span>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using cuda::merge_obstacle;
using cuda::MergeShape;
using cuda::Query;
using cuda::query_obstacle;
using test::contains;

TEST_CASE("merges: D in vectors, heads that ranks divide, less than 2 GiB", "[shapes]") {
  for (const std::int64_t dim : {8, 64, 128, 192, 512, 1024}) {
    CAPTURE(dim);
    CHECK(merge_obstacle({.batch = 3, .heads = 4, .dim = dim}, 2).empty());
  }
  for (const std::int64_t dim : {1, 4, 12, 100, 1032}) {
    CAPTURE(dim);
    CHECK_THAT(merge_obstacle({.batch = 3, .heads = 4, .dim = dim}, 2),
               contains("D: expected a multiple of 8", std::to_string(dim)));
  }
  CHECK_THAT(merge_obstacle({.batch = 1, .heads = 3, .dim = 8}, 2), contains("heads", "2 ranks"));
  CHECK_THAT(merge_obstacle({.batch = 1, .heads = 33, .dim = 8}, 33), contains("1 to 32 ranks"));
  CHECK_THAT(merge_obstacle({.batch = 1, .heads = 2, .dim = 8, .dtype = DType::f64}, 2),
             contains("f64"));
  // 16,384 x 128 x 512 bf16 is 2 GiB to the byte.
  CHECK_THAT(
      merge_obstacle({.batch = 16384, .heads = 128, .dim = 512}, 2),
      contains("less than 2147483648 bytes", "[16384, 128, 512] of bf16", "2147483648 bytes"));
  CHECK(merge_obstacle({.batch = 16383, .heads = 128, .dim = 512}, 2).empty());
  CHECK_FALSE(
      merge_obstacle({.batch = 16383, .heads = 128, .dim = 512, .dtype = DType::f32}, 2).empty());
  CHECK(merge_obstacle({.batch = 0, .heads = 4, .dim = 7}, 2).empty());
  CHECK_THAT(merge_obstacle({.batch = 1, .heads = 2, .dim = 8, .splits = 257}, 2),
             contains("S: expected 1 to 256"));
  // By token the ranks need not divide the heads; where one of many has most, pieces are many.
  std::vector<std::int64_t> counts(32, 0);
  counts[3] = 16000;
  const MergeShape by_token{
      .batch = 16000, .heads = 127, .dim = 512, .result = MergeResult::by_token, .counts = counts};
  CHECK_THAT(merge_obstacle(by_token, 32), contains("pieces of 32 ranks"));
  CHECK(merge_obstacle({.batch = 3,
                        .heads = 127,
                        .dim = 512,
                        .result = MergeResult::by_token,
                        .counts = std::span(counts).subspan(4, 2)},
                       2)
            .empty());
}

TEST_CASE("queries: parts of 16 bytes, less than 2 GiB on a rank", "[shapes]") {
  const auto query = [](std::int64_t nope, std::int64_t pe, DType dtype) {
    return query_obstacle({.batch = 2, .heads = 4, .nope_dim = nope, .pe_dim = pe, .dtype = dtype});
  };
  CHECK(query(512, 64, DType::bf16).empty());
  CHECK(query(8, 0, DType::bf16).empty());
  CHECK(query(16, 16, DType::f8_e4m3).empty());
  CHECK_THAT(query(16, 8, DType::f8_e4m3), contains("16 bytes", "16 and 8 of f8_e4m3"));
  CHECK_THAT(query(12, 8, DType::bf16), contains("12 and 8"));
  CHECK_THAT(query(0, 64, DType::bf16), contains("Dn at least"));
  CHECK_THAT(query_obstacle({.batch = 1 << 15, .heads = 64, .nope_dim = 512, .dtype = DType::bf16}),
             contains("less than 2147483648 bytes on a rank"));
  CHECK(query_obstacle({.batch = 0, .heads = 64, .nope_dim = 3}).empty());
}
