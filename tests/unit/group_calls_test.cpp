// SPDX-License-Identifier: Apache-2.0
#include "cohort/group_calls.hpp"

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "cohort/host/host_stream.hpp"
#include "support/catch.hpp"
#include "support/counting_driver.hpp"

using namespace cohort;
using namespace cohort::detail;
using namespace cohort::test;

namespace {

/// The calls of a group of one, whose transport plays no part.
struct Alone {
  std::shared_ptr<FlightRecorder> recorder =
      std::make_shared<FlightRecorder>("tp[0]", 0, std::vector{0}, TraceRings{});
  GroupCalls calls{"tp[0]", nullptr, recorder};

  void call(StreamRef stream) { calls.finish(calls.begin(stream, MadeCall(TraceCall::barrier))); }
};

}  // namespace

TEST_CASE("a call that was enqueued is counted, and one that an error ended is open no more") {
  Alone group;
  HostStream stream;
  {
    const auto call = group.calls.begin(stream, MadeCall(TraceCall::barrier));
    CHECK_THAT(group.recorder->open_call(), contains("barrier"));
    group.calls.finish(call);
  }
  CHECK(group.recorder->open_call().empty());
  CHECK(group.recorder->counters(CallPath::local).calls == 1);
  try {
    const auto call = group.calls.begin(stream, MadeCall(TraceCall::barrier));
    throw UsageError("no room");
  } catch (const UsageError&) {
    CHECK(group.recorder->open_call().empty());
  }
  CHECK(group.recorder->counters(CallPath::local).calls == 1);
}

TEST_CASE("calls go on without records where the recorder is turned off") {
  Alone group;
  HostStream stream;
  group.recorder->turn(false);
  group.call(stream);
  CHECK(group.recorder->own().calls == 0);
  CHECK(group.recorder->counters(CallPath::local).calls == 0);
  group.recorder->turn(true);
  group.call(stream);
  CHECK(group.recorder->own().calls == 1);
  CHECK(group.recorder->counters(CallPath::local).calls == 1);
}

TEST_CASE("calls of one lane wait for each other across streams, those of two do not") {
  Alone group;
  CountingDriver driver;
  HostStream first;
  HostStream second;
  group.calls.reserve_lanes(2);
  group.call(driver.ref(first));
  group.call(driver.ref(first));
  CHECK(driver.waits() == 0);
  group.call(driver.ref(second));
  CHECK(driver.waits() == 1);
  group.calls.use_lane(1);
  group.call(driver.ref(first));
  CHECK(driver.waits() == 0);
  // A graph may hold calls of either, so a launch on the second stream waits for both, and calls
  // of both wait for it.
  group.calls.before_launch(driver.ref(second));
  CHECK(driver.waits() == 1);
  group.calls.launched(driver.ref(second));
  group.call(driver.ref(first));
  CHECK(driver.waits() == 1);
  group.calls.use_lane(0);
  group.call(driver.ref(first));
  CHECK(driver.waits() == 1);
}

TEST_CASE("a lane is one of those that are reserved") {
  Alone group;
  CHECK_THROWS_MATCHES(group.calls.reserve_lanes(0), UsageError, says("at least 1, got 0"));
  CHECK_THROWS_MATCHES(group.calls.use_lane(1), UsageError, says("the 1 reserved lanes, got 1"));
  group.calls.reserve_lanes(3);
  group.calls.reserve_lanes(2);
  CHECK_NOTHROW(group.calls.use_lane(2));
  CHECK_THROWS_MATCHES(group.calls.use_lane(-1), UsageError, says("the 3 reserved lanes, got -1"));
}

TEST_CASE("a graph with calls of a group that has ended is refused, and others are not") {
  HostStream stream;
  std::unique_ptr<ExecutableGraph> with_calls;
  std::unique_ptr<ExecutableGraph> without;
  {
    Alone group;
    stream.begin_capture();
    group.call(stream);
    with_calls = stream.end_capture();
    stream.begin_capture();
    without = stream.end_capture();
    CHECK_NOTHROW(with_calls->launch(stream));
    group.calls.end();
  }
  CHECK_THROWS_MATCHES(with_calls->launch(stream), UsageError,
                       says("group tp[0] was used after shutdown"));
  CHECK_NOTHROW(without->launch(stream));
}
