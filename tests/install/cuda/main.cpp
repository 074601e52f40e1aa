// SPDX-License-Identifier: Apache-2.0
#include <cohort/cohort.hpp>
#include <cohort/cuda.hpp>
#include <cstdio>

int main(int argc, char**) {
  if (argc > 1) {  // never in the test, which needs no card
    return cohort::cuda_backend()->device().index;
  }
  std::puts(cohort::describe_nccl(NCCL_VERSION_CODE).c_str());
  return 0;
}
