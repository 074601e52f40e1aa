// SPDX-License-Identifier: Apache-2.0
#include "cohort/nccl/profiler_ranges.hpp"

#include "support/catch.hpp"

TEST_CASE("ranges may be made where no tool listens", "[profiler_ranges]") {
  const cohort::ProfilerRanges ranges("tp[0]");
  for (int call = 0; call <= static_cast<int>(cohort::TraceCall::launch); ++call) {
    ranges.begin(static_cast<cohort::TraceCall>(call));
    ranges.end();
  }
  SUCCEED("nothing was there to be unbalanced");
}
