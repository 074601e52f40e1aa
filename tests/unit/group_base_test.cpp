// SPDX-License-Identifier: Apache-2.0
#include "cohort/group_base.hpp"

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "support/catch.hpp"
#include "support/collective_checks.hpp"
#include "support/counting_driver.hpp"
#include "support/forked.hpp"
#include "support/stand_in_backend.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::test;

TEST_CASE("calls on several streams are ordered", "[group]") {
  run_ranks(2, [](ControlPlane& world) {
    auto state = make_state(world, {.tp = 2, .dcp = 2});
    HostStream a;
    HostStream b;
    Site site(state.dcp(), Memory::arena);
    const auto x = site.filled({100}, DType::f32);
    state.dcp().all_reduce(x, a);
    state.dcp().all_reduce(x, b);
    {
      HostStream short_lived;
      state.dcp().order(short_lived);
      state.dcp().barrier(short_lived);
      const Tensor t = state.dcp().all_gather(x, 0, short_lived);
    }
    state.dcp().order(a);
    const Tensor t = state.dcp().all_gather(x, 0, b);  // where one was that is gone with its stream
    check_values(x, "twice",
                 [](std::int64_t flat) { return 2 * (value_at(0, flat) + value_at(1, flat)); });
  });
}

TEST_CASE("a wait whose limit cannot be leaves the group as it is", "[group]") {
  run_ranks(2, [](ControlPlane& world) {
    auto state = make_state(world, {.tp = 2, .dcp = 2});
    HostStream stream;
    for (const auto limit : {std::chrono::milliseconds(0), std::chrono::milliseconds::min()}) {
      check_throws<UsageError>([&] { state.dcp().synchronize(stream, limit); }, "at least 1 ms");
      check_throws<UsageError>([&] { stream.ref().synchronize(limit); }, "at least 1 ms");
    }
    check(!state.dcp().failed(), "failed");
    state.dcp().synchronize(stream, std::chrono::milliseconds::max());
    stream.ref().synchronize(std::chrono::milliseconds::max());
  });
}

TEST_CASE("the transport learns what its device has refused, but of what a graph would hold",
          "[group]") {
  run_ranks(2, [](ControlPlane& world) {
    int refused = 0;
    bool grows = true;
    StandIns steps;
    steps.reduce_scatter = [](const ControlPlane&) { throw kNoMemory; };
    steps.synchronize = [](const ControlPlane&) { throw kNoMemory; };
    steps.refused = [&](const ControlPlane&) { ++refused; };
    steps.register_segment = [&](ControlPlane&, const auto& go_on) {
      return grows ? go_on() : throw kNoMemory;
    };
    auto state = make_state(world, {.tp = 2, .dcp = 2},
                            {.backend = std::make_shared<StandInBackend>(std::move(steps))});
    HostStream stream;
    auto& tp = state.dcp();
    Site site(tp, Memory::arena);
    const auto x = site.filled({64}, DType::f32);
    const auto scatter = [&] { static_cast<void>(tp.reduce_scatter_along_dim(x, 0, stream)); };
    check_throws<TransportError>(scatter, "out of memory");
    check(refused == 1, "an eager call");
    check_throws<TransportError>([&] { static_cast<void>(state.capture(stream, scatter)); },
                                 "out of memory");
    check(refused == 1, "a captured call");
    check_throws<TransportError>([&] { tp.synchronize(stream, std::chrono::seconds(1)); },
                                 "out of memory");
    check(refused == 2, "a wait");
    grows = false;  // on all ranks, which agree on that
    const Tensor large = state.backend().allocate({1 << 22}, DType::f32, {});
    check_throws<Error>([&] { static_cast<void>(tp.all_gather(large, 0, stream)); },
                        "out of memory");
    check(refused == 2, "memory that all were refused");
  });
}

TEST_CASE("a group's thread asks the others while theirs use and end them", "[group]") {
  run_ranks(2, [](ControlPlane& world) {
    std::atomic<int> asked{0};
    std::atomic<bool> ending{false};
    std::atomic<bool> ended{false};
    std::atomic<bool> asked_of_none{false};
    const auto is_dcp = [](const ControlPlane& group) { return group.name() == "dcp[0]"; };
    StandIns steps;
    steps.check = [&](const ControlPlane& group) {
      if (is_dcp(group)) {
        ++asked;
        if (ending) {
          std::this_thread::sleep_for(std::chrono::milliseconds(100));  // while the transport goes
        }
        asked_of_none = asked_of_none || ended;
      }
    };
    steps.end = [&](const ControlPlane& group) { ended = ended || is_dcp(group); };
    auto state = make_state(world, {.tp = 2, .dcp = 2},
                            {.backend = std::make_shared<StandInBackend>(std::move(steps))});
    const Tensor x = state.backend().allocate({64}, DType::f32, {});
    fill(x, 0);
    std::thread of_dcp([&] {
      HostStream stream;
      for (int i = 0; i < 200 || asked == 0; ++i) {
        if (i < 200) {
          state.dcp().all_reduce(x, stream);
          state.dcp().synchronize(stream, kRanksTimeLimit);
        }
      }
      ending = true;
      state.dcp().shutdown();
    });
    HostStream stream;
    while (!ended) {
      state.tp().synchronize(stream, kRanksTimeLimit);
    }
    of_dcp.join();
    check(!asked_of_none, "no transport is asked behind its end");
    const int before = asked;
    state.tp().synchronize(stream, kRanksTimeLimit);
    check_equal(asked.load(), before, "nor is a closed group");
  });
}

TEST_CASE("a forked child leaves a group that a thread of its parent's asks", "[group]") {
  run_ranks(2, [](ControlPlane& world) {
    std::atomic<bool> asking{false};
    std::atomic<bool> over{false};
    StandIns steps;
    steps.check = [&](const ControlPlane&) {
      asking = true;
      while (!over) {
        std::this_thread::yield();
      }
    };
    auto state = make_state(world, {.tp = 2, .dcp = 2},
                            {.backend = std::make_shared<StandInBackend>(std::move(steps))});
    std::thread of_tp([&] { state.tp().synchronize({}, kRanksTimeLimit); });
    while (!asking) {
      std::this_thread::yield();
    }
    std::string failure;
    try {
      run_in_child([&] {
        alarm(10);  // kills it where it waits
        for (GroupCoordinator* const group : state.groups()) {
          group->close();
        }
      });
    } catch (const std::exception& error) {
      failure = error.what();
    }
    over = true;
    of_tp.join();
    check(failure.empty(), failure);
  });
}

TEST_CASE("a call asks its stream once for its capture", "[group]") {
  run_ranks(2, [](ControlPlane& world) {
    auto state = make_state(world, {.tp = 2, .dcp = 2});
    auto& group = state.dcp();
    Site site(group, Memory::arena);
    const auto share = site.filled({4, 6}, DType::f32);
    const auto whole = site.filled({8, 6}, DType::f32);
    const auto weight = site.filled({6}, DType::f32);
    const auto residual = site.filled({4, 6}, DType::f32);
    CountingDriver driver;
    HostStream first;
    HostStream second;
    const StreamRef stream = driver.ref(first);
    const auto once = [&](const char* what, const std::function<void()>& call) {
      call();
      check_equal(driver.asked(), 1, what);
      check_equal(driver.waits(), 0, what);
    };
    once("all_gather_into", [&] { group.all_gather_into(whole, share, 0, stream); });
    once("all_gather", [&] { (void)group.all_gather(share, 1, stream); });
    once("reduce_scatter_into", [&] { group.reduce_scatter_into(share, whole, 0, stream); });
    once("reduce_scatter", [&] { (void)group.reduce_scatter_along_dim(whole, 1, stream); });
    once("all_reduce", [&] { group.all_reduce(share, stream); });
    once("all_reduce_rms_norm", [&] {
      (void)group.all_reduce_rms_norm(share, {.residual = residual, .weight = weight}, stream);
    });
    once("all_to_all", [&] { (void)group.all_to_all(whole, stream); });
    once("barrier", [&] { group.barrier(stream); });

    // On another stream the one before is asked as well, and waited for.
    group.all_reduce(share, driver.ref(second));
    check_equal(driver.asked(), 2, "both streams");
    check_equal(driver.waits(), 1, "the second stream waits");

    // Within a capture, calls on different streams are ordered, and the eager ones play no part.
    driver.begin_capture(first.ref().native());
    once("captured", [&] { group.all_reduce(share, stream); });
    second.ref().wait_for(first);
    group.all_reduce(share, driver.ref(second));
    check_equal(driver.asked(), 1, "captured on another stream");
    check_equal(driver.waits(), 1, "it waits within the capture");
    (void)driver.end_capture(first.ref().native());
  });
}
