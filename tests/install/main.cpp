// SPDX-License-Identifier: Apache-2.0
#include <cohort/cohort.hpp>
#include <cstdio>
#include <string>
#ifdef WITH_MPI
#include <cohort/mpi.hpp>
#endif

#include "groups.hpp"

int main(int argc, char** argv) {
#ifdef WITH_MPI
  const cohort::MpiSession mpi(argc, argv);
#else
  static_cast<void>(argc);
  static_cast<void>(argv);
#endif
  const std::string dcp_ranks = groups_of_threads();
  std::printf("dcp ranks %s\n", dcp_ranks.c_str());
  return dcp_ranks == "0101" ? 0 : 1;
}
