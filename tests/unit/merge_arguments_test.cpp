// SPDX-License-Identifier: Apache-2.0
#include "cohort/merge_arguments.hpp"

#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using test::says;

// The checks themselves run in every merge: support/partials_checks.hpp.

TEST_CASE("what a rank gets follows from the result", "[dcp]") {
  const Dims partials{2, 5, 6, 8};  // [S, B, H, D]
  const std::vector<std::int64_t> counts{4, 0, 1};
  const auto shape = [&](MergeResult result, int rank, std::span<const std::int64_t> given = {}) {
    const Caller caller{"dcp[0]", rank, 3};
    return detail::merged_shape(detail::checked_rows(caller, partials, result, given), rank,
                                partials);
  };
  CHECK(shape(MergeResult::by_head, 1) == Dims{5, 2, 8});
  CHECK(shape(MergeResult::by_token, 0, counts) == Dims{4, 6, 8});
  CHECK(shape(MergeResult::by_token, 1, counts) == Dims{0, 6, 8});
  CHECK(shape(MergeResult::replicated, 2) == Dims{5, 6, 8});
  CHECK_THROWS_MATCHES(shape(MergeResult::by_head, 1, counts), UsageError, says("by_head"));
  CHECK_THROWS_MATCHES(shape(MergeResult::by_token, 1, std::span(counts).first(2)), UsageError,
                       says("3 sizes"));
}

TEST_CASE("numbers that are no base and no result are refused", "[dcp]") {
  const Caller caller{"dcp[0]", 0, 2};
  const std::vector<float> memory(16);
  Partials partials{.out = {memory.data(), DType::f32, {1, 1, 2, 4}},
                    .lse = {memory.data(), DType::f32, {1, 1, 2}}};
  const auto check_with = [&](MergeResult result) {
    detail::check_partials(caller, partials.out.device(), partials, result);
  };
  CHECK_NOTHROW(check_with(MergeResult::replicated));
  CHECK_THROWS_MATCHES(check_with(static_cast<MergeResult>(9)), UsageError,
                       says("result: expected by_head, by_token or replicated, got number 9"));
  partials.base = static_cast<LseBase>(9);
  CHECK_THROWS_MATCHES(check_with(MergeResult::by_head), UsageError,
                       says("base: expected e or two, got number 9"));
}
