// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <mpi.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "cohort/cohort.hpp"
#include "cohort/cuda.hpp"
#include "cohort/mpi.hpp"
#include "cohort/system_calls.hpp"
#include "gpu/device_tensor.hpp"
#include "support/ranks.hpp"

// A state whose ranks are late, stopped, absent or make other calls: what the others learn, and
// that their processes go on. And captures that begin after eager work on other streams, in every
// mode.

using namespace cohort;
using namespace cohort::test;
using namespace std::chrono_literals;

namespace {

constexpr auto kLimit = 30s;

int ranks() { return world_size(); }
int rank() { return world_rank(); }

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

std::vector<int> everyone() {
  std::vector<int> all(static_cast<std::size_t>(ranks()));
  std::iota(all.begin(), all.end(), 0);
  return all;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

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
  if (rank() == ranks() - 1) {
    tp.all_gather_into(all.view(), x.view(), 0, fixture.a());
  } else {
    tp.all_reduce(x.view(), fixture.a());
  }
  try {
    tp.synchronize(fixture.a(), 10s);
    FAIL("expected a SymmetryError");
  } catch (const SymmetryError& error) {
    // One of two ranks names the other; those that are neither name both.
    const std::vector<int> named = error.ranks();
    CHECK((named.size() == 1 || named.size() == 2));
    CHECK(std::count(named.begin(), named.end(), rank()) == 0);
    CHECK(std::count(named.begin(), named.end(), ranks() - 1) == (rank() == ranks() - 1 ? 0 : 1));
    CHECK_THAT(std::string(error.what()), contains("all_gather"));
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

namespace {

/// A group whose calls NCCL carries, without windows: its symmetric kernels cannot be told to stop.
struct OverNccl {
  explicit OverNccl(ControlPlane& control)
      : backend(cuda_backend(
            {.environment = {.multicast = false}, .peer_mapping = false, .own_max_bytes = 0})),
        stream(make_stream(backend->device().index)),
        x(DType::f32, {kElements}, Layout::contiguous, backend->device()),
        state(std::make_unique<ParallelState>(
            ParallelState::create(control, {.layout = {.tp = ranks(), .pp = 1, .dcp = ranks()},
                                            .backend = backend,
                                            .symmetric = {.enabled = false}}))) {
    cuda_check(cudaSetDevice(backend->device().index), "cudaSetDevice");
  }

  [[nodiscard]] StreamRef ref() { return backend->stream(stream.get()); }
  [[nodiscard]] GroupCoordinator& group() { return state->tp(); }
  void fill() {
    x.fill([](std::int64_t i) { return static_cast<double>((i + rank()) % 7); });
  }
  [[nodiscard]] std::string difference() {
    return x.differs([](std::int64_t i) {
      double sum = 0;
      for (int r = 0; r < ranks(); ++r) {
        sum += static_cast<double>((i + r) % 7);
      }
      return sum;
    });
  }
  /// Once right, and with whatever NCCL connects in its first call.
  void warm_up() {
    fill();
    group().all_reduce(x.view(), ref());
    group().synchronize(ref(), kLimit);
    CHECK(difference() == "");
  }

  static constexpr std::int64_t kElements = 1 << 18;
  std::shared_ptr<CudaBackend> backend;
  UniqueStream stream;
  DeviceTensor x;
  std::unique_ptr<ParallelState> state;
};

/// Holds up what the stream gets next.
class Held {
 public:
  explicit Held(StreamRef stream) {
    stream.submit([release = release_] {
      while (!*release) {
        std::this_thread::sleep_for(1ms);
      }
    });
  }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  ~Held() { release(); }
  void release() { *release_ = true; }

 private:
  std::shared_ptr<std::atomic<bool>> release_ = std::make_shared<std::atomic<bool>>(false);
};

/// What `call` throws: it names a rank that gave up, and has its words.
template <class Call>
void check_told(const Call& call) {
  try {
    call();
    FAIL("expected what another rank said");
  } catch (const SymmetryError& error) {
    CHECK_THAT(std::string(error.what()), contains("gave up", "still busy"));
    CHECK(error.ranks().size() == 1);
    CHECK(std::count(error.ranks().begin(), error.ranks().end(), rank()) == 0);
  }
}

}  // namespace

TEST_CASE("a rank that is late for a call over NCCL is told that the others gave up",
          "[liveness]") {
  if (skip_all_if(ranks() < 2, "needs two ranks")) {
    return;
  }
  // Learns by synchronize; by a call behind CUDA's own means; by synchronize of a group beside.
  const auto chosen = GENERATE(table<bool, int>({{false, 0}, {true, 0}, {false, 1}, {true, 2}}));
  const bool captured = std::get<0>(chosen);
  const int way = std::get<1>(chosen);
  CAPTURE(captured, way);
  const auto control =
      world().subgroup(everyone(), 30 + static_cast<std::uint64_t>(way) * 2 + (captured ? 1U : 0U),
                       "late over NCCL");
  OverNccl it(*control);
  it.warm_up();
  std::unique_ptr<CapturedGraph> graph;
  if (captured) {
    graph = std::make_unique<CapturedGraph>(
        it.state->capture(it.ref(), [&] { it.group().all_reduce(it.x.view(), it.ref()); }));
  }
  const auto issue = [&] {
    captured ? graph->launch(it.ref()) : it.group().all_reduce(it.x.view(), it.ref());
  };
  it.fill();
  issue();
  it.group().synchronize(it.ref(), kLimit);
  CHECK(it.difference() == "");
  it.fill();
  world().barrier();
  if (rank() == ranks() - 1) {
    Held held(it.ref());
    issue();            // in time, but behind work that takes long
    world().barrier();  // the others' limit is over
    held.release();
    if (way == 0) {
      check_told([&] { it.group().synchronize(it.ref(), kLimit); });
    } else if (way == 1) {
      // Over NVLink the call ends, with undefined data; over sockets it may wait for good.
      const auto until = std::chrono::steady_clock::now() + 1s;
      while (cudaStreamQuery(it.stream.get()) == cudaErrorNotReady &&
             std::chrono::steady_clock::now() < until) {
        std::this_thread::sleep_for(1ms);
      }
      check_told(issue);
    } else {
      check_told([&] { it.state->dcp().synchronize(it.ref(), kLimit); });
      CHECK_THROWS_AS(it.group().synchronize(it.ref(), kLimit), Error);
    }
    CHECK(it.group().failed());
    if (captured) {  // the graph's other groups may have been told by now, too
      CHECK_THROWS_AS(issue(), Error);
    } else {
      CHECK_THROWS_AS(issue(), TransportError);
    }
  } else {
    issue();
    const auto start = std::chrono::steady_clock::now();
    CHECK_THROWS_AS(it.group().synchronize(it.ref(), 1s), TimeoutError);
    CHECK(seconds_since(start) < 5);
    CHECK(it.group().failed());
    world().barrier();
  }
  graph.reset();
  it.state.reset();
  world().barrier();
  CHECK(cudaDeviceSynchronize() == cudaSuccess);
}

TEST_CASE("who waits in a call over NCCL ends as soon as another rank gives up", "[liveness]") {
  if (skip_all_if(ranks() < 2, "needs two ranks")) {
    return;
  }
  const auto control = world().subgroup(everyone(), 40, "one gives up");
  OverNccl it(*control);
  it.warm_up();
  world().barrier();
  const auto start = std::chrono::steady_clock::now();
  if (rank() == ranks() - 1) {
    const Held held(it.ref());  // its own work, and no call
    CHECK_THROWS_AS(it.group().synchronize(it.ref(), 1s), TimeoutError);
  } else {
    it.group().all_reduce(it.x.view(), it.ref());
    check_told([&] { it.group().synchronize(it.ref(), 60s); });
    CHECK(cudaStreamQuery(it.stream.get()) == cudaSuccess);
  }
  CHECK(seconds_since(start) < 10);
  it.state.reset();
  world().barrier();
}

TEST_CASE("first calls over NCCL end at the limit where a rank does not come", "[liveness]") {
  if (skip_all_if(ranks() < 2, "needs two ranks")) {
    return;
  }
  const int kind = GENERATE(0, 1, 2);
  CAPTURE(kind);
  MpiControlPlane control(MPI_COMM_WORLD, 2s, "impatient");
  OverNccl it(control);
  auto out =
      DeviceTensor(DType::f32, {OverNccl::kElements}, Layout::contiguous, it.backend->device());
  const auto issue = [&] {
    if (kind == 0) {
      it.group().all_reduce(it.x.view(), it.ref());
    } else if (kind == 1) {
      it.group().all_to_all_into(out.view(), it.x.view(), it.ref());
    } else if (rank() == 0) {
      it.group().send(it.x.view(), ranks() - 1, it.ref());
    } else if (rank() == ranks() - 1) {
      it.group().recv(out.view(), 0, it.ref());
    }
  };
  world().barrier();
  const auto start = std::chrono::steady_clock::now();
  if (rank() == ranks() - 1) {
    world().barrier();                       // the others' limit is over
    CHECK_THROWS_AS(issue(), TimeoutError);  // theirs
  } else {
    if (kind < 2 || rank() == 0) {
      CHECK_THROWS_AS(issue(), TimeoutError);
      CHECK(it.group().failed());
    }
    CHECK(seconds_since(start) < 5);
    world().barrier();
  }
  it.state.reset();
  world().barrier();
}

TEST_CASE("a call of a new size over NCCL whose peer does not come is ended", "[liveness]") {
  if (skip_all_if(ranks() < 2, "needs two ranks")) {
    return;
  }
  const auto control = world().subgroup(everyone(), 60, "a new size");
  OverNccl it(*control);
  it.warm_up();
  auto large =
      DeviceTensor(DType::f32, {8 * OverNccl::kElements}, Layout::contiguous, it.backend->device());
  world().barrier();
  if (rank() != ranks() - 1) {
    CHECK_THROWS_AS(
        [&] {
          it.group().all_reduce(large.view(), it.ref());
          it.group().synchronize(it.ref(), 1s);
        }(),
        TimeoutError);
  }
  world().barrier();
  it.state.reset();
  CHECK(cudaDeviceSynchronize() == cudaSuccess);  // no kernel goes on
  world().barrier();
  const auto after = world().subgroup(everyone(), 61, "after a new size");
  OverNccl again(*after);
  again.warm_up();
  again.state->shutdown();
}

TEST_CASE("a first call over NCCL does not wait for what its stream has before it", "[liveness]") {
  if (skip_all_if(ranks() < 2, "needs two ranks")) {
    return;
  }
  MpiControlPlane control(MPI_COMM_WORLD, 2s, "long work");
  OverNccl it(control);
  auto all = DeviceTensor(DType::f32, {ranks() * OverNccl::kElements}, Layout::contiguous,
                          it.backend->device());
  it.warm_up();
  it.fill();
  Held held(it.ref());
  it.group().all_reduce(it.x.view(), it.ref());                      // known, behind long work
  it.group().all_gather_into(all.view(), it.x.view(), 0, it.ref());  // the first of its kind
  world().barrier();
  held.release();
  it.group().synchronize(it.ref(), kLimit);
  CHECK(it.difference() == "");
  it.state->shutdown();
}

TEST_CASE("a rank without descriptors says so, and all end at once", "[liveness]") {
  if (skip_all_if(ranks() < 2, "needs two ranks")) {
    return;
  }
  const auto first = world().subgroup(everyone(), 50, "without descriptors");
  const auto second = world().subgroup(everyone(), 51, "with them again");
  const auto before = world().subgroup(everyone(), 52, "before");
  const OverNccl it(*before);  // has started whatever starts once
  world().barrier();
  rlimit limits{};
  REQUIRE(::getrlimit(RLIMIT_NOFILE, &limits) == 0);
  if (rank() == ranks() - 1) {
    const UniqueFd lowest = os::open_file("/dev/null", O_RDONLY);
    rlimit none = limits;
    none.rlim_cur = static_cast<rlim_t>(lowest.get());
    REQUIRE(::setrlimit(RLIMIT_NOFILE, &none) == 0);
  }
  const auto start = std::chrono::steady_clock::now();
  try {
    OverNccl refused(*first);
    FAIL("expected an error");
  } catch (const SymmetryError& error) {
    CHECK(error.ranks() == std::vector<int>{ranks() - 1});
    CHECK_THAT(std::string(error.what()), contains("descriptors can be opened"));
  }
  CHECK(seconds_since(start) < 10);
  REQUIRE(::setrlimit(RLIMIT_NOFILE, &limits) == 0);
  OverNccl again(*second);
  again.warm_up();
  again.state->shutdown();
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
