// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>

#include "cohort/cuda/support_kernels.hpp"
#include "cohort/error.hpp"
#include "support/catch.hpp"
#include "support/skip.hpp"

// This program has code for 8.0 alone.

using namespace cohort;
using test::says;

TEST_CASE("a card that the build has no code for is refused by name", "[card]") {
  cudaDeviceProp properties{};
  REQUIRE(cudaGetDeviceProperties(&properties, 0) == cudaSuccess);
  if (test::skip_if(properties.major == 8, "the card runs the code for 8.0")) {
    return;
  }
  CHECK_THROWS_MATCHES(
      cuda::require_code(), ConfigError,
      says(properties.name, "no code", "built for 800", "CMAKE_CUDA_ARCHITECTURES"));
  CHECK(cudaGetLastError() == cudaSuccess);  // nothing is left for the caller to trip over
}
