// SPDX-License-Identifier: Apache-2.0
#include "cohort/graph_capture.hpp"

#include "support/capture_checks.hpp"
#include "support/catch.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::test;

TEST_CASE("replays compute from fresh inputs, with eager calls between", "[capture]") {
  for (const int n : {1, 2, 3, 4}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_replays); }
  }
}

TEST_CASE("a decode step is captured whole", "[capture]") {
  for (const int n : {1, 2, 3}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_captured_decode); }
  }
}

TEST_CASE("captures that cannot be are refused, and the state works on", "[capture]") {
  for (const int n : {1, 2}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_capture_errors); }
  }
}

TEST_CASE("graphs lease memory until they are destroyed", "[capture]") {
  for (const int n : {1, 2, 4}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_leases); }
  }
}

TEST_CASE("several streams take part in one capture", "[capture]") {
  for (const int n : {1, 2}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_two_captured_streams); }
  }
}

TEST_CASE("graphs that outlive their groups cannot be launched", "[capture]") {
  for (const int n : {1, 2}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_launch_after_shutdown); }
  }
}

TEST_CASE("graphs keep what they lease mapped when the state is gone", "[capture]") {
  for (const int n : {1, 2}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_lease_after_state); }
  }
}
