// SPDX-License-Identifier: Apache-2.0
#include <mpi.h>

#include <array>
#include <chrono>
#include <cohort/mpi/mpi_session.hpp>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>

#include "support/ranks.hpp"
#include "support/session.hpp"

namespace cohort::test {
namespace {

// A rank that left a test case early by a failure waits for ranks that may sit in a collective
// until the library's own time limits end it; those are seconds in tests.
constexpr std::chrono::seconds kAgreementLimit{60};

struct World {
  ControlPlane* control = nullptr;
  MPI_Comm agreement = MPI_COMM_NULL;  // apart from everything that the tests use
  int rank = 0;
  int size = 1;
  int test_case = 0;
};

World& the_world() {
  static World instance;
  return instance;
}

// Element-wise maximum over the ranks, or an abort of the job at the time limit: MPI's blocking
// collectives would wait for a stuck rank forever.
template <std::size_t n>
std::array<int, n> max_over_ranks(std::array<int, n> values, const std::string& where) {
  auto& world = the_world();
  MPI_Request request = MPI_REQUEST_NULL;
  MPI_Iallreduce(MPI_IN_PLACE, values.data(), static_cast<int>(n), MPI_INT, MPI_MAX,
                 world.agreement, &request);
  const auto deadline = std::chrono::steady_clock::now() + kAgreementLimit;
  for (int done = 0;;) {
    MPI_Test(&request, &done, MPI_STATUS_IGNORE);
    if (done != 0) {
      return values;
    }
    if (std::chrono::steady_clock::now() > deadline) {
      std::fprintf(stderr, "rank %d: other ranks did not finish within %lld s: %s\n", world.rank,
                   static_cast<long long>(kAgreementLimit.count()), where.c_str());
      MPI_Abort(MPI_COMM_WORLD, 1);
    }
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
}

Verdict agree(const std::string& test_case, Verdict here) {
  auto& world = the_world();
  const int index = ++world.test_case;
  const auto all = max_over_ranks(
      std::array{here.failed ? 1 : 0, here.skipped ? 1 : 0, here.skipped ? 0 : 1, index, -index},
      "test case \"" + test_case + "\"");
  if (all[3] != -all[4]) {
    std::fprintf(stderr, "rank %d: the ranks run different test cases at \"%s\"\n", world.rank,
                 test_case.c_str());
    MPI_Abort(MPI_COMM_WORLD, 1);
  }
  const bool skipped_by_some = all[1] != 0;
  const bool skipped_by_all = all[2] == 0;
  if (skipped_by_some && !skipped_by_all) {
    std::fprintf(stderr, "rank %d: only some ranks skipped \"%s\"\n", world.rank,
                 test_case.c_str());
  }
  return {.failed = all[0] != 0 || (skipped_by_some && !skipped_by_all), .skipped = skipped_by_all};
}

int run(int argc, char** argv) {
  auto& world = the_world();
  MPI_Comm_dup(MPI_COMM_WORLD, &world.agreement);
  MPI_Comm_rank(world.agreement, &world.rank);
  MPI_Comm_size(world.agreement, &world.size);
  const auto result = run_session(argc, argv, agree, world.rank == 0);
  const bool ok = max_over_ranks(std::array{result.ok ? 0 : 1}, "end of the program")[0] == 0;
  if (world.rank == 0) {
    print_counts(result.counts);
  }
  MPI_Comm_free(&world.agreement);
  return ok ? 0 : 1;
}

}  // namespace

ControlPlane& world() {
  if (the_world().control == nullptr) {
    throw std::logic_error("cohort::test::world() before main()");
  }
  return *the_world().control;
}

int world_rank() { return the_world().rank; }

int world_size() { return the_world().size; }

bool skip_all_if(bool condition_here, const std::string& reason) {
  const bool skip = max_over_ranks(std::array{condition_here ? 1 : 0}, "skip: " + reason)[0] != 0;
  if (skip) {
    mark_skipped(reason);
  }
  return skip;
}

}  // namespace cohort::test

int main(int argc, char** argv) {
  try {
    cohort::MpiSession session(argc, argv);
    cohort::test::the_world().control = &session.world();
    return cohort::test::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "rank %d: %s\n", cohort::test::world_rank(), error.what());
    return 1;
  }
}
