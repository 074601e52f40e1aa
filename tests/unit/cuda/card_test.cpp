// SPDX-License-Identifier: Apache-2.0
#include "cohort/cuda/card.hpp"

#include "support/catch.hpp"

using namespace cohort;
using cuda::keeps_lines_whole;
using cuda::launches_programmatically;
using test::contains;

TEST_CASE("programmatic launches need card, driver and code", "[card]") {
  CHECK(launches_programmatically({9, 0}, 12030, 90));
  CHECK(launches_programmatically({12, 0}, 13000, 100));
  CHECK_FALSE(launches_programmatically({8, 9}, 13000, 80));
  CHECK_FALSE(launches_programmatically({9, 0}, 12020, 90));
  // Code for 8.0 that the driver compiled for a Hopper does not wait for its predecessor.
  CHECK_FALSE(launches_programmatically({9, 0}, 13000, 80));
}

TEST_CASE("lines are trusted between the cards that NCCL trusts with its own", "[card]") {
  constexpr cuda::Capability kAlike[] = {{7, 0}, {7, 5},  {8, 0},  {8, 6}, {8, 9},
                                         {9, 0}, {10, 0}, {10, 3}, {12, 0}};
  for (const auto a : kAlike) {
    CAPTURE(a.code());
    CHECK(keeps_lines_whole(a, a));
    CHECK_FALSE(keeps_lines_whole({6, 0}, a));
    CHECK(keeps_lines_whole({9, 0}, a) == (a.code() >= 90));  // mixed from Hopper on
    CHECK(keeps_lines_whole(a, {8, 0}) == (a.code() == 80));
  }
  CHECK_FALSE(keeps_lines_whole({6, 1}, {6, 1}));
}

TEST_CASE("a card without code is named with what was built", "[card]") {
  CHECK_THAT(cuda::no_code_text("NVIDIA A10", {8, 6}, "900,1000"),
             contains("NVIDIA A10 (8.6)", "built for 900,1000", "CMAKE_CUDA_ARCHITECTURES=86"));
}
