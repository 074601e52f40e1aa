// SPDX-License-Identifier: Apache-2.0
#include "cohort/nccl/trace_memory.hpp"

#include <algorithm>
#include <cstdint>
#include <vector>

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

TEST_CASE("what a card counts is told with the wait that failed", "[trace_memory]") {
  TraceRing ring;
  const std::vector<std::uint64_t> epochs{7, 3, (std::uint64_t{1} << 40) + 7};
  const auto look = [&](bool over, const cuda::InboxError& error, int rank,
                        const std::vector<std::uint64_t>& left,
                        const std::vector<std::uint64_t>& perhaps_left) {
    look_at_epochs(ring, epochs, over, error, rank);
    for (std::size_t i = 0; i < epochs.size(); ++i) {
      CHECK(ring.progress[i].entered == epochs[i]);
      CHECK(ring.progress[i].left == left[i]);
      CHECK(ring.progress[i].perhaps_left == perhaps_left[i]);
    }
  };
  const auto wide = std::uint64_t{1} << 40;
  look(true, {}, 0, epochs, epochs);
  look(false, {}, 0, {6, 2, wide + 6}, epochs);
  const auto error = cuda::InboxError::decode(
      cuda::InboxError::encode(wide + 7, 0, 1, cuda::PeerCall::all_reduce));
  look(false, error, 0, {6, 2, wide + 6}, {6, 3, wide + 6});
  look(false, error, 1, {6, 2, wide + 6}, epochs);  // another rank's wait
}
