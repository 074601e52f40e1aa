// SPDX-License-Identifier: Apache-2.0
#include <nccl.h>

#include <cohort/cohort.hpp>
#include <cohort/cuda.hpp>
#include <cohort/nccl/known_faults.hpp>

void launch_kernel();

int main(int argc, char**) {
  if (argc > 1) {  // never in the test, which needs no card
    launch_kernel();
    return cohort::cuda_backend()->device().index;
  }
  return cohort::has_trait(cohort::NcclTrait::windows, NCCL_VERSION_CODE) ? 0 : 1;
}
