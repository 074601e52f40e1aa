#include <cohort/nccl/machine_probe.hpp>

#include "support/catch.hpp"

// What needs no GPU. The probe's own tests are in tests/gpu.

using namespace cohort;

TEST_CASE("lines are trusted on the cards that NCCL trusts with its own", "[nccl]") {
  for (const int major : {7, 8, 9, 10}) {
    CHECK(detail::keeps_lines_whole(major, 0));
  }
  CHECK_FALSE(detail::keeps_lines_whole(8, 6));  // workstation cards of the same generation
  CHECK_FALSE(detail::keeps_lines_whole(8, 9));
  CHECK_FALSE(detail::keeps_lines_whole(6, 0));
  CHECK_FALSE(detail::keeps_lines_whole(12, 0));
}

TEST_CASE("NCCL_CUMEM_ENABLE=0 forbids allocation by cuMem, whatever the driver can do", "[nccl]") {
  CHECK_FALSE(detail::cumem_enabled(0, {.cumem_forbidden = true}));
}
