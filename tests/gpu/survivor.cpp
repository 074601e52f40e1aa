// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>
#include <fmt/format.h>
#include <sys/types.h>

#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "cohort/cohort.hpp"
#include "cohort/cuda.hpp"
#include "cohort/mpi.hpp"
#include "gpu/traced.hpp"

// gpu_survivor traced-MODE: the last rank hangs or dies as traced.hpp says.
// gpu_survivor own|nccl: the last rank is killed in a loop of collectives, eager and in a graph.
// The first one has a typed error that names it, tears its state down within the limit and forms a
// state of its own.

namespace {

using namespace cohort;
using namespace std::chrono_literals;

int passed = 0;
int failed = 0;

void expect(bool good, const std::string& what) {
  (good ? passed : failed) += 1;
  std::printf("survivor: %s: %s\n", good ? "right" : "WRONG", what.c_str());
  std::fflush(stdout);
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void outlive(ControlPlane& world, bool by_nccl) {
  const auto backend =
      cuda_backend({.environment = {.multicast = false},
                    .kernel_limit = 30s,
                    .own_max_bytes = by_nccl ? std::optional<std::int64_t>(0) : std::nullopt});
  cuda_check(cudaSetDevice(backend->device().index), "cudaSetDevice");  // for the own calls here
  const int last = world.size() - 1;
  auto state = std::make_unique<ParallelState>(ParallelState::create(
      world, {.layout = {.tp = world.size(), .pp = 1, .dcp = world.size()}, .backend = backend}));
  const UniqueStream own = make_stream(backend->device().index);
  const StreamRef stream = backend->stream(own.get());
  const Tensor x = backend->allocate({1 << 20}, DType::f32, stream);
  const Tensor small = backend->allocate({4096}, DType::f32, stream);
  const auto step = [&] {
    state->dcp().all_reduce(by_nccl ? x.view() : small.view(), stream);
    state->tp().all_reduce(small.view(), stream);
  };
  step();
  state->tp().synchronize(stream, 20s);
  auto graph = std::make_unique<CapturedGraph>(state->capture(stream, step));
  world.barrier();
  std::string got = "no error";
  std::vector<int> missing;
  auto waiting = std::chrono::steady_clock::now();
  try {
    for (int i = 0; i < 20000; ++i) {
      if (world.rank() == last && i == 303) {
        static_cast<void>(std::raise(SIGKILL));
      }
      i % 2 == 0 ? step() : graph->launch(stream);
      if (i % 10 == 9) {
        waiting = std::chrono::steady_clock::now();
        state->tp().synchronize(stream, 3s);
      }
    }
  } catch (const TimeoutError& error) {
    got = error.what();
    missing = error.missing();
  } catch (const Error& error) {
    got = std::string("another error: ") + error.what();
  }
  expect(missing == std::vector<int>{last}, "the error names the rank: " + got);
  if (by_nccl) {
    const std::string gone = fmt::format("the process of rank {} is gone", last);
    expect(got.find(gone) != std::string::npos, "in words, too");
  }
  expect(seconds_since(waiting) < 9, fmt::format("it came after {:.1f} s", seconds_since(waiting)));
  const auto start = std::chrono::steady_clock::now();
  graph.reset();
  state.reset();
  expect(seconds_since(start) < 25, fmt::format("teardown took {:.1f} s", seconds_since(start)));
  expect(cudaStreamQuery(own.get()) == cudaSuccess, "the stream has drained");

  const int alone[] = {world.rank()};
  const auto self = world.subgroup(alone, 1, "survivor");
  auto again = ParallelState::create(*self, {.layout = {}, .backend = backend});
  again.tp().all_reduce(small.view(), stream);
  again.tp().synchronize(stream, 10s);
  expect(cudaDeviceSynchronize() == cudaSuccess, "the device lives");
}

}  // namespace

int main(int argc, char** argv) {
  MpiSession mpi(argc, argv);
  try {
    const std::string mode = argc > 1 ? argv[1] : "own";
    const std::string traced = "traced-";
    if (mode.starts_with(traced)) {
      test::hang(mpi.world(), mode.substr(traced.size()));
      std::_Exit(0);  // without a look at ranks that are gone
    }
    outlive(mpi.world(), mode == "nccl");
  } catch (const std::exception& error) {
    expect(false, error.what());
  }
  std::printf("cohort-test: passed=%d failed=%d skipped=0\n", passed, failed);
  std::fflush(stdout);
  std::_Exit(failed == 0 ? 0 : 1);  // MPI cannot end without the rank that is gone
}
