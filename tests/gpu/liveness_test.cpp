// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cohort/cohort.hpp"
#include "cohort/cuda.hpp"
#include "cohort/cuda/device_drain.hpp"
#include "cohort/mpi.hpp"
#include "gpu/device_tensor.hpp"
#include "gpu/world_ranks.hpp"
#include "support/ranks.hpp"
#include "support/threads.hpp"

// A state whose ranks are late, stopped, absent or make other calls: what the others learn, and
// that their processes go on. And captures that begin after eager work on other streams, in every
// mode.

using namespace cohort;
using namespace cohort::test;
using namespace std::chrono_literals;

namespace {

constexpr auto kLimit = 30s;

/// A backend, a state of one group of all ranks, and two streams.
struct Fixture {
  explicit Fixture(std::chrono::milliseconds kernel_limit = 60s, ControlPlane& control = world())
      : backend(cuda_backend({.environment = {.multicast = false}, .kernel_limit = kernel_limit})),
        first(make_stream(backend->device().index)),
        second(make_stream(backend->device().index)),
        state(std::make_unique<ParallelState>(ParallelState::create(
            control, {.layout = {.tp = ranks(), .pp = 1, .dcp = ranks()}, .backend = backend}))) {
    cuda_check(cudaSetDevice(backend->device().index),
               "cudaSetDevice");  // for the test's own calls
  }

  [[nodiscard]] StreamRef a() { return backend->stream(first.get()); }
  [[nodiscard]] StreamRef b() { return backend->stream(second.get()); }
  [[nodiscard]] bool has_own_kernels() { return state->dcp().decision().peer_mapping.on; }
  [[nodiscard]] DeviceTensor tensor(std::int64_t elements) {
    return {DType::f32, {elements}, Layout::contiguous, backend->device()};
  }

  /// An all-reduce whose sum is right.
  void check_sum(StreamRef stream, std::int64_t elements = 1000) {
    auto x = tensor(elements);
    x.fill([](std::int64_t i) { return static_cast<double>((i + rank()) % 7); });
    state->tp().all_reduce(x.view(), stream);
    state->tp().synchronize(stream, kLimit);
    CHECK(x.differs([](std::int64_t i) {
      double sum = 0;
      for (int r = 0; r < ranks(); ++r) {
        sum += static_cast<double>((i + r) % 7);
      }
      return sum;
    }) == "");
  }

  std::shared_ptr<CudaBackend> backend;
  UniqueStream first;
  UniqueStream second;
  std::unique_ptr<ParallelState> state;
};

}  // namespace

TEST_CASE("a rank that never comes is named at the caller's limit, and a new state forms",
          "[liveness]") {
  if (skip_all_if(ranks() < 2, "needs two ranks")) {
    return;
  }
  const int absent = ranks() - 1;
  const auto first_world = world().subgroup(everyone(), 11, "first");
  {
    Fixture fixture(60s, *first_world);
    if (skip_all_if(!fixture.has_own_kernels(), "needs own kernels")) {
      return;
    }
    fixture.check_sum(fixture.a());
    CHECK_FALSE(fixture.state->tp().failed());
    auto x = fixture.tensor(1000);
    if (rank() != absent) {
      fixture.state->tp().all_reduce(x.view(), fixture.a());
      const auto start = std::chrono::steady_clock::now();
      try {
        fixture.state->tp().synchronize(fixture.a(), 1s);
        FAIL("expected a TimeoutError");
      } catch (const TimeoutError& error) {
        CHECK(error.missing() == std::vector<int>{absent});
      }
      CHECK(seconds_since(start) < 4);
      CHECK(fixture.state->tp().failed());
      CHECK_THROWS_AS(fixture.state->tp().all_reduce(x.view(), fixture.a()), TransportError);
      CHECK(cudaDeviceSynchronize() == cudaSuccess);
    }
    const auto start = std::chrono::steady_clock::now();
    fixture.state.reset();
    CHECK(seconds_since(start) < 15);
  }
  world().barrier();
  CHECK(cudaDeviceSynchronize() == cudaSuccess);
  const auto second_world = world().subgroup(everyone(), 12, "second");
  Fixture again(60s, *second_world);
  again.check_sum(again.a());
}

TEST_CASE("a call that hears that its group has failed ends what was enqueued before",
          "[liveness]") {
  if (skip_all_if(ranks() < 2, "needs two ranks")) {
    return;
  }
  const auto own_world = world().subgroup(everyone(), 20, "told in a call");
  {
    Fixture fixture(60s, *own_world);
    if (skip_all_if(!fixture.has_own_kernels(), "needs own kernels")) {
      return;
    }
    fixture.check_sum(fixture.a());
    auto& group = fixture.state->tp();
    auto x = fixture.tensor(1000);
    auto y = fixture.tensor(1000);
    const bool gives_up = rank() == ranks() - 1;
    if (!gives_up) {
      group.all_reduce(x.view(), fixture.a());
    }
    world().barrier();
    if (gives_up) {
      group.control().give_up("no more of this");
    }
    world().barrier();
    if (!gives_up) {
      const auto start = std::chrono::steady_clock::now();
      std::string heard;
      while (heard.empty() && seconds_since(start) < 10) {
        try {
          group.all_reduce(y.view(), fixture.b());
          std::this_thread::sleep_for(5ms);
        } catch (const Error& error) {
          heard = error.what();
        }
      }
      CHECK_THAT(heard, contains("no more of this"));
      CHECK(device_idle_within(fixture.backend->device().index, 10s));
      try {  // what its kernels missed behind that is no cause
        group.synchronize(fixture.a(), kLimit);
        FAIL("expected what the other rank said");
      } catch (const Error& error) {
        CHECK_THAT(std::string(error.what()), contains("no more of this"));
      }
    }
    world().barrier();
  }
  const auto next_world = world().subgroup(everyone(), 21, "behind it");
  Fixture again(60s, *next_world);
  again.check_sum(again.a());
}

TEST_CASE("a state that goes while its calls wait leaves the device alone", "[liveness]") {
  if (skip_all_if(ranks() < 2, "needs two ranks")) {
    return;
  }
  const auto first_world = world().subgroup(everyone(), 13, "third");
  {
    Fixture fixture(60s, *first_world);
    fixture.check_sum(fixture.a());
    auto x = fixture.tensor(1000);
    if (rank() == 0) {
      fixture.state->tp().all_reduce(x.view(), fixture.a());  // nobody else comes
    }
    const auto start = std::chrono::steady_clock::now();
    fixture.state.reset();
    CHECK(seconds_since(start) < 25);
    CHECK(cudaDeviceSynchronize() == cudaSuccess);
  }
  world().barrier();
  const auto second_world = world().subgroup(everyone(), 14, "fourth");
  Fixture again(60s, *second_world);
  again.check_sum(again.a());
}

TEST_CASE("ranks that make different calls are told which", "[liveness]") {
  if (skip_all_if(ranks() < 2, "needs two ranks")) {
    return;
  }
  const auto own_world = world().subgroup(everyone(), 15, "fifth");
  Fixture fixture(20s, *own_world);
  if (skip_all_if(!fixture.has_own_kernels(), "needs own kernels")) {
    return;
  }
  fixture.check_sum(fixture.a());
  auto x = fixture.tensor(1024);
  auto all = fixture.tensor(1024 * ranks());
  auto& tp = fixture.state->tp();
  try {  // who comes late may be told in the call
    if (rank() == ranks() - 1) {
      tp.all_gather_into(all.view(), x.view(), 0, fixture.a());
    } else {
      tp.all_reduce(x.view(), fixture.a());
    }
    tp.synchronize(fixture.a(), 10s);
    FAIL("expected a SymmetryError");
  } catch (const SymmetryError& error) {
    // A pair that was found, of which the last is always one.
    const std::vector<int> named = error.ranks();
    REQUIRE(named.size() == 2);
    CHECK(named[0] < named[1]);
    CHECK(named[1] == ranks() - 1);
    CHECK_THAT(std::string(error.what()),
               contains("rank " + std::to_string(named[0]) + " made all_reduce, and rank " +
                        std::to_string(named[1]) + " all_gather"));
  }
  fixture.state.reset();
}

TEST_CASE("a failure in a graph's inbox ends calls in a larger one", "[liveness]") {
  if (skip_all_if(ranks() < 2, "needs two ranks")) {
    return;
  }
  const int absent = ranks() - 1;
  const auto own_world = world().subgroup(everyone(), 16, "sixth");
  Fixture fixture(60s, *own_world);
  if (skip_all_if(!fixture.has_own_kernels(), "needs own kernels")) {
    return;
  }
  auto& dcp = fixture.state->dcp();
  auto x = fixture.tensor(1000);
  auto graph = fixture.state->capture(fixture.a(), [&] { dcp.all_reduce(x.view(), fixture.a()); });
  graph.launch(fixture.a());
  dcp.synchronize(fixture.a(), kLimit);
  dcp.reserve_for({.batch = 512, .heads = 128, .latent = 512, .rope = 64, .value = 512});
  dcp.all_reduce(x.view(), fixture.a());  // in the larger inbox
  dcp.synchronize(fixture.a(), kLimit);
  world().barrier();
  if (rank() != absent) {
    graph.launch(fixture.a());
    try {
      dcp.synchronize(fixture.a(), 1s);
      FAIL("expected a TimeoutError");
    } catch (const TimeoutError& error) {
      CHECK(error.missing() == std::vector<int>{absent});
    }
    CHECK_THROWS_AS(dcp.all_reduce(x.view(), fixture.a()), TransportError);
    world().barrier();
  } else {
    world().barrier();  // the others have given up, which nobody has told this rank's host
    const auto start = std::chrono::steady_clock::now();
    try {
      dcp.all_reduce(x.view(), fixture.a());
      dcp.synchronize(fixture.a(), 20s);
      FAIL("expected an error");
    } catch (const Error&) {
    }
    CHECK(seconds_since(start) < 1);
  }
  world().barrier();
  CHECK(cudaDeviceSynchronize() == cudaSuccess);
}

/// Calls in the body of a conditional node, as engines with loops on the device capture them.
TEST_CASE("calls are captured into the body of a conditional node", "[liveness]") {
#if CUDART_VERSION >= 12040
  Fixture fixture;
  auto& tp = fixture.state->tp();
  auto x = fixture.tensor(1000);
  x.fill([](std::int64_t i) { return static_cast<double>(i % 7 + rank()); });
  cudaGraph_t made = nullptr;
  cuda_check(cudaGraphCreate(&made, 0), "cudaGraphCreate");
  UniqueGraph graph(made);
  cudaGraphConditionalHandle handle{};
  cuda_check(cudaGraphConditionalHandleCreate(&handle, made, 1, cudaGraphCondAssignDefault),
             "cudaGraphConditionalHandleCreate");
  cudaGraphNodeParams params{};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.handle = handle;
  params.conditional.type = cudaGraphCondTypeIf;
  params.conditional.size = 1;
  cudaGraphNode_t node = nullptr;
#if CUDART_VERSION >= 13000
  cuda_check(cudaGraphAddNode(&node, made, nullptr, nullptr, 0, &params), "cudaGraphAddNode");
#else
  cuda_check(cudaGraphAddNode(&node, made, nullptr, 0, &params), "cudaGraphAddNode");
#endif
  cuda_check(cudaStreamBeginCaptureToGraph(fixture.first.get(), params.conditional.phGraph_out[0],
                                           nullptr, nullptr, 0, cudaStreamCaptureModeThreadLocal),
             "cudaStreamBeginCaptureToGraph");
  std::string error;
  try {
    const CaptureScope scope(fixture.state->captures(), fixture.a());
    tp.all_reduce(x.view(), fixture.a());
  } catch (const Error& refused) {
    error = refused.what();
  }
  cudaGraph_t body = nullptr;  // ended in any case: what follows is no part of it
  const cudaError_t ended = cudaStreamEndCapture(fixture.first.get(), &body);
  REQUIRE(error == "");
  cuda_check(ended, "cudaStreamEndCapture");
  {
    CudaExecutableGraph executable(fixture.backend->device().index, std::move(graph));
    tp.order(fixture.a());
    executable.launch(fixture.a());
    tp.synchronize(fixture.a(), kLimit);
  }
  CHECK(x.differs([](std::int64_t i) {
    return static_cast<double>(ranks() * (i % 7) + ranks() * (ranks() - 1) / 2);
  }) == "");
#else
  skip_all_if(true, "conditional nodes are new in CUDA 12.4");
#endif
}

TEST_CASE("a rank that is stopped for seconds comes back right", "[liveness]") {
  if (skip_all_if(ranks() < 2, "needs two ranks")) {
    return;
  }
  Fixture fixture;
  const auto pids = cohort::detail::gather_values(world(), static_cast<std::int64_t>(::getpid()));
  fixture.check_sum(fixture.a());
  std::thread waker;
  if (rank() == 0) {
    const auto pid = static_cast<pid_t>(pids.back());
    REQUIRE(::kill(pid, SIGSTOP) == 0);
    waker = std::thread([pid] {
      std::this_thread::sleep_for(5s);
      ::kill(pid, SIGCONT);
    });
  }
  for (int i = 0; i < 20; ++i) {
    fixture.check_sum(fixture.a());
    fixture.check_sum(fixture.a(), 3 << 20);  // over NCCL
  }
  if (waker.joinable()) {
    waker.join();
  }
}

TEST_CASE("lanes of a group need no order among each other", "[liveness]") {
  if (skip_all_if(ranks() < 2, "needs two ranks")) {
    return;
  }
  Fixture fixture;
  if (skip_all_if(!fixture.has_own_kernels(), "needs own kernels")) {
    return;
  }
  auto& tp = fixture.state->tp();
  CHECK_THROWS_AS(tp.use_lane(1), UsageError);
  tp.reserve_lanes(2);
  auto x = fixture.tensor(1000);
  auto y = fixture.tensor(1000);
  // Lane 0 waits on one rank, and lane 1 on the other, until both have been enqueued everywhere.
  for (int round = 0; round < 50; ++round) {
    x.fill([&](std::int64_t i) { return static_cast<double>(i % 5 + rank() + round); });
    y.fill([&](std::int64_t i) { return static_cast<double>(i % 3 + rank() * 2 + round); });
    for (int turn = 0; turn < 2; ++turn) {
      const int lane = (turn + rank()) % 2;
      tp.use_lane(lane);
      tp.all_reduce((lane == 0 ? x : y).view(), lane == 0 ? fixture.a() : fixture.b());
      if (turn == 0) {
        std::this_thread::sleep_for(1ms);
      }
    }
    tp.synchronize(fixture.a(), kLimit);
    tp.synchronize(fixture.b(), kLimit);
    const int n = ranks();
    CHECK(x.differs([&](std::int64_t i) {
      return static_cast<double>(n * (i % 5 + round) + n * (n - 1) / 2);
    }) == "");
    CHECK(y.differs([&](std::int64_t i) {
      return static_cast<double>(n * (i % 3 + round) + n * (n - 1));
    }) == "");
  }
  tp.use_lane(0);
  tp.limit_blocks(4);
  fixture.check_sum(fixture.a(), 100'000);
  tp.limit_blocks(0);
}

TEST_CASE("captures of every mode may follow eager work on other streams", "[liveness]") {
  Fixture fixture;
  auto& tp = fixture.state->tp();
  auto x = fixture.tensor(4096);
  auto out = fixture.tensor(4096 * ranks());
  const auto step = [&](StreamRef stream) {
    const Tensor gathered = tp.all_gather(x.view(), 0, stream);
    fixture.backend->ops().copy(gathered, out.view(), stream);
  };
  const auto check = [&](StreamRef stream) {
    tp.synchronize(stream, kLimit);
    CHECK(out.differs(
              [](std::int64_t i) { return static_cast<double>(i % 4096 % 11 + i / 4096); }) == "");
    out.fill([](std::int64_t) { return -1.0; });
  };
  x.fill([](std::int64_t i) { return static_cast<double>(i % 11 + rank()); });
  for (const auto mode : {cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal,
                          cudaStreamCaptureModeRelaxed}) {
    for (const StreamRef eager : {fixture.backend->stream(nullptr), fixture.b(), fixture.a()}) {
      step(eager);  // warm-up, as engines do, its temporaries still in flight
      step(eager);
      if (eager == fixture.backend->stream(nullptr)) {
        tp.synchronize(eager, kLimit);  // CUDA lets no capture begin that it would have to join
      }
      cuda_check(cudaStreamBeginCapture(fixture.first.get(), mode), "cudaStreamBeginCapture");
      {
        const CaptureScope scope(fixture.state->captures(), fixture.a());
        step(fixture.a());
      }
      cudaGraph_t captured = nullptr;
      cuda_check(cudaStreamEndCapture(fixture.first.get(), &captured), "cudaStreamEndCapture");
      check(eager);
      {
        CudaExecutableGraph graph(fixture.backend->device().index, UniqueGraph(captured));
        tp.order(fixture.a());
        graph.launch(fixture.a());
        graph.launch(fixture.a());
        check(fixture.a());
      }
      fixture.state->reclaim_graphs();
    }
  }
}
