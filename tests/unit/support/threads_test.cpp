// SPDX-License-Identifier: Apache-2.0
#include "support/threads.hpp"

#include <atomic>
#include <chrono>
#include <cohort/error.hpp>
#include <stdexcept>

#include "support/catch.hpp"

using namespace cohort;
using namespace cohort::test;

TEST_CASE("run_ranks runs the body once for every rank", "[harness]") {
  const int n = GENERATE(1, 2, 3, 4, 8);
  std::atomic<unsigned> seen{0};
  run_ranks(n, [&](ControlPlane& plane) {
    check_equal(plane.size(), n, "size");
    seen.fetch_or(1U << plane.rank());
    plane.barrier();
    check_equal(seen.load(), (1U << n) - 1, "all ranks came before the barrier ended");
  });
  CHECK(seen.load() == (1U << n) - 1);
}

TEST_CASE("run_ranks throws the failure with its rank and the exception nested", "[harness]") {
  bool thrown = false;
  try {
    run_ranks(3, [](ControlPlane& plane) {
      if (plane.rank() == 2) {
        throw UsageError("dim: expected 0 to 2, got 3");
      }
    });
  } catch (const RankFailure& failure) {
    thrown = true;
    CHECK(failure.rank() == 2);
    CHECK_THAT(failure.what(), contains("rank 2", "dim: expected 0 to 2, got 3"));
    CHECK_THROWS_AS(std::rethrow_if_nested(failure), UsageError);
  }
  CHECK(thrown);
}

TEST_CASE("ranks that wait for a failed one come back at the time limit", "[harness]") {
  using namespace std::chrono_literals;
  const auto body = [](ControlPlane& plane) {
    check(plane.rank() != 1, "rank 1 gives up");
    plane.barrier();
  };
  CHECK_THROWS_MATCHES(run_ranks(3, body, 200ms), RankFailure, says("rank 1", "gives up"));
}

TEST_CASE("check, check_equal and check_throws fail when they should", "[harness]") {
  CHECK_NOTHROW(check(true, "fine"));
  CHECK_THROWS_MATCHES(check(false, "two is odd"), std::runtime_error, says("two is odd"));
  CHECK_NOTHROW(check_equal(2, 2, "fine"));
  CHECK_THROWS_MATCHES(check_equal(2, 3, "sum"), std::runtime_error, says("sum", "2", "3"));

  const auto bad_dim = [] { throw UsageError("dim: expected 0 to 2, got 3"); };
  CHECK(check_throws<UsageError>(bad_dim, "dim", "got 3") == "dim: expected 0 to 2, got 3");
  CHECK_THROWS_MATCHES(check_throws<UsageError>(bad_dim, "got 4"), std::runtime_error,
                       says("got 4"));
  CHECK_THROWS_AS(check_throws<ConfigError>(bad_dim), UsageError);
  CHECK_THROWS_MATCHES(check_throws<UsageError>([] {}), std::runtime_error,
                       says("no exception was thrown"));
}
