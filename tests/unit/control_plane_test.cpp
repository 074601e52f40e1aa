// SPDX-License-Identifier: Apache-2.0
#include <chrono>
#include <cohort/control_plane.hpp>
#include <cohort/thread_control_planes.hpp>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "support/catch.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::test;
using namespace std::chrono_literals;

TEST_CASE("split groups by color, ordered by key, then rank") {
  const int n = GENERATE(1, 2, 3, 4, 8);
  run_ranks(n, [&](ControlPlane& plane) {
    const int rank = plane.rank();
    const auto half = plane.split(rank % 2, -rank, fmt::format("parity[{}]", rank % 2));
    const int members = (n + 1 - rank % 2) / 2;
    check_equal(half->size(), members, "members of a color");
    check_equal(half->rank(), members - 1 - rank / 2, "keys order the ranks backwards");
    check(half->name() == fmt::format("parity[{}]", rank % 2), "name");
    const std::int32_t mine = rank;
    const auto all = half->all_gather(std::as_bytes(std::span(&mine, 1)));
    for (int r = 0; r < members; ++r) {
      std::int32_t theirs = -1;
      std::memcpy(&theirs, all[static_cast<std::size_t>(r)].data(), sizeof(theirs));
      check_equal(theirs, 2 * (members - 1 - r) + rank % 2, "who is in the group");
    }
    const auto same_key = plane.split(0, 7, "all");
    check_equal(same_key->rank(), rank, "equal keys keep the rank order");
  });
}

TEST_CASE("a negative color gives no group") {
  run_ranks(3, [](ControlPlane& plane) {
    const auto group = plane.split(plane.rank() == 1 ? -1 : 0, 0, "without 1");
    check((group == nullptr) == (plane.rank() == 1), "null for the rank that stays out");
    if (group) {
      check_equal(group->size(), 2, "size");
      group->barrier();
    }
  });
}

TEST_CASE("generations are given once, on every rank the same") {
  run_ranks(3, [](ControlPlane& plane) {
    const auto first = plane.new_generations(4);
    const auto second = plane.new_generations(1);
    check(second >= first + 4, "apart");
    for (const auto mine : {first, second}) {
      for (const auto& theirs : plane.all_gather(std::as_bytes(std::span(&mine, 1)))) {
        check(std::memcmp(theirs.data(), &mine, sizeof(mine)) == 0, "the same on every rank");
      }
    }
  });
}

TEST_CASE("all_gather_within has a time limit of its own") {
  const auto planes = make_thread_control_planes(2, 60s);
  const auto start = Clock::now();
  CHECK_THROWS_MATCHES(planes[0]->all_gather_within({}, 100ms), TimeoutError,
                       says("rank 1", "100 ms"));
  CHECK(Clock::now() - start < 10s);
}

TEST_CASE("a split is not taken for an all_gather of the same size") {
  run_ranks(2, [](ControlPlane& plane) {
    if (plane.rank() == 0) {
      check_throws<SymmetryError>([&] { plane.split(0, 0, "half"); }, "split", "rank 1",
                                  "all_gather");
    } else {
      plane.all_gather(Bytes(12));
    }
  });
}
