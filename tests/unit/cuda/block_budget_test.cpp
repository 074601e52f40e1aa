// SPDX-License-Identifier: Apache-2.0
#include <cohort/cuda/block_budget.hpp>

#include "support/catch.hpp"

using namespace cohort::cuda;

TEST_CASE("kernels that may be under way at once leave room for one more", "[block_budget]") {
  CHECK(block_budget({.multiprocessors = 132}) == 128);
  CHECK(block_budget({.multiprocessors = 132, .kernels_at_once = 1}) == 132);
  CHECK(block_budget({.multiprocessors = 132, .kernels_at_once = 3}) == 64);
  CHECK(block_budget({.multiprocessors = 132, .ranks_per_card = 2, .kernels_at_once = 1}) == 66);
  CHECK(block_budget({.multiprocessors = 132, .ranks_per_card = 2}) == 42);
  for (const int ranks : {1, 2, 4, 8}) {
    for (const int kernels : {1, 2, 3, 4}) {
      CAPTURE(ranks, kernels);
      const int blocks = block_budget(
          {.multiprocessors = 132, .ranks_per_card = ranks, .kernels_at_once = kernels});
      CHECK(blocks >= 1);
      CHECK(blocks * (ranks * kernels - 1) < 132);
    }
  }
}

TEST_CASE("a budget is at least a block and at most what an inbox knows", "[block_budget]") {
  CHECK(block_budget({.multiprocessors = 4}) == 1);
  CHECK(block_budget({.multiprocessors = 4, .ranks_per_card = 16, .kernels_at_once = 16}) == 1);
  CHECK(block_budget({.multiprocessors = 2000}) == kMaxPeerBlocks);
}

TEST_CASE("a call's limit lies within the budget", "[block_budget]") {
  CHECK(limited_blocks(124, 0) == 124);
  CHECK(limited_blocks(124, 16) == 16);
  CHECK(limited_blocks(124, 200) == 124);
}

TEST_CASE("more lanes than kernels at once are warned of, with what to set", "[block_budget]") {
  CHECK(lanes_warning(1, 2).empty());
  CHECK(lanes_warning(2, 2).empty());
  CHECK_THAT(lanes_warning(3, 2), cohort::test::contains("3 lanes", "kernels_at_once = 2"));
}
