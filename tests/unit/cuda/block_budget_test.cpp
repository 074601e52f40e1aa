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

TEST_CASE("of kernels at once any finds room for a cluster, or none takes clusters",
          "[block_budget]") {
  constexpr ClusterRoom kRoom{.of_2 = 66, .of_4 = 32, .of_8 = 16};
  CHECK(cluster_budget(kRoom, {}) == ClusterRoom{65, 31, 15});
  CHECK(cluster_budget(kRoom, {.kernels_at_once = 1}) == kRoom);
  CHECK(cluster_budget(kRoom, {.ranks_per_card = 2}) == ClusterRoom{21, 10, 5});
  CHECK(cluster_budget({}, {}) == ClusterRoom{});
  // One cluster is none too many for two ranks on a card: each would keep the other out.
  CHECK(cluster_budget({.of_2 = 3, .of_4 = 2, .of_8 = 1},
                       {.ranks_per_card = 2, .kernels_at_once = 1}) == ClusterRoom{2, 1, 0});
  for (const int ranks : {1, 2, 4, 8}) {
    for (const int kernels : {1, 2, 3, 4}) {
      for (int room = 0; room < 70; ++room) {
        CAPTURE(ranks, kernels, room);
        const int most =
            cluster_budget({.of_2 = room}, {.ranks_per_card = ranks, .kernels_at_once = kernels})
                .of_2;
        CHECK(most >= 0);
        CHECK((most == 0 || most * (ranks * kernels - 1) < room));
      }
    }
  }
  CHECK(least({1, 5, 3}, {2, 4, 3}) == ClusterRoom{1, 4, 3});
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
