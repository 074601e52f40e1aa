// SPDX-License-Identifier: Apache-2.0
#include "cohort/captured_graph.hpp"

#include <memory>
#include <optional>
#include <stdexcept>

#include "support/arena_checks.hpp"
#include "support/catch.hpp"
#include "support/counting_driver.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::test;

TEST_CASE("graphs go on without a group that was shut down, unless they hold its calls",
          "[state]") {
  run_ranks(2, [](ControlPlane& world) {
    auto state = make_state(world, {.tp = 2, .dcp = 2});
    HostStream stream;
    const Tensor x = state.backend().allocate({16}, DType::f32, {});
    const auto of = [&](GroupCoordinator& group) {
      return state.capture(stream, [&] { group.all_reduce(x, stream); });
    };
    auto of_tp = of(state.tp());
    auto of_dcp = of(state.dcp());
    of_dcp.launch(stream);
    state.dcp().shutdown();
    const auto check_launch = [&](CapturedGraph& graph) {
      fill(x, world.rank());
      graph.launch(stream);
      check_values(x, "sum",
                   [](std::int64_t flat) { return value_at(0, flat) + value_at(1, flat); });
    };
    check_launch(of_tp);
    state.order(stream);
    state.launched(stream);
    check_throws<UsageError>([&] { of_dcp.launch(stream); }, "dcp[0]", "after shutdown");
    auto later = of(state.tp());
    check_launch(later);
    state.reclaim_graphs();
    state.shutdown();
    check_throws<UsageError>([&] { of_tp.launch(stream); }, "after shutdown");
    check_throws<UsageError>([&] { state.launched(stream); }, "after shutdown");
    check_throws<UsageError>([&] { state.reclaim_graphs(); }, "shut down");
  });
}

TEST_CASE("a capture whose stream does not answer has ended", "[state]") {
  class MuteDriver final : public CountingDriver {
   public:
    [[nodiscard]] CaptureId capture_id(void* native) const override {
      if (mute_) {
        throw TransportError({.call = "cudaStreamGetCaptureInfo", .native_code = 999}, "unknown");
      }
      return CountingDriver::capture_id(native);
    }
    void begin_capture(void* native) override {
      CountingDriver::begin_capture(native);
      mute_ = true;
    }
    [[nodiscard]] std::unique_ptr<ExecutableGraph> end_capture(void* native) override {
      mute_ = false;
      return CountingDriver::end_capture(native);
    }

   private:
    bool mute_ = false;
  };
  run_ranks(2, [](ControlPlane& world) {
    auto state = make_state(world, {.tp = 2});
    MuteDriver driver;
    HostStream stream;
    check_throws<TransportError>([&] { (void)state.capture(driver.ref(stream), [] {}); },
                                 "unknown");
    check(stream.ref().capture_id() == 0, "the capture was ended");
  });
}

TEST_CASE("a graph of a state that is gone is refused, and a capture that threw has ended",
          "[state]") {
  run_ranks(2, [](ControlPlane& world) {
    std::optional<ParallelState> state(make_state(world, {.tp = 2}));
    HostStream stream;
    const Tensor x = state->backend().allocate({16}, DType::f32, {});
    auto graph = state->capture(stream, [&] { state->tp().all_reduce(x, stream); });
    graph.launch(stream);
    check_throws<std::runtime_error>(
        [&] {
          (void)state->capture(stream, [] { throw std::runtime_error("the engine failed"); });
        },
        "the engine failed");
    check(stream.ref().capture_id() == 0, "the capture was ended");
    graph.launch(stream);
    state->shutdown();
    state.reset();
    check_throws<UsageError>([&] { graph.launch(stream); }, "was destroyed");
  });
}
