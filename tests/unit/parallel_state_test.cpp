// SPDX-License-Identifier: Apache-2.0
#include "cohort/parallel_state.hpp"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cohort/host/host_backend.hpp>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <mutex>
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

TEST_CASE("each rank is in the groups that the layout says", "[state]") {
  run_ranks(8, [](ControlPlane& world) {
    auto state = make_state(world, {.tp = 4, .pp = 2, .dcp = 2});
    const int rank = world.rank();
    check(state.layout() == ParallelLayout{4, 2, 2}, "layout");
    check_equal(state.world().size(), 8, "world size");
    check_equal(state.tp().rank(), rank % 4, "tp rank");
    check_equal(state.pp().rank(), rank / 4, "pp rank");
    check_equal(state.dcp().rank(), rank % 2, "dcp rank");
    check(state.tp().name() == fmt::format("tp[{}]", rank / 4), state.tp().name());
    check(state.pp().name() == fmt::format("pp[{}]", rank % 4), state.pp().name());
    check(state.dcp().name() == fmt::format("dcp[{}]", rank / 2), state.dcp().name());
    check(state.pp().ranks() == std::vector{rank % 4, rank % 4 + 4}, "world ranks of pp");
    check(state.groups().size() == 4 && state.groups()[3] == &state.dcp(), "groups in order");
    check(state.dcp().decision().nccl_windows.on, "windows");
    check(!state.world().decision().nccl_windows.on, "the world was not selected");
    for (GroupCoordinator* group : state.groups()) {
      check_works_on(*group);
    }
    const auto x = state.world().backend().allocate({5}, DType::f32, {});
    fill(x, rank);
    state.tp().all_reduce(x);  // the ranks of one stage
    check_values(x, "tp", [&](std::int64_t flat) {
      std::int64_t sum = 0;
      for (int r = 0; r < 4; ++r) {
        sum += value_at(rank / 4 * 4 + r, flat);
      }
      return sum;
    });
  });
}

TEST_CASE("layouts and options that cannot work are refused", "[state]") {
  run_ranks(2, [](ControlPlane& world) {
    const auto create = [&](const ParallelLayout& layout) {
      return [&world, layout] {
        (void)ParallelState::create(world, {.layout = layout, .backend = host_backend()});
      };
    };
    check_throws<ConfigError>(create({.tp = 4}), "tp*pp=4", "the world has 2");
    check_throws<ConfigError>(create({.tp = 2, .pp = 1, .dcp = 3}), "multiple of dcp=3");
    check_throws<ConfigError>(create({.tp = 0}), "at least 1");
    check_throws<ConfigError>([&] { (void)ParallelState::create(world, {.layout = {.tp = 2}}); },
                              "ParallelOptions.backend", "null");
    create({.tp = 2})();
  });
}

TEST_CASE("two states over one world do not hear each other", "[state]") {
  run_ranks(2, [](ControlPlane& world) {
    auto a = make_state(world, {.tp = 2, .dcp = 2});
    auto b = make_state(world, {.tp = 2, .dcp = 2});
    a.dcp().reserve(1 << 20);
    if (world.rank() == 0) {  // more messages in one than in the other
      a.dcp().control().broadcast(Bytes(3), 0);
      b.dcp().control().broadcast(Bytes(4), 0);
    } else {
      check_equal(b.dcp().control().broadcast({}, 0).size(), std::size_t{4}, "of b");
      check_equal(a.dcp().control().broadcast({}, 0).size(), std::size_t{3}, "of a");
    }
    check_works_on(a.dcp());
    check_works_on(b.dcp());
  });
}

TEST_CASE("a state can be formed after one that failed", "[state]") {
  run_ranks(
      2,
      [](ControlPlane& world) {
        {
          auto state = make_state(world, {.tp = 2, .dcp = 2});
          world.barrier();
          if (world.rank() == 0) {
            check_throws<TimeoutError>(
                [&] { (void)state.dcp().arena()->empty({4}, DType::u8, {}); }, "rank 1");
            check_throws<TransportError>(
                [&] { (void)state.dcp().arena()->empty({4}, DType::u8, {}); }, "form a new group");
          } else {
            // Comes, but not within the limit: it hears of that and does not grow alone.
            std::this_thread::sleep_for(world.limit() + world.limit() / 2);
            check_throws<TimeoutError>(
                [&] { (void)state.dcp().arena()->empty({4}, DType::u8, {}); }, "rank 0 gave up",
                "rank 1 did not arrive");
          }
          state.shutdown();  // the other groups still work
        }
        auto state = make_state(world, {.tp = 2, .dcp = 2});
        check_works_on(state.dcp());
      },
      std::chrono::milliseconds(1500));
}

TEST_CASE("one wait of the state is for all its groups", "[state]") {
  run_ranks(2, [](ControlPlane& world) {
    auto state = make_state(world, {.tp = 2, .dcp = 1});
    HostStream stream;
    check_throws<UsageError>([&] { state.synchronize(stream, std::chrono::milliseconds(0)); },
                             "at least 1 ms");
    state.synchronize(stream, std::chrono::milliseconds::max());
    int done = 0;
    stream.ref().submit([&done] {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      done = 1;
    });
    state.synchronize(stream, std::chrono::seconds(20));
    check_equal(done, 1, "waited");
    check(!state.failed(), "failed");
  });
}

TEST_CASE("a state that ends without a shutdown refuses what needs it later, and ends no call",
          "[state]") {
  const bool mapped = GENERATE(true, false);
  ParallelOptions options{.layout = {.tp = 3}, .backend = host_backend({.map_peers = mapped})};
  std::atomic<bool> ended{false};
  run_ranks(3, [&](ControlPlane& world) {
    for (int round = 0; round < 30; ++round) {  // each leaves right behind its last call
      auto state = ParallelState::create(world, options);
      const auto x = state.tp().backend().allocate({5}, DType::f32, {});
      fill(x, world.rank());
      state.tp().all_reduce(x);
      state.world().control().barrier();
    }
    std::optional state(ParallelState::create(world, options));
    const auto x = state->tp().backend().allocate({5}, DType::f32, {});
    fill(x, 0);
    if (world.rank() == 2) {
      state.reset();
      ended = true;
    }
    while (!ended) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));  // behind the last look
    if (world.rank() == 0) {
      state->tp().send(x, 1);
      world.barrier();
      const auto start = Clock::now();
      check_throws<TransportError>([&] { state->tp().send(x, 2); }, "rank 2 has ");
      state->shutdown();  // behind a failure it waits for nobody
      check(Clock::now() - start < kRanksTimeLimit / 2, "before the limit");
    } else {
      if (world.rank() == 1) {
        state->tp().recv(x, 0);
      }
      world.barrier();
    }
    world.barrier();
  });
}

TEST_CASE("a state can be moved", "[state]") {
  run_ranks(2, [](ControlPlane& world) {
    HostStream stream;
    auto first = make_state(world, {.tp = 2, .dcp = 2});
    const auto x = first.world().backend().allocate({4}, DType::f32, {});
    auto graph = first.capture(stream, [&] { first.tp().all_reduce(x, stream); });
    const SymmetricArena* arena = first.audience({&first.tp(), &first.dcp()}).arena;
    auto state = std::move(first);
    check(state.audience({&state.tp(), &state.dcp()}).arena == arena, "the same arena");
    check_works_on(state.dcp());
    graph.launch(stream);
  });
}

TEST_CASE("after shutdown every call is refused", "[state]") {
  for (const int n : {1, 2}) {
    run_ranks(n, [](ControlPlane& world) {
      auto state = make_state(world, {.tp = world.size(), .dcp = world.size()});
      auto& dcp = state.dcp();
      Tensor kept = dcp.arena()->empty({4, 4}, DType::f32, {});
      fill(kept, 0);
      const TensorView x = kept;
      const auto both = state.audience({&state.tp(), &state.dcp()});
      state.shutdown();
      state.shutdown();  // again is allowed
      const auto refused = [](const std::function<void()>& call) {
        check_throws<UsageError>(call, "after shutdown");
      };
      refused([&] { dcp.all_reduce(x); });
      refused([&] { (void)dcp.all_gather(x, 0); });
      refused([&] { (void)dcp.reduce_scatter_along_dim(x, 0); });
      refused([&] { dcp.broadcast(x, 0); });
      refused([&] { (void)dcp.all_to_all(x); });
      refused([&] { dcp.send(x, 0); });
      refused([&] { dcp.recv(x, 0); });
      refused([&] { dcp.barrier(); });
      refused([&] { dcp.reserve(1); });
      refused([&] { dcp.freeze(); });
      refused([&] { dcp.synchronize({}, std::chrono::milliseconds(1)); });
      refused([&] { (void)dcp.path(Collective::all_gather, x, x); });
      refused([&] { (void)state.tp().gather_vocabulary(x, 4 * state.tp().size()); });
      refused([&] { state.pp().send_tensors({}); });
      refused([&] { (void)state.pp().recv_tensors(); });
      if (both.arena != nullptr) {
        refused([&] { (void)state.audience({&state.tp()}); });
        const SymmetricScope scope(both);
        check_throws<UsageError>([] { (void)empty({1}, DType::f32); }, "arena tp+dcp", "shut down");
      }
      check_throws<UsageError>([&] { state.reclaim_graphs(); }, "shut down");
      refused([&] { state.synchronize({}, std::chrono::milliseconds(1)); });
      check_values(kept, "a tensor stays readable",
                   [](std::int64_t flat) { return value_at(0, flat); });
    });
  }
}

TEST_CASE("tensors outlive their state", "[state]") {
  run_ranks(2, [](ControlPlane& world) {
    const auto backend = host_backend();
    std::vector<Tensor> kept;
    {
      auto state = make_state(world, {.tp = 2, .dcp = 2}, {.backend = backend});
      const SymmetricScope scope(state.audience({&state.tp(), &state.dcp()}));
      kept.push_back(empty({1000}, DType::f32));
      kept.push_back(state.dcp().arena()->empty({1000}, DType::f32, {}));
      fill(kept[0], 1);
      kept.push_back(state.dcp().all_gather(kept[0], 0));
      world.barrier();
    }
    for (const auto& tensor : kept) {
      fill(tensor, world.rank());
      check_values(tensor, "after the state",
                   [&](std::int64_t flat) { return value_at(world.rank(), flat); });
    }
  });
}

TEST_CASE("without symmetric memory everything works", "[state]") {
  run_ranks(2, [](ControlPlane& world) {
    auto state =
        ParallelState::create(world, {.layout = {.tp = 2, .dcp = 2}, .backend = host_backend()});
    const SymmetricScope scope(state.dcp());
    check(scope.is_null(), "null scope");
    check(state.audience({&state.dcp()}).arena == nullptr, "null audience");
    check(state.dcp().decision().peer_mapping.on, "the library's own mappings remain");
    check_works_on(state.dcp());
  });
}

TEST_CASE("a thousand rounds leave no mapping, no descriptor and no file", "[state]") {
  run_ranks(2, [](ControlPlane& world) { create_and_destroy(world, 3); });
  const auto before = Holdings::now();
  run_ranks(2, [](ControlPlane& world) { create_and_destroy(world, 1000); });
  const auto after = Holdings::now();
  CHECK(after.descriptors == before.descriptors);
  CHECK(after.files == before.files);
  CHECK(after.mappings == 0);
  CHECK(before.mappings == 0);
}

TEST_CASE("ranks that differ get errors that name them", "[divergence]") {
  for (const int n : {2, 3, 4}) {
    DYNAMIC_SECTION(n << " ranks") {
      run_ranks(n, check_other_size);
      run_ranks(n, check_other_order);
      run_ranks(n, check_other_releases);
      run_ranks(n, check_recovery);
      run_ranks(n, check_failed_allocation);
      run_ranks(n, check_other_options);
      run_ranks(n, [](ControlPlane& world) { check_other_call(world, false); });
      run_ranks(n, [](ControlPlane& world) { check_other_call(world, true); });
      run_ranks(n, check_other_merge);
      run_ranks(n, check_graphs_without_windows);
    }
  }
  run_ranks(3, check_other_query);
  run_ranks(4, check_failed_audience);
}

TEST_CASE("ranks that never come are named within the limit", "[divergence]") {
  for (const int n : {2, 3}) {
    DYNAMIC_SECTION(n << " ranks") {
      const std::chrono::milliseconds limit(1000);
      run_ranks(n, check_absent_from_growth, limit);
      run_ranks(n, check_absent_from_collective, limit);
      run_ranks(n, check_absent_from_shutdown, limit);
    }
  }
}

TEST_CASE("a state counts its calls, those of graphs at each launch, and writes them on demand",
          "[state]") {
  for (const bool mapped : {true, false}) {
    run_ranks(2, [mapped](ControlPlane& world) {
      auto state = make_state(world, {.tp = 2}, {.backend = host_backend({.map_peers = mapped})});
      auto& tp = state.tp();
      const Tensor x = tp.backend().allocate({16}, DType::f32, {});
      fill(x, world.rank());
      for (int round = 0; round < 3; ++round) {
        tp.all_reduce(x);
      }
      HostStream stream;
      stream.begin_capture();  // the engine's own
      const CaptureId id = stream.ref().capture_id();
      {
        const CaptureScope scope(state, stream);
        tp.all_reduce(x, stream);
        tp.barrier(stream);
      }
      const auto graph = stream.end_capture();
      for (int launch = 0; launch < 2; ++launch) {
        state.order(stream, id);
        graph->launch(stream);
        state.launched(stream);
      }
      const CallPath path = mapped ? CallPath::mapped : CallPath::exchange;
      check_equal(tp.counters(path).calls, std::uint64_t{7}, "calls");
      check_equal(tp.counters(path).bytes, std::uint64_t{5 * 64}, "bytes");
      check_throws<UsageError>([&] { (void)tp.counters(static_cast<CallPath>(77)); },
                               "counters path", "number 77");
      check_equal(state.dcp().counters(path).calls, std::uint64_t{0}, "calls of another group");
      const std::string line =
          fmt::format("cohort_calls_total{{group=\"tp[0]\",path=\"{}\"}} 7\n", to_string(path));
      check(state.counters_text().find(line) != std::string::npos, state.counters_text());
      const TraceProgress& progress = tp.recorder()->own().progress[0];
      check_equal(progress.issued, std::uint64_t{7}, "steps issued");
      check_equal(progress.left, std::uint64_t{7}, "steps that ended");
      check(progress.settled < 7, "nobody has waited for the last launch");
      state.synchronize(stream, std::chrono::seconds(10));
      check_equal(progress.settled, std::uint64_t{7}, "steps that were waited for");

      const std::string file = (std::filesystem::temp_directory_path() /
                                fmt::format("state-{}-{}.json", ::getpid(), world.rank()))
                                   .string();
      state.write_trace(file);
      std::ifstream in(file);
      const std::string text{std::istreambuf_iterator<char>(in), {}};
      std::filesystem::remove(file);
      const std::string group = R"({"name":"tp[0]","rank":)" + std::to_string(world.rank());
      const auto begin = text.find(group);
      check(begin != std::string::npos, "the group is there");
      const std::string rest = text.substr(begin, text.find(R"({"name":"pp)") - begin);
      check(rest.find(R"("launch")") != std::string::npos, "its launches are");
      check((rest.find(R"("own":false)") != std::string::npos) == mapped,
            "the other rank's calls are where they are mapped");
      world.barrier();
    });
  }
}
