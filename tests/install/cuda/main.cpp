// SPDX-License-Identifier: Apache-2.0
#include <cohort/cohort.hpp>
#include <cohort/cuda.hpp>
#ifdef NCCL_VERSION_CODE
#error "an engine's source needs no header of NCCL"
#endif
#include <cohort/nccl/known_faults.hpp>
#include <cohort/nccl/nccl_check.hpp>
#include <cstdio>

int main(int argc, char**) {
  if (argc > 1) {  // never in the test, which needs no card
    return cohort::cuda_backend()->device().index;
  }
  std::puts(cohort::describe_nccl(cohort::nccl_runtime_version()).c_str());
  return 0;
}
