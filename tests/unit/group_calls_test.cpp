// SPDX-License-Identifier: Apache-2.0
#include "cohort/group_calls.hpp"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "cohort/host/host_stream.hpp"
#include "support/catch.hpp"
#include "support/counting_driver.hpp"
#include "support/group_tensors.hpp"
#include "support/stand_in_backend.hpp"
#include "support/threads.hpp"

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

/// A transport that carries nothing, and counts what it is told of calls.
struct Told final : Transport {
  int begun = 0;
  int ended = 0;

  [[nodiscard]] TransportStand call_begins(TraceCall, StreamRef, CaptureId) noexcept override {
    ++begun;
    return {.steps = 5, .inbox = 2};
  }
  [[nodiscard]] TransportStand call_ends() noexcept override {
    ++ended;
    return {.steps = 8, .path = CallPath::own};
  }

  [[nodiscard]] std::string_view name() const noexcept override { return "told"; }
  [[nodiscard]] const SymmetricCapabilities& capabilities() const noexcept override {
    return nothing_;
  }
  [[nodiscard]] PeerKernels* peer_kernels() noexcept override { return nullptr; }
  [[nodiscard]] std::unique_ptr<Window> register_segment(Segment&) override { return nullptr; }
  void all_gather(const ConstTensorView&, const TensorView&, int, std::span<const std::int64_t>,
                  StreamRef) override {}
  void reduce_scatter(const ConstTensorView&, const TensorView&, int, std::span<const std::int64_t>,
                      ReduceOp, StreamRef) override {}
  void all_reduce(const ConstTensorView&, const TensorView&, ReduceOp, StreamRef) override {}
  void broadcast(const TensorView&, int, StreamRef) override {}
  void all_to_all(const ConstTensorView&, const TensorView&, StreamRef) override {}
  void send(const ConstTensorView&, int, StreamRef) override {}
  void recv(const TensorView&, int, StreamRef) override {}
  void barrier(StreamRef) override {}
  [[nodiscard]] std::string path(Collective, const ConstTensorView&, const TensorView&,
                                 int) const override {
    return "";
  }
  void synchronize(StreamRef, std::chrono::milliseconds) override {}

 private:
  SymmetricCapabilities nothing_;
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

TEST_CASE("a transport is told of each call's end once, in whichever way it is left") {
  const auto recorder =
      std::make_shared<FlightRecorder>("tp[0]", 0, std::vector{0, 1}, TraceRings{});
  Told transport;
  GroupCalls calls("tp[0]", &transport, recorder);
  HostStream stream;
  const bool is_on = GENERATE(true, false);
  recorder->turn(is_on);
  {
    const auto call = calls.begin(stream, MadeCall(TraceCall::barrier));
    CHECK(transport.begun == 1);
    CHECK(transport.ended == 0);
    calls.finish(call);
    CHECK(transport.ended == 1);
  }
  CHECK(transport.ended == 1);
  try {
    const auto call = calls.begin(stream, MadeCall(TraceCall::barrier));
    throw UsageError("no room");
  } catch (const UsageError&) {
    CHECK(transport.begun == 2);
    CHECK(transport.ended == 2);
  }
  const TraceRing& ring = recorder->own();
  CHECK(recorder->counters(CallPath::own).calls == (is_on ? 1 : 0));
  CHECK(ring.progress[2].issued == (is_on ? 6 : 0));
  if (is_on) {
    const auto finished = TraceRing::at(ring.records, 1);
    const auto left = TraceRing::at(ring.records, 2);
    REQUIRE((finished && left));
    CHECK(finished->path == CallPath::own);
    CHECK(finished->steps == 3);
    CHECK(finished->inbox == 2);
    CHECK(finished->flags == TraceRecord::kNumbered);
    CHECK(left->flags == (TraceRecord::kNumbered | TraceRecord::kFailed));
    CHECK(left->steps == 3);
  }
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
  CHECK_THROWS_MATCHES(group.calls.reserve_lanes(0), UsageError, says("1 to 1024, got 0"));
  CHECK_THROWS_MATCHES(group.calls.reserve_lanes(1 << 30), UsageError, says("1 to 1024, got"));
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

TEST_CASE("a call shares its time with the comparison of its arguments across the ranks") {
  using namespace std::chrono_literals;
  constexpr auto kLate = 200ms;
  std::atomic<bool> comes{false};
  std::atomic<bool> issued{false};
  run_ranks(2, [&](ControlPlane& world) {
    const auto backend =
        std::make_shared<StandInBackend>(StandIns{.reduce_scatter = [&](const ControlPlane& group) {
          if (group.rank() == 0) {
            check(call_clock().waited >= kLate / 2, "what it waited there is counted");
            issued = true;
          }
        }});
    auto state = make_state(world, {.tp = 2}, {.backend = backend, .debug_checks = true});
    const Tensor x = state.backend().allocate({4}, DType::f32, {});
    fill(x, 1);
    if (world.rank() == 0) {
      comes = true;
    } else {
      while (!comes) {
        std::this_thread::sleep_for(1ms);
      }
      std::this_thread::sleep_for(kLate);
    }
    static_cast<void>(state.tp().reduce_scatter_along_dim(x.view(), 0));
    state.shutdown();
  });
  CHECK(issued);
}
