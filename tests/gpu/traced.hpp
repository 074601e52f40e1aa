// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>

#include "cohort/cohort.hpp"
#include "cohort/cuda.hpp"

/// \file
/// Ranks on cards that hang on purpose, so that trace.sh can judge what cohort_trace makes of the
/// traces that they leave. The last rank is the one to be blamed. What support/trace_checks.hpp is
/// on the host.

namespace cohort::test {

/// Work that keeps a card busy on a stream of its own, until it goes.
class BusyCard {
 public:
  explicit BusyCard(int device) : stream_(make_stream(device)) {
    cuda_check(cudaLaunchHostFunc(
                   stream_.get(),
                   [](void* over) {
                     while (!static_cast<std::atomic<bool>*>(over)->load()) {
                       std::this_thread::sleep_for(std::chrono::milliseconds(1));
                     }
                   },
                   &over_),
               "cudaLaunchHostFunc");
  }
  BusyCard(const BusyCard&) = delete;
  BusyCard& operator=(const BusyCard&) = delete;
  ~BusyCard() {
    over_ = true;
    static_cast<void>(cudaStreamSynchronize(stream_.get()));
  }

 private:
  std::atomic<bool> over_{false};
  UniqueStream stream_;
};

/// Has the last rank hang, or die, in the way that `mode` says: "call", "replay", "growth", "death"
/// or "difference"; "busy": all ranks write their traces when their calls have ended and their
/// cards have other work. Behind "bare_" they have waited for their calls by CUDA's means alone.
/// Throws where no call of this rank failed.
inline void hang(ControlPlane& world, std::string mode) {
  constexpr std::chrono::milliseconds kHangLimit{1500};
  const std::string by_cuda = "bare_";
  const bool bare = mode.starts_with(by_cuda);
  mode = bare ? mode.substr(by_cuda.size()) : mode;
  const auto backend = cuda_backend({.environment = {.multicast = false}});
  cuda_check(cudaSetDevice(backend->device().index), "cudaSetDevice");  // for the own calls here
  const bool last = world.rank() == world.size() - 1;
  auto state =
      ParallelState::create(world, {.layout = {.tp = world.size()},
                                    .backend = backend,
                                    .symmetric = {.enabled = true, .selection = Selection::all()}});
  auto& tp = state.tp();
  const UniqueStream own = make_stream(backend->device().index);
  const StreamRef stream = backend->stream(own.get());
  const Tensor x = backend->allocate({4096}, DType::f32, stream);
  const Tensor all = backend->allocate({4096L * world.size()}, DType::f32, stream);
  for (int round = 0; round < 3; ++round) {
    tp.all_reduce(x.view(), stream);
  }
  auto graph = state.capture(stream, [&] {
    tp.all_reduce(x.view(), stream);
    tp.all_gather_into(all.view(), x.view(), 0, stream);
  });
  graph.launch(stream);
  graph.launch(stream);
  if (bare) {
    cuda_check(cudaStreamSynchronize(own.get()), "cudaStreamSynchronize");
  } else {
    tp.synchronize(stream, std::chrono::seconds(20));
  }
  world.barrier();

  if (mode == "busy") {
    const BusyCard busy(backend->device().index);
    std::this_thread::sleep_for(std::chrono::milliseconds(700));  // long enough for a finding
    const std::string name = "/cohort.rank" + std::to_string(world.rank()) + ".busy.json";
    state.write_trace(std::getenv("COHORT_TRACE_DIR") + name);
    world.barrier();
    return;
  }

  const bool grows = mode == "growth";
  if (last && mode == "death") {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    static_cast<void>(std::raise(SIGKILL));
  }
  if (last && mode != "difference") {
    const std::chrono::milliseconds limit = grows ? world.limit() : kHangLimit;
    std::this_thread::sleep_for(limit + std::chrono::seconds(3));
  }
  try {
    if (grows && tp.decision().nccl_windows.on) {
      tp.reserve(1 << 20);
    } else if (grows) {
      tp.reserve_lanes(2);
    } else if (mode == "replay") {
      graph.launch(stream);
    } else {
      const std::int64_t rows = last && mode == "difference" ? 2048 : 4096;
      tp.all_reduce(x.view().slice(0, 0, rows), stream);
    }
    tp.synchronize(stream, kHangLimit);
  } catch (const UsageError&) {
    throw;
  } catch (const Error&) {
    return;
  }
  throw std::runtime_error(mode + ": the call came to its end");
}

}  // namespace cohort::test
