// SPDX-License-Identifier: Apache-2.0
#include "../bench/cohort_bench/statistics.hpp"

#include <cmath>
#include <vector>

#include "support/catch.hpp"

using namespace cohort::bench;

namespace {

bool near(double a, double b) { return std::abs(a - b) < 1e-9; }

}  // namespace

TEST_CASE("percentiles interpolate between sorted neighbours") {
  const std::vector<double> samples{4, 1, 3, 2};
  CHECK(percentile(samples, 0) == 1);
  CHECK(percentile(samples, 0.5) == 2.5);
  CHECK(percentile(samples, 1) == 4);
  CHECK(near(percentile(samples, 0.95), 3.85));
  CHECK(percentile({7}, 0.95) == 7);
  CHECK(percentile({}, 0.5) == 0);
  const Summary summary = summarize({5, 1, 9});
  CHECK(summary.min == 1);
  CHECK(summary.p50 == 5);
  CHECK(near(summary.p95, 8.6));
}

TEST_CASE("the mean of the faster half moves as all samples do, and not with slow ones") {
  CHECK(mean_of_faster({9, 1, 100, 2}) == 1.5);
  CHECK(mean_of_faster({1000, 1, 9, 2}) == 1.5);
  CHECK(mean_of_faster({10, 2, 101, 3}) == 2.5);
  CHECK(mean_of_faster({3, 1, 2}) == 1.5);
  CHECK(mean_of_faster({7}) == 7);
  CHECK(mean_of_faster({}) == 0);
}

TEST_CASE("an iteration takes as long as its slowest rank") {
  // Percentiles of single ranks would say 1 and miss that some rank is slow in every iteration.
  const std::vector<std::vector<double>> by_rank{{1, 9, 1}, {9, 1, 9}};
  CHECK(max_over_ranks(by_rank) == std::vector<double>{9, 9, 9});
  const std::vector<std::vector<double>> uneven{{1, 2, 3}, {2, 1}};
  CHECK(max_over_ranks(uneven) == std::vector<double>{2, 2});
  CHECK(max_over_ranks({}).empty());
}

TEST_CASE("short calls are batched until a sample is long enough") {
  CHECK(calls_per_sample(1, 100, 50) == 50);
  CHECK(calls_per_sample(10, 100, 50) == 10);
  CHECK(calls_per_sample(30, 100, 50) == 4);
  CHECK(calls_per_sample(500, 100, 50) == 1);
  CHECK(calls_per_sample(0, 100, 50) == 50);
  CHECK(calls_per_sample(1e-12, 100, 50) == 50);
  CHECK(calls_per_sample(1, 100, 1) == 1);
}

TEST_CASE("bus factors count what crosses a rank's link") {
  CHECK(gather_bus_factor(1) == 0);
  CHECK(gather_bus_factor(2) == 0.5);
  CHECK(gather_bus_factor(8) == 0.875);
  CHECK(all_reduce_bus_factor(2) == 1);
  CHECK(all_reduce_bus_factor(4) == 1.5);
}

TEST_CASE("bandwidth is in 10^9 bytes a second") {
  CHECK(near(bandwidth(1'000'000, 1000), 1));
  CHECK(near(bandwidth(64 << 10, 2), 32.768));
  CHECK(bandwidth(1, 0) == 0);
}
