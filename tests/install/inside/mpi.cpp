// SPDX-License-Identifier: Apache-2.0
#include <cohort/mpi.hpp>

int main(int argc, char** argv) {
  cohort::MpiSession mpi(argc, argv);
  return mpi.world().all_gather({}).size() == 1 ? 0 : 1;
}
