// SPDX-License-Identifier: Apache-2.0
#include "support/arena_checks.hpp"
#include "support/capture_checks.hpp"
#include "support/catch.hpp"
#include "support/ranks.hpp"

using namespace cohort::test;

TEST_CASE("arenas of all audiences keep equal offsets on every rank") { check_audiences(world()); }

TEST_CASE("peers see one another's blocks at equal offsets") { check_equal_offsets(world()); }

TEST_CASE("growth, reservation, freezing and exhaustion") { check_growth(world()); }

TEST_CASE("a tensor of DCP's arena is reduced over TP") { check_tensor_of_another_arena(world()); }

TEST_CASE("graphs lease memory until they are destroyed") { check_leases(world()); }

TEST_CASE("captures that cannot be are refused, and the state works on") {
  check_capture_errors(world());
}

TEST_CASE("rounds of creating and destroying leave nothing behind") {
  create_and_destroy(world(), 3);
  const auto before = Holdings::now();
  create_and_destroy(world(), full_run() ? 1000 : 100);
  const auto after = Holdings::now();
  CHECK(after.descriptors == before.descriptors);
  CHECK(after.files == before.files);
  CHECK(after.mappings == 0);
}
