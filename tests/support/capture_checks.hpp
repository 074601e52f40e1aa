// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cohort/cohort.hpp>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "support/collective_checks.hpp"
#include "support/decode_cases.hpp"
#include "support/group_tensors.hpp"

/// \file
/// Graphs over all groups of a state, as bodies that every rank runs.

namespace cohort::test {

inline std::int64_t sum_at(int n, int shift, std::int64_t flat) {
  std::int64_t sum = 0;
  for (int r = 0; r < n; ++r) {
    sum += value_at(r + shift, flat);
  }
  return sum;
}

/// A replay computes from what its inputs hold then, over several groups, with temporaries of the
/// graph, while eager calls come between.
inline void check_replays(ControlPlane& world) {
  auto state = make_state(world, {.tp = world.size(), .dcp = world.size()});
  auto& dcp = state.dcp();
  const int n = dcp.size();
  HostStream stream;
  Site site(dcp, Memory::ordinary);
  const auto in = site.tensor({6 * n, 700}, DType::f32);
  const auto out = site.tensor({6 * n, 700}, DType::f32);
  const auto gathered = site.tensor({6 * n, 700 * n}, DType::f32);
  dcp.reserve(8 << 20);
  state.tp().reserve(8 << 20);
  auto graph = state.capture(stream, [&] {
    const SymmetricScope scope(dcp, stream);
    const Tensor x = empty(in.shape(), DType::f32);
    dcp.backend().ops().copy(in, x, stream);
    dcp.all_reduce(x, stream);
    const Tensor part = dcp.reduce_scatter_along_dim(x, 0, stream);  // n times the sum
    const Tensor whole = dcp.all_gather(part, 0, stream);
    state.tp().all_gather_into(gathered, whole, 1, stream);
    state.tp().all_reduce_into(out, whole, stream, ReduceOp::max);
  });
  for (int replay = 0; replay < 4; ++replay) {
    fill(in, dcp.rank() + replay * 3);
    std::memset(out.data(), 0, out.bytes());
    std::memset(gathered.data(), 0, gathered.bytes());
    graph.launch(stream);
    const auto expected = [&](std::int64_t flat) { return n * sum_at(n, replay * 3, flat); };
    check_values(out, "replay", expected);
    check_values(gathered, "replay, gathered",
                 [&](std::int64_t flat) { return expected(flat / (700 * n) * 700 + flat % 700); });
    Site eager(dcp, Memory::arena, stream);
    check_all_reduce(dcp, eager, {300, 70}, DType::f32, Form::contiguous, ReduceOp::sum, stream);
    check_all_gather(state.tp(), eager, {30, 70}, 1, std::vector<std::int64_t>(u(n), 70),
                     DType::bf16, Form::sliced, stream);
  }
}

/// A whole decode step in a graph, every plan.
inline void check_captured_decode(ControlPlane& world) {
  const int n = world.size();
  for (const MergePlan plan : {MergePlan::staged, MergePlan::packed, MergePlan::one_kernel}) {
    auto state = decode_state(world, {.plan = plan});
    auto& dcp = state.dcp();
    HostStream stream;
    const DecodeCase c{
        .batch = 3, .heads = 2 * n, .dim = 48, .dtype = DType::bf16, .memory = Memory::ordinary};
    dcp.reserve_for({.batch = 3, .heads = 2 * n, .latent = 16, .rope = 8, .value = 48});
    Site site(dcp, Memory::ordinary);
    const Partial partial(dcp, site, c);
    const auto nope = site.filled({3, 2, 16}, DType::bf16);
    const auto pe = site.filled({3, 2, 8}, DType::bf16);
    const auto q = site.tensor({3, 2 * n, 24}, DType::bf16);
    auto graph = state.capture(stream, [&] {
      dcp.gather_query_into(q, nope, pe, stream);
      dcp.merge_attention_into({partial.merged, partial.merged_lse},
                               {partial.out, partial.lse, c.base}, stream);
    });
    for (int replay = 0; replay < 3; ++replay) {
      std::memset(q.data(), 0, q.bytes());
      std::memset(partial.merged.data(), 0, partial.merged.bytes());
      fill(nope, dcp.rank() + replay);
      graph.launch(stream);
      check_merged(dcp, c, partial.merged, &partial.merged_lse, false, "captured merge");
      check_values(q, "captured query", [&](std::int64_t flat) {
        const std::int64_t d = flat % 24;
        const std::int64_t h = flat / 24 % (2 * n);
        const std::int64_t row = flat / 24 / (2 * n) * 2 + h % 2;
        const auto r = static_cast<int>(h / 2);
        return d < 16 ? value_at(r + replay, row * 16 + d) : value_at(r, row * 8 + d - 16);
      });
    }
  }
}

/// The engine's own capture, and every way in which one may not go.
inline void check_capture_errors(ControlPlane& world) {
  auto state = make_state(world, {.tp = world.size(), .dcp = world.size()});
  auto& dcp = state.dcp();
  auto& arena = *dcp.arena();
  HostStream stream;
  dcp.reserve(1 << 20);
  const auto used = arena.statistics().used;
  const auto bytes = [&](std::int64_t count) { return arena.empty({count}, DType::u8, stream); };

  check_throws<UsageError>([&] { const CaptureScope scope(state, stream); }, "CaptureScope",
                           "not being captured");
  check_throws<UsageError>([&] { const CaptureScope scope(state, {}); }, "not being captured");
  check_throws<UsageError>([&] { (void)state.capture({}, [] {}); }, "capture stream");
  check_throws<UsageError>([&] { (void)state.capture(stream, {}); }, "capture record");
  stream.begin_capture();
  check_throws<UsageError>([&] { (void)bytes(10); }, "arena dcp[0]", "needs an open CaptureScope");
  {
    const CaptureScope scope(state, stream);
    check_throws<UsageError>([&] { const CaptureScope second(state, stream); },
                             "has a CaptureScope already");
    (void)bytes(1000);
    check_throws<UsageError>([&] { (void)bytes(8 << 20); }, "arena dcp[0] cannot grow",
                             "8388608 bytes are needed", "of 1048576 are free", "the peak so far");
  }
  stream.end_capture().reset();

  // A capture that throws is dropped.
  check_throws<std::logic_error>(
      [&] {
        (void)state.capture(stream, [&] {
          const Tensor x = bytes(1000);
          throw std::logic_error("the engine's own");
        });
      },
      "the engine's own");
  check_throws<UsageError>([&] { (void)state.capture(stream, [&] { (void)bytes(8 << 20); }); },
                           "cannot grow");
  check_equal(stream.ref().capture_id(), CaptureId{0}, "the stream is free");
  state.reclaim_graphs();
  check_equal(arena.statistics().used, used, "nothing is leased");
  Site site(dcp, Memory::arena, stream);
  check_all_reduce(dcp, site, {40, 7}, DType::f32, Form::contiguous, ReduceOp::sum, stream);
}

/// What graphs lease, and when it comes back.
inline void check_leases(ControlPlane& world) {
  auto state = make_state(world, {.tp = world.size(), .dcp = world.size()});
  auto& dcp = state.dcp();
  auto& arena = *dcp.arena();
  HostStream stream;
  dcp.reserve(16 << 20);
  const auto used = [&] { return arena.statistics().used; };
  const auto capture = [&](std::int64_t bytes, GraphPool* pool) {
    return std::make_unique<CapturedGraph>(state.capture(
        stream,
        [&] {
          for (int layer = 0; layer < 100; ++layer) {  // freed and reused from layer to layer
            const Tensor a = arena.empty({bytes}, DType::u8, stream);
            const Tensor b = arena.empty({bytes / 2}, DType::u8, stream);
          }
        },
        pool));
  };
  constexpr std::int64_t kMiB = 1 << 20;
  auto one = capture(kMiB, nullptr);
  const auto cost = used();
  check(cost >= 3 * kMiB / 2 && cost <= 2 * kMiB, fmt::format("one layer's bytes, not {}", cost));
  state.reclaim_graphs();
  check_equal(used(), cost, "a live graph keeps its lease");
  auto two = capture(kMiB, nullptr);
  check_equal(used(), 2 * cost, "graphs apart cost both");
  one.reset();
  check_equal(used(), 2 * cost, "nothing comes back by itself");
  state.reclaim_graphs();
  check_equal(used(), cost, "a destroyed graph's memory comes back");
  two.reset();
  state.reclaim_graphs();
  check_equal(used(), std::uint64_t{0}, "all of it");

  std::vector<std::unique_ptr<CapturedGraph>> graphs;
  {
    GraphPool pool;
    for (const std::int64_t size : {4, 1, 3, 2, 4}) {
      graphs.push_back(capture(size * kMiB, &pool));
    }
    check(used() <= 7 * kMiB, fmt::format("a pool costs its largest graph, not {}", used()));
    state.reclaim_graphs();
    check(used() >= 6 * kMiB, "live graphs keep the pool's memory");
  }
  graphs.resize(1);
  state.reclaim_graphs();
  check(used() >= 6 * kMiB, "the last graph keeps it as well");
  graphs.clear();
  state.reclaim_graphs();
  check_equal(used(), std::uint64_t{0}, "pool and graphs are gone");

  // A tensor keeps its graph's part as long as it lives; growth reclaims by itself.
  Tensor kept;
  auto graph = std::make_unique<CapturedGraph>(
      state.capture(stream, [&] { kept = arena.empty({100}, DType::u8, stream); }));
  graph.reset();
  state.reclaim_graphs();
  check(used() > 0, "the tensor is live");
  std::memset(kept.data(), 1, 100);
  kept.reset();
  const auto segments = arena.statistics().segments;
  const Tensor all = arena.empty({16 << 20}, DType::u8, stream);
  check_equal(arena.statistics().segments, segments, "reclaimed instead of grown");
}

/// Calls with results that were reserved for live at once, in any order, whatever was released.
inline void check_reserved_calls(ControlPlane& world) {
  const int n = world.size();
  for (unsigned seed = 1; seed <= 25; ++seed) {
    std::mt19937 random(seed);
    const auto up_to = [&](unsigned most) { return static_cast<std::int64_t>(random() % most); };
    auto state = make_state(world, {.tp = n, .dcp = n}, {.arena = {.growth_bytes = 4096}});
    auto& group = state.tp();
    std::vector<CollectiveShape> calls;
    for (int i = 0; i < 6; ++i) {
      calls.push_back({.collective = std::array{Collective::all_gather, Collective::reduce_scatter,
                                                Collective::all_to_all}[random() % 3],
                       .shape = {n * (1 + up_to(20)), 1 + up_to(3000)}});
    }
    group.reserve_for_calls(calls);
    group.freeze();
    const auto segments = group.arena()->statistics().segments;
    const Tensor memory = state.backend().allocate({20 * n * 3000}, DType::f32, {});
    std::memset(memory.data(), 0, memory.bytes());
    HostStream stream;
    std::vector<Tensor> eager;
    std::vector<Tensor> captured;
    const auto pass = [&](std::vector<Tensor>& results) {
      results.clear();
      std::shuffle(calls.begin(), calls.end(), random);
      for (const auto& call : calls) {
        Dims shape = call.shape;  // up to what was reserved
        shape[1] = 1 + up_to(static_cast<unsigned>(shape[1]));
        const TensorView x(memory.data(), DType::f32, shape);
        switch (call.collective) {
          case Collective::all_gather:
            results.push_back(group.all_gather(x, 0, stream));
            break;
          case Collective::reduce_scatter:
            results.push_back(group.reduce_scatter_along_dim(x, 0, stream));
            break;
          default:
            results.push_back(group.all_to_all(x, stream));
        }
        if (random() % 3 == 0) {
          results.erase(results.begin() + up_to(static_cast<unsigned>(results.size())));
        }
      }
      std::shuffle(results.begin(), results.end(), random);
    };
    GraphPool pool;
    std::vector<CapturedGraph> graphs;
    for (int step = 0; step < 8; ++step) {
      if (random() % 3 != 0) {
        pass(eager);
      }
      graphs.push_back(state.capture(
          stream, [&] { pass(captured); }, &pool));
    }
    check_equal(group.arena()->statistics().segments, segments, "segments");
  }
}

/// A stream that joins the capture, and what was used on it before.
inline void check_two_captured_streams(ControlPlane& world) {
  auto state = make_state(world, {.tp = world.size(), .dcp = world.size()});
  auto& dcp = state.dcp();
  auto& arena = *dcp.arena();
  HostStream main;
  HostStream side;
  dcp.reserve(1 << 20);
  arena.empty({1 << 20}, DType::u8, side).reset();  // all of the arena was used on `side`
  Site site(dcp, Memory::ordinary);
  const auto x = site.tensor({300}, DType::f32);
  const auto y = site.tensor({300}, DType::f32);
  auto graph = state.capture(main, [&] {
    side.ref().wait_for(main);
    Tensor a = arena.empty({300}, DType::f32, main);
    a.record_stream(side);
    dcp.all_reduce_into(a, x, side, ReduceOp::sum);
    dcp.all_reduce_into(y, a, main, ReduceOp::max);  // the library orders the group's calls
    a.reset();
    const Tensor again = arena.empty({300}, DType::f32, main);
    main.ref().wait_for(side);
  });
  for (int replay = 0; replay < 2; ++replay) {
    fill(x, dcp.rank() + replay);
    graph.launch(main);
    check_values(y, "two streams",
                 [&](std::int64_t flat) { return sum_at(dcp.size(), replay, flat); });
  }
}

/// Graphs that outlive their groups say so.
inline void check_launch_after_shutdown(ControlPlane& world) {
  HostStream stream;
  std::vector<CapturedGraph> graphs;
  std::vector<std::unique_ptr<ExecutableGraph>> own;  // the engine's, which no group knows of
  const std::int64_t n = world.size();
  std::vector<float> x(u(2 * n * 8), 1.0F);
  std::vector<float> lse(u(2 * n), 0.0F);
  const TensorView view(x.data(), DType::f32, {2, n, 8});
  const TensorView view_of_lse(lse.data(), DType::f32, {2, n});
  int ran = 0;
  const auto refused = [&] {
    for (const auto& graph : own) {
      check_throws<UsageError>([&] { graph->launch(stream); }, "dcp[0]", "after shutdown");
    }
    check_equal(ran, 0, "work before a refused call");
  };
  {
    auto state = decode_state(world, {.plan = MergePlan::packed});
    auto& dcp = state.dcp();
    dcp.reserve(1 << 20);
    const auto capture = [&](const std::function<void()>& record) {
      stream.begin_capture();
      {
        const CaptureScope scope(state, stream);
        stream.submit([&] { ++ran; });
        record();
      }
      own.push_back(stream.end_capture());
    };
    graphs.push_back(state.capture(stream, [&] { dcp.all_reduce(view, stream); }));
    graphs.back().launch(stream);
    capture([&] { dcp.all_reduce(view, stream); });
    capture([&] { (void)dcp.all_gather(view, 0, stream); });
    capture([&] { (void)dcp.merge_attention(view, view_of_lse, LseBase::e, stream); });
    capture([&] { (void)dcp.gather_query(view, view, stream); });
    capture([&] { dcp.barrier(stream); });
    for (const auto& graph : own) {
      state.order(stream);
      graph->launch(stream);
      state.launched(stream);
    }
    check_equal(std::exchange(ran, 0), static_cast<int>(own.size()), "launches while it is up");
    world.barrier();
    state.shutdown();
    check_throws<UsageError>([&] { graphs.back().launch(stream); }, "after shutdown");
    check_throws<UsageError>([&] { state.order(stream); }, "after shutdown");
    refused();
    check_throws<UsageError>([&] { (void)state.capture(stream, [] {}); }, "shut down");
  }
  check_throws<UsageError>([&] { graphs.back().launch(stream); }, "ParallelState", "destroyed");
  refused();
}

/// An engine's own work in a graph may use what the graph leases, whatever has become of the state.
inline void check_lease_after_state(ControlPlane& world) {
  HostStream stream;
  std::unique_ptr<ExecutableGraph> graph;
  int sum = 0;
  {
    auto state = make_state(world, {.tp = world.size(), .dcp = world.size()});
    state.dcp().reserve(1 << 20);
    stream.begin_capture();
    {
      const CaptureScope scope(state, stream);
      const Tensor x = state.dcp().arena()->empty({100'000}, DType::u8, stream);
      stream.submit([&sum, data = x.data_as<std::uint8_t>()] {
        std::memset(data, 3, 100'000);
        sum += data[0] + data[99'999];
      });
    }
    graph = stream.end_capture();
    state.shutdown();
    graph->launch(stream);
  }
  graph->launch(stream);
  check_equal(sum, 12, "two launches");
}

}  // namespace cohort::test
