// SPDX-License-Identifier: Apache-2.0
#include "cohort/group_audiences.hpp"

#include <atomic>
#include <chrono>
#include <cohort/host/host_backend.hpp>
#include <memory>
#include <thread>
#include <vector>

#include "support/arena_checks.hpp"
#include "support/catch.hpp"
#include "support/divergence_checks.hpp"
#include "support/stand_in_backend.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::test;

TEST_CASE("an audience of several groups waits for a missing rank once", "[audience]") {
  const auto limit = std::chrono::milliseconds(2000);
  run_ranks(
      3,
      [&](ControlPlane& world) {
        auto state = make_state(world, {.tp = 3, .dcp = 3});
        const auto all = state.audience({&state.world(), &state.tp(), &state.dcp()});
        check(all.arena != nullptr, "an arena");
        world.barrier();
        if (world.rank() == 1) {
          std::this_thread::sleep_for(2 * limit);
          return;
        }
        const auto start = Clock::now();
        try {
          all.arena->reserve(1 << 20);
          check(false, "reserve throws");
        } catch (const TimeoutError& error) {
          check(error.missing() == std::vector{1}, error.what());
        }
        check(seconds_since(start) < 2 * 1.25 + 0.5, "one limit, not one for each group");
      },
      limit);
}

TEST_CASE("after one group's registration failed nobody enters that with the next", "[audience]") {
  const int failing = GENERATE(0, 3);
  const bool first = GENERATE(true, false);  // in tp, or in pp
  const auto start = Clock::now();
  run_ranks(
      4,
      [&](ControlPlane& world) {
        int entered_pp = 0;
        bool broken = true;
        auto state =
            two_by_two(world, {.register_segment = [&](ControlPlane& group, const auto& go_on) {
                         entered_pp += group.name().substr(0, 2) == "pp" ? 1 : 0;
                         // Fails on one rank before it meets the others, who go through.
                         if (broken && world.rank() / 2 == failing / 2 &&
                             group.name().substr(0, 2) == "tp" && first) {
                           if (world.rank() == failing) {
                             throw TransportError(kNoMemory);
                           }
                           return std::unique_ptr<Window>();
                         }
                         if (broken && world.rank() == failing && !first &&
                             group.name().substr(0, 2) == "pp") {
                           const auto unused = go_on();
                           throw TransportError(kNoMemory);
                         }
                         return go_on();
                       }});
        const auto both = state.audience({&state.tp(), &state.pp()});
        const auto reserve = [&] { both.arena->reserve(1 << 20); };
        if (world.rank() == failing) {
          try {
            reserve();
            check(false, "reserve throws");
          } catch (const TransportError& error) {
            check_equal(error.site().native_code, 2L, "the native code");
          }
        } else {
          check_blames(failing, reserve, "arena tp+pp", fmt::format("rank {} failed", failing),
                       "out of memory");
        }
        broken = false;
        check_equal(entered_pp, first ? 0 : 1, "registrations with pp");
        for (GroupCoordinator* group : state.groups()) {
          check(!group->control().poisoned(), group->name() + " works on");
        }
        check_works_on(state.tp());
        check_works_on(state.pp());
      },
      std::chrono::milliseconds(20'000));
  CHECK(seconds_since(start) < 15);
}

TEST_CASE("a registration that hangs does not hide why", "[audience]") {
  const auto limit = std::chrono::milliseconds(1000);
  run_ranks(
      4,
      [&](ControlPlane& world) {
        auto state =
            two_by_two(world, {.register_segment = [&](ControlPlane& group, const auto& go_on) {
                         if (group.name() != "tp[0]") {
                           return go_on();
                         }
                         if (group.rank() == 0) {
                           throw TransportError(kNoMemory);
                         }
                         std::this_thread::sleep_for(limit);
                         throw TimeoutError("ncclCommWindowRegister did not return", {});
                       }});
        const auto both = state.audience({&state.tp(), &state.pp()});
        world.barrier();
        const auto start = Clock::now();
        const auto reserve = [&] { both.arena->reserve(1 << 20); };
        if (world.rank() == 0) {
          check_throws<TransportError>(reserve, "code 2", "out of memory");
        } else if (world.rank() == 1) {
          check_throws<TimeoutError>(reserve, "did not return", "rank 0 failed", "out of memory");
        } else {
          check_throws<Error>(reserve, "did not return");
        }
        check(seconds_since(start) < 1.25 + 1, "within the limit");
      },
      limit);
}

TEST_CASE("a rank that is missing in one group's registration is named on all ranks",
          "[audience]") {
  const bool first = GENERATE(true, false);  // in tp[1], or in pp[1]
  const auto limit = std::chrono::milliseconds(1000);
  std::atomic<bool> over{false};
  std::atomic<int> came{0};
  run_ranks(
      4,
      [&](ControlPlane& world) {
        auto state =
            two_by_two(world, {.register_segment = [&](ControlPlane& group, const auto& go_on) {
                         const bool here = group.name() == (first ? "tp[1]" : "pp[1]");
                         const auto latest = Clock::now() + 5 * limit;
                         while (here && world.rank() == 3 && !over && Clock::now() < latest) {
                           std::this_thread::sleep_for(std::chrono::milliseconds(1));
                         }
                         return go_on();
                       }});
        const auto both = state.audience({&state.tp(), &state.pp()});
        world.barrier();
        const auto reserve = [&] { both.arena->reserve(1 << 20); };
        if (world.rank() == 3) {
          check_throws<TimeoutError>(reserve, "rank 1 did not arrive");
          return;
        }
        try {
          reserve();
          check(false, "a TimeoutError is thrown");
        } catch (const TimeoutError& error) {
          if (++came == 3) {
            over = true;
          }
          const bool waited = world.rank() == (first ? 2 : 1);  // it names it in its own numbers
          check(error.missing() == std::vector{waited ? 1 : 3}, error.what());
          check_throws<TimeoutError>([] { throw; }, "rank 1 did not arrive");
        }
      },
      limit);
}

TEST_CASE("an audience whose windows are not the same on all ranks is refused on all",
          "[audience]") {
  run_ranks(4, [](ControlPlane& world) {
    const HostOptions options{.machine = world.rank() == 3 ? "far" : "near"};
    auto state =
        make_state(world, {.tp = 2, .pp = 2, .dcp = 1}, {.backend = host_backend(options)});
    for (int round = 0; round < 2; ++round) {
      check_throws<SymmetryError>(
          [&] {
            (void)state.audience({&state.tp(), &state.pp()});
          },
          "audience of the groups tp+pp", "ranks disagree");
    }
    // What is the same on all ranks of the group around it is not refused.
    check((state.audience({&state.tp()}).arena != nullptr) == (world.rank() < 2), "tp[0]");
  });
}
