// SPDX-License-Identifier: Apache-2.0
#include "bed.hpp"
#include "cohort/error.hpp"

namespace cohort::bench {

std::unique_ptr<Bed> make_cuda_bed() {
  throw ConfigError("--backend cuda: this program was built without CUDA and NCCL");
}

}  // namespace cohort::bench
