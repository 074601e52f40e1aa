// SPDX-License-Identifier: Apache-2.0
#include "cohort/group_formation.hpp"

#include <algorithm>
#include <chrono>
#include <cohort/host/host_backend.hpp>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "support/arena_checks.hpp"
#include "support/catch.hpp"
#include "support/divergence_checks.hpp"
#include "support/stand_in_backend.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::test;

namespace {

/// Collects what is logged while it lives.
class LogCapture {
 public:
  LogCapture()
      : before_(set_log_sink(
            [this](LogLevel level, std::string_view text) { lines.emplace_back(level, text); })) {}
  ~LogCapture() { set_log_sink(std::move(before_)); }
  LogCapture(const LogCapture&) = delete;
  LogCapture& operator=(const LogCapture&) = delete;

  [[nodiscard]] int count(LogLevel level, std::string_view part) const {
    return static_cast<int>(std::count_if(lines.begin(), lines.end(), [&](const auto& line) {
      return line.first == level && line.second.find(part) != std::string::npos;
    }));
  }

  std::vector<std::pair<LogLevel, std::string>> lines;

 private:
  LogSink before_;
};

}  // namespace

TEST_CASE("what the environment says wins over options, and nothing else changes", "[state]") {
  const ParallelOptions given{
      .merge = {.plan = MergePlan::staged}, .debug_checks = true, .trace = {.folder = "traces"}};
  const auto same = detail::with_settings(given, {});
  CHECK(same.merge.plan == MergePlan::staged);
  CHECK(same.debug_checks);
  CHECK(same.trace.folder == "traces");
  RuntimeSettings settings;
  settings.merge_plan = MergePlan::packed;
  settings.debug_checks = false;
  settings.trace_dir = "elsewhere";
  const auto other = detail::with_settings(given, settings);
  CHECK(other.merge.plan == MergePlan::packed);
  CHECK_FALSE(other.debug_checks);
  CHECK(other.trace.folder == "elsewhere");
}

TEST_CASE("a group that is refused symmetric memory is warned about once", "[state]") {
  LogCapture log;
  run_ranks(4, [](ControlPlane& world) {
    const HostOptions options{.machine = world.rank() < 2 ? "left" : "right"};
    auto state =
        make_state(world, {.tp = 4, .pp = 1, .dcp = 2}, {.backend = host_backend(options)});
    check(state.dcp().decision().nccl_windows.on, "dcp lies inside a machine");
    check(!state.tp().decision().nccl_windows.on, "tp does not");
    check(state.audience({&state.tp(), &state.dcp()}).arena != nullptr, "dcp alone is left");
    check_works_on(state.tp());
    check_works_on(state.dcp());
  });
  CHECK(log.count(LogLevel::warning, "tp[0]") == 1);
  CHECK(log.count(LogLevel::warning, "2 machines") == 1);
  CHECK(log.count(LogLevel::warning, "dcp[") == 0);
  CHECK(log.count(LogLevel::info, "dcp[1]: ") == 1);
}

TEST_CASE("all ranks have a state or none has", "[state]") {
  const auto start = Clock::now();
  run_ranks(4, [](ControlPlane& world) {
    const HostOptions options{.machine = world.rank() == 3 ? "far" : "near"};
    const auto create = [&] {
      (void)ParallelState::create(world, {.layout = {.tp = 4, .dcp = 2},
                                          .backend = host_backend(options),
                                          .merge = {.plan = MergePlan::one_kernel}});
    };
    if (world.rank() < 2) {
      check_throws<SymmetryError>(create, "formation of the groups of a ParallelState",
                                  "rank 2, 3 failed", "one_kernel");
    } else {
      check_throws<ConfigError>(create, "one_kernel");
    }
    auto state = make_state(world, {.tp = 4, .dcp = 2});
    check_works_on(state.dcp());
  });
  CHECK(seconds_since(start) < 15);
}

TEST_CASE("a rank that fails while groups are formed ends it everywhere at once", "[state]") {
  const std::string where = GENERATE("world", "tp[0]", "pp[1]");
  const auto start = Clock::now();
  run_ranks(
      4,
      [&](ControlPlane& world) {
        const auto form = [&](bool fails) {
          return two_by_two(world, {.connect = [&world, &where, fails](ControlPlane& group) {
                              if (fails && world.rank() == 1 && group.name() == where) {
                                throw TransportError(kNoMemory);
                              }
                            }});
        };
        if (world.rank() == 1) {
          check_throws<TransportError>([&] { (void)form(true); }, "code 2", "out of memory");
        } else {
          // Of the first cause's type where a group of this rank was told, of a disagreement
          // elsewhere.
          check_throws<Error>([&] { (void)form(true); }, "rank", "out of memory");
        }
        check(!world.poisoned(), "the world works on");
        auto state = form(false);
        check_works_on(state.tp());
        check_works_on(state.pp());
      },
      std::chrono::milliseconds(60'000));
  CHECK(seconds_since(start) < 30);
}

TEST_CASE("a rank that fails before groups are formed ends it everywhere at once", "[state]") {
  /// Shortens the first message of that length to a rank.
  struct Shortens final : detail::ThreadMessenger {
    using detail::ThreadMessenger::ThreadMessenger;
    void send(int receiver, Bytes message) override {
      if (receiver == to && message.size() == bytes) {
        message.erase(message.begin(), message.begin() + 8);
        to = -1;
      }
      ThreadMessenger::send(receiver, std::move(message));
    }
    std::size_t bytes = 16 + ControlPlane::kTrailerBytes;
    int to = -1;
  };
  const auto start = Clock::now();
  const auto hub = std::make_shared<detail::ThreadHub>(4);
  run_ranks(4, [&](ControlPlane& plane) {
    const auto messenger = std::make_shared<Shortens>(hub, plane.rank());
    messenger->to = plane.rank() == 3 ? 2 : -1;  // what it says for the number of the run
    MessageControlPlane world(messenger, std::chrono::milliseconds(60'000));
    const auto form = [&] { return make_state(world, {.tp = 2, .pp = 2}); };
    check_blames(
        3, [&] { (void)form(); }, "rank 3 sent 8 bytes where 16 were expected");
    check(!world.poisoned(), "the world works on");
    auto state = form();
    check_works_on(state.tp());
    check_works_on(state.pp());
  });
  CHECK(seconds_since(start) < 30);
}

TEST_CASE("ranks with unlike time limits form no state", "[divergence]") {
  const auto hub = std::make_shared<detail::ThreadHub>(3);
  run_ranks(3, [&](ControlPlane& plane) {
    const std::chrono::milliseconds limit(plane.rank() == 1 ? 40'000 : 60'000);
    MessageControlPlane world(std::make_shared<detail::ThreadMessenger>(hub, plane.rank()), limit);
    check_blames(
        1, [&] { (void)make_state(world, {.tp = 3}); }, "time limit 40000 ms",
        "time limit 60000 ms");
    check(!world.poisoned(), "the ranks are in step");
  });
}
