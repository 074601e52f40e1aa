// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cohort/cohort.hpp>
#include <csignal>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "support/group_tensors.hpp"
#include "support/threads.hpp"

/// \file
/// Ranks that hang on purpose, so that the traces which they leave can be judged. The last rank is
/// the one to be blamed. COHORT_TRACE_DIR says where traces go; the limit of the control plane is
/// some seconds.

namespace cohort::test {

/// How long the last rank keeps away: longer than the others wait.
inline void keep_away(const ControlPlane& world) {
  std::this_thread::sleep_for(world.limit() + world.limit() / 2);
}

/// Runs a call that fails on every rank that is there.
inline void expect_failure(const std::function<void()>& call) {
  try {
    call();
  } catch (const UsageError&) {
    throw;
  } catch (const Error&) {
    return;
  }
  throw std::runtime_error("check failed: the call came to its end");
}

/// A state of one TP group, and calls of it that went well.
struct TracedGroup {
  explicit TracedGroup(ControlPlane& plane)
      : world(plane),
        last(plane.rank() == plane.size() - 1),
        state(make_state(plane, {.tp = plane.size()})),
        tp(state.tp()),
        x(tp.backend().allocate({16, 33}, DType::f32, {})) {
    fill(x, plane.rank());
    for (int round = 0; round < 3; ++round) {
      tp.all_reduce(x);
    }
  }

  ControlPlane& world;
  bool last;
  ParallelState state;
  TensorParallelGroup& tp;
  Tensor x;
};

/// all_reduce #4, to which the last rank comes too late.
inline void hang_in_a_call(ControlPlane& world) {
  TracedGroup group(world);
  if (group.last) {
    keep_away(world);
  }
  expect_failure([&] { group.tp.all_reduce(group.x); });
}

/// The third launch of a graph of two calls, which the last rank makes too late.
inline void hang_in_a_replay(ControlPlane& world) {
  TracedGroup group(world);
  HostStream stream;
  const Tensor all = group.tp.backend().allocate({16L * world.size(), 33}, DType::f32, {});
  auto graph = group.state.capture(stream, [&] {
    group.tp.all_reduce(group.x, stream);
    group.tp.all_gather_into(all, group.x, 0, stream);
  });
  graph.launch(stream);
  graph.launch(stream);
  if (group.last) {
    keep_away(world);
  }
  expect_failure([&] { graph.launch(stream); });
}

/// A reservation, to which the last rank comes too late.
inline void hang_in_growth(ControlPlane& world) {
  TracedGroup group(world);
  if (group.last) {
    keep_away(world);
  }
  expect_failure([&] { group.tp.reserve(1 << 20); });
}

/// The last rank dies before all_reduce #4.
inline void hang_after_a_death(ControlPlane& world) {
  TracedGroup group(world);
  if (group.last) {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    static_cast<void>(std::raise(SIGKILL));
  }
  expect_failure([&] { group.tp.all_reduce(group.x); });
  std::this_thread::sleep_for(std::chrono::milliseconds(300));  // the other survivor writes as well
  std::_Exit(EXIT_SUCCESS);                                     // MPI would wait for the dead one
}

/// A recv of the first rank, for which the last one sends nothing in time; the others do nothing.
inline void hang_in_a_pair(ControlPlane& world) {
  TracedGroup group(world);
  if (world.rank() != 0) {
    keep_away(world);
    return;
  }
  expect_failure([&] { group.tp.recv(group.x, world.size() - 1); });
}

/// The creation of a state, to which the last rank comes too late.
inline void hang_in_formation(ControlPlane& world) {
  if (world.rank() == world.size() - 1) {
    keep_away(world);
  }
  expect_failure([&] { static_cast<void>(make_state(world, {.tp = world.size()})); });
}

/// The state's end, to which the last rank comes too late.
inline void hang_in_shutdown(ControlPlane& world) {
  TracedGroup group(world);
  if (group.last) {
    keep_away(world);
  }
  expect_failure([&] { group.state.shutdown(); });
}

/// all_reduce #4, which the last rank makes with half of the rows.
inline void differ_in_a_call(ControlPlane& world) {
  TracedGroup group(world);
  expect_failure(
      [&] { group.tp.all_reduce(group.last ? group.x.view().slice(0, 0, 8) : group.x.view()); });
}

}  // namespace cohort::test
