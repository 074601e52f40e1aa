// SPDX-License-Identifier: Apache-2.0
#include <cohort/cuda/path_sizes.hpp>

#include "support/catch.hpp"

using namespace cohort::cuda;

TEST_CASE("the sizes of two ranks are those that were measured to be faster", "[path_sizes]") {
  CHECK(path_sizes(2).share_total == 16 << 20);
  CHECK(path_sizes(2).all_reduce_total == 512 << 10);
  CHECK(path_sizes(2).one_step_sent >= path_sizes(2).all_reduce_total);  // two steps never pay
  CHECK(path_sizes(1).share_total == path_sizes(2).share_total);
}

TEST_CASE("more ranks take two steps earlier, and less from NCCL", "[path_sizes]") {
  for (int ranks = 3; ranks <= 8; ++ranks) {
    CAPTURE(ranks);
    const PathSizes sizes = path_sizes(ranks);
    const PathSizes fewer = path_sizes(ranks - 1);
    CHECK(sizes.one_step_sent <= fewer.one_step_sent);
    CHECK(sizes.share_total <= fewer.share_total);
    CHECK(sizes.all_reduce_total <= fewer.all_reduce_total);
    CHECK(sizes.one_step_sent / (ranks - 1) >= 32 << 10);  // of which a step is all latency
    CHECK(sizes.all_reduce_total >= 256 << 10);
  }
}

TEST_CASE("beyond eight ranks the own kernels take small payloads alone", "[path_sizes]") {
  for (const int ranks : {9, 16, 32}) {
    CAPTURE(ranks);
    CHECK(path_sizes(ranks).one_step_sent == 192 << 10);
    CHECK(path_sizes(ranks).share_total == 256 << 10);
    CHECK(path_sizes(ranks).all_reduce_total == 256 << 10);
  }
}
