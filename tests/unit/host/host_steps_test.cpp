// SPDX-License-Identifier: Apache-2.0
#include "cohort/host/host_steps.hpp"

#include <cohort/thread_control_planes.hpp>
#include <memory>
#include <optional>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using namespace cohort::host;

TEST_CASE("steps are counted when they are issued, begin and end", "[host_steps]") {
  const auto planes = make_thread_control_planes(1);
  ControlPlane& control = *planes[0];
  const auto recorder = std::make_shared<FlightRecorder>("tp[0]", 0, std::vector{0}, TraceRings{});
  bool reported = false;
  recorder->on_failure(
      [&](const FlightRecorder&, const TraceFailure& failure) { reported = failure.late; });
  HostSteps steps(control, nullptr, CallPath::exchange);
  steps.run([] {});  // of no group
  control.record_in(recorder);
  steps.issue();
  steps.issue();
  CHECK(steps.stand().steps == 2);
  CHECK(steps.stand().path == CallPath::exchange);
  const TraceProgress& progress = recorder->own().progress[0];
  steps.run([&] { CHECK(progress.entered == 1); });
  CHECK(progress.left == 1);
  CHECK_THROWS_AS(steps.run([]() { throw TimeoutError("late", {0}); }), TimeoutError);
  CHECK(progress.entered == 2);
  CHECK(progress.left == 1);
  CHECK(reported);
}

TEST_CASE("what ranks differed in is kept until they go on", "[host_steps]") {
  const auto planes = make_thread_control_planes(1);
  HostSteps steps(*planes[0], nullptr, CallPath::mapped);
  CHECK_FALSE(steps.differed());
  CHECK_THROWS_AS(steps.run([] { throw SymmetryError("other calls", {2}); }), SymmetryError);
  REQUIRE(steps.differed());
  CHECK(steps.differed()->ranks == std::vector{2});
  CHECK_THROWS_AS(steps.run([] { throw UsageError("no such rank"); }), UsageError);
  CHECK(steps.differed());
  steps.run([] {});
  CHECK_FALSE(steps.differed());
}
