// SPDX-License-Identifier: Apache-2.0
#include "cohort/cuda/quick_questions.hpp"

#include <cuda_runtime_api.h>

#include <thread>

#include "cohort/cuda/handles.hpp"
#include "cohort/error.hpp"
#include "support/catch.hpp"

// What the driver answers with a card is in tests/gpu/cuda_stream_test.cpp.

using namespace cohort;

TEST_CASE("without a current device nothing is known, and the runtime is asked",
          "[quick_questions]") {
  int devices = 0;
  const cudaError_t none = cudaGetDeviceCount(&devices);
  static_cast<void>(cudaGetLastError());
  std::thread([&] {
    CHECK_FALSE(detail::current_device_quickly());
    CHECK_FALSE(detail::is_current_quickly(0));
    CHECK_FALSE(detail::current_device_quickly());  // nor where the driver's function is known
    if (none != cudaSuccess) {
      CHECK_FALSE(detail::is_eager_quickly(nullptr));
      CHECK_FALSE(detail::is_eager_quickly(nullptr));
      CHECK_THROWS_AS(DeviceGuard(0), TransportError);
    } else {
      CHECK(cudaGetLastError() == cudaSuccess);  // the question leaves no error behind
      CHECK_NOTHROW(DeviceGuard(0));
    }
  }).join();
}
