// SPDX-License-Identifier: Apache-2.0
#include <cohort/nccl/machine_probe.hpp>

#include "support/catch.hpp"

// What needs no GPU. The probe's own tests are in tests/gpu.

using namespace cohort;

TEST_CASE("NCCL_CUMEM_ENABLE=0 forbids allocation by cuMem, whatever the driver can do", "[nccl]") {
  CHECK_FALSE(detail::cumem_enabled(0, {.cumem_forbidden = true}));
}
