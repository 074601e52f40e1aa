// SPDX-License-Identifier: Apache-2.0
#include <cohort/cuda/path_sizes.hpp>

#include "support/catch.hpp"

using namespace cohort::cuda;

TEST_CASE("the sizes of two ranks are those that were measured to be faster", "[path_sizes]") {
  CHECK(path_sizes(2).share_total == 16 << 20);
  CHECK(path_sizes(2).all_reduce_total == 8 << 20);
  CHECK(path_sizes(2).one_step_sent >= path_sizes(2).all_reduce_total);  // two steps never pay
  CHECK(path_sizes(1).share_total == path_sizes(2).share_total);
}

TEST_CASE("more ranks take two steps earlier, and less from NCCL", "[path_sizes]") {
  for (int ranks = 3; ranks <= 8; ++ranks) {
    CAPTURE(ranks);
    const PathSizes sizes = path_sizes(ranks);
    const PathSizes fewer = path_sizes(ranks - 1);
    CHECK(sizes.one_step_sent <= fewer.one_step_sent);
    CHECK(sizes.one_step_sent_in_lines <= fewer.one_step_sent_in_lines);
    CHECK(sizes.one_step_sent_in_lines > sizes.one_step_sent);  // half the bytes on the way
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

TEST_CASE("an all-reduce takes words for little, lines in one step, then in two", "[path_sizes]") {
  constexpr std::int64_t kRoom = 64 << 20;
  using Plan = AllReducePlan;
  const auto plan = [](int ranks, std::int64_t bytes) {
    return all_reduce_plan(ranks, bytes, kRoom, kRoom);
  };
  CHECK(plan(2, 0) == Plan{true, false, false});
  CHECK(plan(2, 96 << 10) == Plan{true, false, false});
  CHECK(plan(2, (96 << 10) + 1) == Plan{true, true, false});
  CHECK(plan(2, 16 << 20) == Plan{true, true, false});  // two steps never pay
  CHECK(plan(4, 32 << 10) == Plan{true, false, false});
  CHECK(plan(4, 33 << 10) == Plan{true, true, false});
  const std::int64_t most = path_sizes(4).one_step_sent_in_lines / 3;
  CHECK(plan(4, most) == Plan{true, true, false});
  CHECK(plan(4, most + 8) == Plan{true, true, true});
  CHECK(plan(16, 5) == Plan{true, false, false});  // less than a word for each
}

TEST_CASE("an all-reduce takes what an inbox has room for", "[path_sizes]") {
  using Plan = AllReducePlan;
  CHECK(all_reduce_plan(2, 64 << 10, 0, 64 << 10) == Plan{true, true, false});
  CHECK(all_reduce_plan(2, 1 << 20, 1 << 20, 0) == Plan{true, false, false});
  CHECK_FALSE(all_reduce_plan(2, (1 << 20) + 1, 1 << 20, 1 << 20).fits);
  CHECK(all_reduce_plan(4, 1 << 20, 512 << 10, 0) == Plan{true, false, true});
  CHECK_FALSE(all_reduce_plan(4, (1 << 20) + 1, 512 << 10, 0).fits);
  // A share's lines begin with a group of their own.
  CHECK(all_reduce_plan(4, 4 * 480, 0, 960) == Plan{true, true, true});
  CHECK_FALSE(all_reduce_plan(4, 4 * 480 + 1, 0, 960).fits);
  CHECK(all_reduce_plan(4, 4 * 488, 0, 960 + 488) == Plan{true, true, true});
}

TEST_CASE("a slot has room for an all-reduce's faster plan", "[path_sizes]") {
  for (const int ranks : {2, 3, 4, 7, 8, 16}) {
    for (const std::int64_t bytes : {0, 8, 4096, 100'000, 999'999, 1 << 20, 8 << 20}) {
      CAPTURE(ranks, bytes);
      const std::int64_t lane = all_reduce_slot_bytes(ranks, bytes) / ranks;
      CHECK(all_reduce_plan(ranks, bytes, 0, lane) ==
            all_reduce_plan(ranks, bytes, 0, std::int64_t{1} << 40));
    }
  }
}
