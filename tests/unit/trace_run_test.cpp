// SPDX-License-Identifier: Apache-2.0
#include "cohort/trace_run.hpp"

#include <array>
#include <chrono>
#include <cstdint>
#include <string>

#include "cohort/error.hpp"
#include "support/catch.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::test;
using namespace std::chrono_literals;

TEST_CASE("ranks agree on a run, another one each time", "[trace_run]") {
  std::array<std::array<std::uint64_t, 2>, 3> ids{};
  run_ranks(3, [&](ControlPlane& world) {
    for (std::uint64_t& id : ids[static_cast<std::size_t>(world.rank())]) {
      const TraceRun run = detail::agree_on_trace_run(world);
      id = run.id;
      check(run.hosts == std::vector{0, 0, 0}, "one machine");
    }
  });
  CHECK(ids[0] == ids[1]);
  CHECK(ids[0] == ids[2]);
  CHECK(ids[0][0] != ids[0][1]);
  CHECK(ids[0][0] != 0);
}

TEST_CASE("a rank that does not come to a part of the formation is recorded", "[trace_run]") {
  std::array<std::string, 2> traces;
  run_ranks(
      3,
      [&](ControlPlane& world) {
        StateTrace trace({}, world.rank(), world.size());
        detail::TracedFormation formation(trace, world);
        formation.part(
            "the first part", [&] { world.barrier(); }, true);
        if (world.rank() == 2) {
          return;
        }
        check_throws<TimeoutError>([&] {
          formation.part(
              "the second part", [&] { world.barrier(); }, true);
        });
        traces[static_cast<std::size_t>(world.rank())] = trace.to_json("a test", true);
      },
      1000ms);
  for (const std::string& trace : traces) {
    CHECK_THAT(trace, contains(R"("name":"the formation of the state")", R"("missing":[2])",
                               R"([2,"the second part"])"));
  }
}

TEST_CASE("when the formation is over nothing is recorded of it", "[trace_run]") {
  run_ranks(1, [](ControlPlane& world) {
    StateTrace trace({}, 0, 1);
    { const detail::TracedFormation formation(trace, world); }
    check(world.recorder() == nullptr, "the control plane records no longer");
    check(trace.to_json("", false).find("formation") == std::string::npos, "nor does the trace");
  });
}
