// SPDX-License-Identifier: Apache-2.0
#include <nccl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cohort/nccl/cause_finder.hpp>
#include <cohort/thread_control_planes.hpp>
#include <exception>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/threads.hpp"

// What ranks throw and tell behind an error of NCCL, with threads as ranks, one of which has the
// process of a child that has ended.

using namespace cohort;
using namespace cohort::test;
using namespace std::chrono_literals;

namespace {

using cohort::detail::CauseFinder;
using cohort::detail::FirstCause;

/// Of a process that has ended.
ProcessIdentity ended_process() {
  const pid_t child = ::fork();
  if (child == 0) {
    ::_exit(0);
  }
  static_cast<void>(::waitpid(child, nullptr, 0));
  ProcessIdentity gone = this_process();
  gone.pid = child;
  gone.start_time += 1;
  return gone;
}

/// Three ranks, the last of which is gone or lives.
CauseFinder finder_of(bool last_is_gone) {
  const ProcessIdentity here = this_process();
  return CauseFinder({here, here, last_is_gone ? ended_process() : here});
}

std::exception_ptr remote_error() {
  return std::make_exception_ptr(TransportError(
      {.call = "ncclAllReduce", .native_code = ncclRemoteError, .rank = 0, .group = "world"},
      "remote process exited"));
}

const auto kNever = CauseFinder::Clock::time_point::max();

}  // namespace

TEST_CASE("the rank that is gone is named by who finds it and by whom it tells", "[nccl]") {
  const auto planes = make_thread_control_planes(3);
  const CauseFinder finder = finder_of(true);
  const auto find = [&] {
    std::rethrow_exception(finder.leave(*planes[0], remote_error(), kNever).error);
  };
  try {
    find();
    FAIL("expected a TimeoutError");
  } catch (const TimeoutError& error) {
    CHECK(error.missing() == std::vector{2});
    CHECK_THAT(error.what(), contains("failed with code 6", "; the process of rank 2 is gone"));
  }
  CHECK(planes[0]->left_with()->ranks == std::vector{2});
  try {
    planes[1]->check_peers();
    FAIL("expected a TimeoutError");
  } catch (const TimeoutError& error) {
    CHECK(error.missing() == std::vector{2});
    CHECK_THAT(error.what(), contains("rank 0 gave up", "; the process of rank 2 is gone"));
  }
}

TEST_CASE("a peer's words win over NCCL's error behind them, though its process is gone",
          "[nccl]") {
  const bool is_gone = GENERATE(false, true);
  const auto planes = make_thread_control_planes(3);
  planes[2]->give_up("the KV cache is exhausted");
  const auto start = CauseFinder::Clock::now();
  const FirstCause first = finder_of(is_gone).leave(*planes[0], remote_error(), kNever);
  CHECK(CauseFinder::Clock::now() - start < 400ms);  // it need not look for who is gone
  try {
    std::rethrow_exception(first.error);
  } catch (const SymmetryError& error) {
    CHECK(error.ranks() == std::vector{2});
    CHECK_THAT(error.what(), contains("rank 2 gave up", "the KV cache is exhausted"));
  }
  CHECK(planes[0]->left_with()->serialize() == planes[2]->left_with()->serialize());
}

TEST_CASE("who is told another's error of NCCL throws it with its code and passes it on",
          "[nccl]") {
  const auto planes = make_thread_control_planes(3);
  planes[2]->give_up_because(std::make_exception_ptr(
      TransportError({.call = "ncclAllReduce", .native_code = 6, .rank = 2}, "its network")));
  const CauseFinder finder = finder_of(true);
  for (const int rank : {0, 1}) {
    ControlPlane& plane = *planes[static_cast<std::size_t>(rank)];
    std::exception_ptr heard;
    try {
      plane.check_peers();
    } catch (const Error&) {
      heard = std::current_exception();
    }
    try {
      std::rethrow_exception(finder.leave(plane, heard, kNever).error);
    } catch (const TransportError& error) {
      CHECK(error.site().native_code == 6);
      CHECK(error.site().rank == 2);
    }
    CHECK(plane.left_with()->kind == detail::GiveUp::Kind::transport);
    CHECK(plane.left_with()->finder == 2);
  }
}

TEST_CASE("where all live a remote error names nobody, and is waited for no longer than allowed",
          "[nccl]") {
  const auto planes = make_thread_control_planes(3);
  const auto start = CauseFinder::Clock::now();
  const FirstCause first = finder_of(false).leave(*planes[0], remote_error(), start + 20ms);
  CHECK(CauseFinder::Clock::now() - start < 400ms);
  CHECK_THROWS_AS(std::rethrow_exception(first.error), TransportError);
  CHECK(first.why.ranks.empty());
  CHECK(first.why.native_code == ncclRemoteError);

  const auto late = std::make_exception_ptr(TimeoutError("still busy", {}));
  const FirstCause waited = finder_of(false).leave(*planes[1], late, kNever);
  CHECK(waited.why.native_code == ncclRemoteError);  // the first, which it has been told
}
