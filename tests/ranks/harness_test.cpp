// SPDX-License-Identifier: Apache-2.0
#include <mpi.h>

#include "support/ranks.hpp"

using namespace cohort::test;

TEST_CASE("every rank runs the test cases", "[harness]") {
  int size = 0;
  int rank = -1;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  CHECK(world_size() == size);
  CHECK(world_rank() == rank);
  int sum = 0;
  MPI_Allreduce(&rank, &sum, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
  CHECK(sum == size * (size - 1) / 2);
}

// What follows is hidden: tests of the harness itself select it by tag and judge the output.

TEST_CASE("one rank's wish to skip skips on all", "[.skips]") {
  const bool skipped = skip_all_if(world_rank() == world_size() - 1, "the last rank asks for it");
  CHECK(skipped);
}

TEST_CASE("a failure on one rank fails on all", "[.fails]") {
  CHECK(world_rank() != world_size() - 1);
}

TEST_CASE("a test case left early by one rank fails on all", "[.fails]") {
  REQUIRE(world_rank() != 0);
}

TEST_CASE("a skip by one rank alone fails", "[.fails]") {
  if (skip_if(world_rank() == world_size() - 1, "alone")) {
    return;
  }
  SUCCEED();
}
