// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <mpi.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <tuple>

#include "cohort/cohort.hpp"
#include "cohort/cuda.hpp"
#include "cohort/cuda/device_drain.hpp"
#include "cohort/mpi.hpp"
#include "cohort/system_calls.hpp"
#include "gpu/device_tensor.hpp"
#include "gpu/world_ranks.hpp"
#include "support/ranks.hpp"
#include "support/threads.hpp"

// What ranks learn of each other where NCCL carries their calls.

using namespace cohort;
using namespace cohort::test;
using namespace std::chrono_literals;

namespace {

constexpr auto kLimit = 30s;

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

/// What `call` throws: what the rank that gave up threw, with its words. NCCL does not say for whom
/// it waits, and all of them live.
template <class Call>
void check_told(const Call& call) {
  try {
    call();
    FAIL("expected what another rank said");
  } catch (const TimeoutError& error) {
    CHECK_THAT(std::string(error.what()), contains("gave up", "still busy"));
    CHECK(error.missing().empty());
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
      CHECK(device_idle_within(it.backend->device().index, 10s));  // nothing waits any more
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

TEST_CASE("a group that ends with the wait of another on its card says why", "[liveness]") {
  if (skip_all_if(ranks() < 2, "needs two ranks")) {
    return;
  }
  const auto control = world().subgroup(everyone(), 41, "one behind the other");
  OverNccl it(*control);
  it.warm_up();
  GroupCoordinator& first = it.state->dcp();
  first.all_reduce(it.x.view(), it.ref());
  first.synchronize(it.ref(), kLimit);
  world().barrier();
  if (rank() != ranks() - 1) {
    first.all_reduce(it.x.view(), it.ref());  // what the other group's call waits behind
    it.group().all_reduce(it.x.view(), it.ref());
    CHECK_THROWS_AS(it.group().synchronize(it.ref(), 1s), TimeoutError);
    CHECK(cudaStreamQuery(it.stream.get()) == cudaSuccess);
    try {
      first.all_reduce(it.x.view(), it.ref());
      FAIL("expected why the group has ended");
    } catch (const Error& error) {
      CHECK_THAT(std::string(error.what()),
                 contains(it.group().name(), "still busy after 1000 ms"));
    }
  }
  world().barrier();
  it.state.reset();
  world().barrier();
  CHECK(cudaDeviceSynchronize() == cudaSuccess);
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
