// SPDX-License-Identifier: Apache-2.0
#include "cohort/formed_groups.hpp"

#include <atomic>
#include <chrono>
#include <cohort/host/host_backend.hpp>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "support/arena_checks.hpp"
#include "support/catch.hpp"
#include "support/divergence_checks.hpp"
#include "support/stand_in_backend.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::test;

TEST_CASE("teardown closes every group, whatever state the groups are in", "[state]") {
  const std::string broken = GENERATE("dcp", "world");
  run_ranks(2, [&](ControlPlane& world) {
    auto state = make_state(world, {.tp = 2, .dcp = 2});
    auto& out_of_step = broken == "dcp" ? state.dcp().control() : state.world().control();
    check_throws<SymmetryError>(
        [&] { world.rank() == 0 ? out_of_step.barrier() : (void)out_of_step.all_gather({}); },
        "rank");
    const Tensor x = state.backend().allocate({4}, DType::f32, {});
    fill(x, 0);
    state.shutdown();  // throws nothing a second time, whichever group it was
    for (GroupCoordinator* group : state.groups()) {
      check_throws<UsageError>([&] { group->all_reduce(x); }, "after shutdown");
    }
    state.shutdown();
    auto next = make_state(world, {.tp = 2, .dcp = 2});
    check_works_on(next.dcp());
  });
}

TEST_CASE("a group that is shut down behind a failure of its own throws nothing a second time",
          "[state]") {
  run_ranks(2, [&](ControlPlane& world) {
    auto state = make_state(world, {.tp = 2, .dcp = 2});
    const Tensor x = state.backend().allocate({4}, DType::f32, {});
    fill(x, 0);
    auto& tp = state.tp();
    if (world.rank() == 1) {
      tp.forsake_peers("its card fell off the bus");
    } else {
      check_throws<Error>([&] { tp.all_reduce(x); }, "its card fell off the bus");
    }
    tp.shutdown();
    check_throws<UsageError>([&] { tp.all_reduce(x); }, "after shutdown");
  });
}

TEST_CASE("a state remembers the failure of a group that is shut down before it", "[state]") {
  run_ranks(2, [&](ControlPlane& world) {
    auto state = make_state(world, {.tp = 2, .dcp = 2});
    if (world.rank() == 1) {
      state.tp().forsake_peers("its card fell off the bus");
      return;  // without shutdown
    }
    const Tensor x = state.backend().allocate({4}, DType::f32, {});
    fill(x, 0);
    check_throws<Error>([&] { state.tp().all_reduce(x); }, "its card fell off the bus");
    state.tp().shutdown();
    check(state.tp().failed() && state.failed(), "the failure is known");
    state.shutdown();  // waits for nobody, so it throws nothing
    check(state.failed(), "the failure is known behind the state's shutdown");
  });
}

TEST_CASE("where the ranks cannot wait for each other no group waits for peers in teardown",
          "[state]") {
  const bool out_of_step = GENERATE(false, true);
  run_ranks(2, [&](ControlPlane& world) {
    std::vector<std::string> forsaken;
    const auto backend = std::make_shared<StandInBackend>(
        StandIns{.forsake_peers = [&](const ControlPlane& g) { forsaken.push_back(g.name()); }});
    ParallelOptions options;
    options.layout = {.tp = 2, .dcp = 2};
    options.backend = backend;
    auto state = ParallelState::create(world, options);
    if (!out_of_step) {
      state.shutdown();
      check(forsaken.empty(), "all were there");
      return;
    }
    auto& control = state.world().control();
    check_throws<SymmetryError>(
        [&] { world.rank() == 0 ? control.barrier() : (void)control.all_gather({}); }, "rank");
    state.shutdown();
    std::size_t groups = 0;
    for (const GroupCoordinator* group : state.groups()) {
      groups += group->size() > 1 ? 1U : 0U;
    }
    check_equal(forsaken.size(), groups, "groups that wait no longer");
  });
}

TEST_CASE("a rank that leaves behind one group's failure tells all its groups", "[state]") {
  const bool mapped = GENERATE(true, false);
  const bool shuts_down = GENERATE(true, false);
  const auto start = Clock::now();
  run_ranks(
      4,
      [&](ControlPlane& world) {
        const HostOptions options{.machine = mapped ? "one" : std::to_string(world.rank())};
        std::optional<ParallelState> state(
            make_state(world, {.tp = 4, .dcp = 2}, {.backend = host_backend(options)}));
        if (world.rank() == 3) {
          state->dcp().forsake_peers("its card fell off the bus");
          check(state->dcp().failed(), "failed");
          if (shuts_down) {
            state->shutdown();  // together with the others
          } else {
            state.reset();
          }
          return;
        }
        check_throws<Error>([&] { state->tp().barrier(); }, mapped ? "rank" : "rank 3",
                            mapped ? "gave up" : "behind a failure in group dcp[1]");
        if (shuts_down) {
          state->shutdown();
        } else {
          check_throws<SymmetryError>([&] { state->world().control().check_peers(); },
                                      "behind a failure in group dcp[1]");
        }
      },
      std::chrono::milliseconds(60'000));
  CHECK(seconds_since(start) < 30);
}

TEST_CASE("behind a rank that does not come each group names it, and none that waits", "[state]") {
  const bool mapped = GENERATE(true, false);
  std::atomic<int> ended{0};
  run_ranks(
      4,
      [&](ControlPlane& world) {
        const HostOptions options{.machine = mapped ? "one" : std::to_string(world.rank())};
        auto state = make_state(world, {.tp = 2, .pp = 2}, {.backend = host_backend(options)});
        const Tensor x = state.backend().allocate({4}, DType::f32, {});
        fill(x, 0);
        const auto stay = [&] {  // nobody leaves, who would tell the others why
          while (ended < 3) {
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
          }
        };
        if (world.rank() == 3) {
          stay();
          return;
        }
        std::vector<int> missing;
        std::string words;
        try {
          if (world.rank() == 2) {
            state.tp().all_reduce(x);
          } else {
            state.pp().recv(x, 1);
          }
        } catch (const TimeoutError& late) {
          missing = late.missing();
          words = late.what();
        }
        ++ended;
        stay();
        if (world.rank() == 0) {  // waits for rank 2, which waits for rank 3
          check(missing.empty() &&
                    words.find("rank 3 of group world did not arrive") != std::string::npos &&
                    words.find("; rank 1 waited as well") != std::string::npos,
                "group pp[0] names rank 3: " + words);
        } else {
          check(missing == std::vector{1}, "names rank 3: " + words);
        }
      },
      std::chrono::milliseconds(1'000));
}

TEST_CASE("calls that differ are found where ranks wait for each other by different means",
          "[state]") {
  const int n = GENERATE(2, 3);
  const bool mapped = GENERATE(true, false);
  const bool replayed = GENERATE(false, true);  // by those that reduce
  run_ranks(
      n,
      [&](ControlPlane& world) {
        const HostOptions options{.machine = mapped ? "one" : std::to_string(world.rank())};
        auto state = make_state(world, {.tp = n}, {.backend = host_backend(options)});
        auto& tp = state.tp();
        const Tensor x = state.backend().allocate({4}, DType::f32, {});
        fill(x, 0);
        HostStream stream;
        auto graph = state.capture(stream, [&] { tp.all_reduce(x, stream); });
        const auto call = [&] {
          if (world.rank() == n - 1 && mapped) {
            tp.reserve(64 << 20);
          } else if (world.rank() == n - 1) {
            tp.shutdown();
          } else if (replayed) {
            graph.launch(stream);
          } else {
            tp.all_reduce(x);
          }
        };
        check_blames(n - 1, call, "of group tp[0]", "in calls that differ",
                     replayed ? "in launch #" : "in all_reduce #",
                     fmt::format("rank {} in agreement #", n - 1),
                     mapped ? "reservation in arena tp[0]" : "shutdown of the group");
        check(tp.failed(), "the group has ended");
      },
      std::chrono::milliseconds(4'000));
}

TEST_CASE("ranks that wait for messages of each other are late, and name each other", "[state]") {
  const bool mapped = GENERATE(true, false);
  run_ranks(
      2,
      [&](ControlPlane& world) {
        const HostOptions options{.machine = mapped ? "one" : std::to_string(world.rank())};
        auto state = make_state(world, {.tp = 2}, {.backend = host_backend(options)});
        const Tensor x = state.backend().allocate({4}, DType::f32, {});
        check_throws<TimeoutError>([&] { state.tp().recv(x, 1 - world.rank()); }, "did not arrive");
      },
      std::chrono::milliseconds(1'000));
}

TEST_CASE("whoever waits for ranks that leave behind a difference throws the same", "[state]") {
  const bool mapped = GENERATE(true, false);
  const bool in_world = GENERATE(true, false);
  const auto start = Clock::now();
  run_ranks(
      4,
      [&](ControlPlane& world) {
        auto state = make_state(world, {.tp = 2, .pp = 2, .dcp = 2},
                                {.backend = host_backend({.map_peers = mapped})});
        const Tensor x = state.backend().allocate({64}, DType::f32, {});
        fill(x, 1);
        const auto differs = [](const auto& call, const std::vector<int>& ranks) {
          try {
            call();
          } catch (const SymmetryError& error) {
            check_throws<SymmetryError>([] { throw; }, "the ranks make different calls");
            check(error.ranks() == ranks, error.what());
            return;
          }
          check(false, "a SymmetryError is thrown");
        };
        if (world.rank() >= 2) {
          const auto part = x.view().slice(0, 0, world.rank() == 3 ? 32 : 64);
          differs([&] { state.tp().all_reduce(part); }, {1});
          state.shutdown();  // throws no second time
        } else if (in_world) {
          differs([&] { state.world().all_reduce(x); }, {3});
        } else if (world.rank() == 1) {
          differs([&] { state.pp().all_reduce(x); }, {1});
          state.shutdown();
        } else {
          differs([&] { state.shutdown(); }, {3});
        }
      },
      std::chrono::milliseconds(60'000));
  CHECK(seconds_since(start) < 30);
}

TEST_CASE("ranks that go on behind a difference end as if there had been none", "[state]") {
  run_ranks(2, [](ControlPlane& world) {
    auto state = make_state(world, {.tp = 2, .dcp = 2});
    const Tensor x = state.backend().allocate({64}, DType::f32, {});
    fill(x, 1);
    check_throws<SymmetryError>(
        [&] { state.tp().all_reduce(x.view().slice(0, 0, world.rank() == 1 ? 32 : 64)); },
        "the ranks make different calls");
    check_works_on(state.tp());
    state.world().control().barrier();
    for (GroupCoordinator* group : state.groups()) {
      check(!group->control().poisoned(), group->name());
    }
    state.shutdown();
  });
}

TEST_CASE("a rank that leaves in good order tells nobody that it failed", "[state]") {
  run_ranks(2, [](ControlPlane& world) {
    auto state = make_state(world, {.tp = 2, .dcp = 2});
    {
      auto other = make_state(world, {.tp = 2, .dcp = 2});
      check_works_on(other.dcp());
      if (world.rank() == 1) {
        const auto gone = std::move(other);
      }
      world.barrier();
      if (world.rank() == 0) {
        for (GroupCoordinator* group : other.groups()) {
          group->control().check_peers();
          check(!group->control().poisoned(), group->name());
        }
      }
    }
    state.shutdown();
  });
}

TEST_CASE("a failure in one group reaches the others as what it was, with the rank's name",
          "[state]") {
  const auto start = Clock::now();
  run_ranks(
      4,
      [&](ControlPlane& world) {
        std::optional<ParallelState> state(make_state(world, {.tp = 2, .pp = 2}));
        Tensor x = state->backend().allocate({64}, DType::f32, {});
        fill(x, 1);
        const auto late = [&](const char* name, GroupCoordinator& group, const auto& missing) {
          try {
            group.all_reduce(x);
            check(false, fmt::format("{} threw", name));
          } catch (const TimeoutError& error) {
            check(error.missing() == missing, error.what());
            check_throws<TimeoutError>([] { throw; }, name);
            if (missing.empty()) {
              check_throws<TimeoutError>([] { throw; }, "group tp[1] of rank 3 of the world");
            }
          }
        };
        switch (world.rank()) {
          case 0:  // waits for rank 2, which never comes, because rank 3 did not
            std::this_thread::sleep_for(std::chrono::milliseconds(500));
            late("pp[0]", state->pp(), std::vector<int>{});
            break;
          case 2:
            late("tp[1]", state->tp(), std::vector{1});
            break;
          case 3:
            std::this_thread::sleep_for(std::chrono::milliseconds(2500));  // absent
            break;
          default:
            break;
        }
        state.reset();
      },
      std::chrono::milliseconds(1000));
  CHECK(seconds_since(start) < 30);
}
