// SPDX-License-Identifier: Apache-2.0
#include "cohort/nccl/trace_memory.hpp"

#include <algorithm>
#include <cstdint>

#include "support/catch.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::test;

TEST_CASE("every rank of a machine sees what the others record", "[trace_memory]") {
  run_ranks(3, [](ControlPlane& plane) {
    const TraceRings rings = make_trace_rings(plane);
    check_equal(rings.by_rank.size(), std::size_t{3}, "rings");
    check(std::count(rings.by_rank.begin(), rings.by_rank.end(), nullptr) == 0, "all are mapped");
    const auto mine = static_cast<std::size_t>(plane.rank());
    check_equal(TraceRing::load(rings.by_rank[mine]->calls), std::uint64_t{0}, "calls at first");
    plane.barrier();
    TraceRing::store(rings.by_rank[mine]->calls, 100 + mine);
    plane.barrier();
    for (std::size_t r = 0; r < 3; ++r) {
      check_equal(TraceRing::load(rings.by_rank[r]->calls), 100 + r, "calls of a rank");
    }
    plane.barrier();
  });
}
