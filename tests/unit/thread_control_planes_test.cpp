// SPDX-License-Identifier: Apache-2.0
#include <chrono>
#include <cohort/thread_control_planes.hpp>

#include "support/catch.hpp"

using namespace cohort;
using namespace cohort::test;
using namespace std::chrono_literals;

TEST_CASE("sizes and time limits that cannot work are refused") {
  CHECK_THROWS_MATCHES(make_thread_control_planes(0), ConfigError, says("positive size", "got 0"));
  CHECK_THROWS_MATCHES(make_thread_control_planes(2, 0ms), ConfigError,
                       says("time limit", "got 0"));
  CHECK_THROWS_MATCHES(make_thread_control_planes(2, std::chrono::milliseconds::max()), ConfigError,
                       says("time limit"));
  CHECK(make_thread_control_planes(1)[0]->limit() == kDefaultTimeLimit);
}
