// SPDX-License-Identifier: Apache-2.0
#include "cohort/cuda/device_choice.hpp"

#include <optional>

#include "support/catch.hpp"

using namespace cohort;
using cohort::test::says;

TEST_CASE("local ranks go round the visible devices", "[device_choice]") {
  CHECK(choose_device({}, 0, 8) == 0);
  CHECK(choose_device({}, 7, 8) == 7);
  CHECK(choose_device({}, 7, 1) == 0);  // one visible card per process
  CHECK(choose_device({}, 5, 2) == 1);  // several processes per card
  CHECK(choose_device({}, {}, 4) == 0);
}

TEST_CASE("a device that was asked for wins, or does not exist", "[device_choice]") {
  CHECK(choose_device(2, 0, 4) == 2);
  CHECK_THROWS_MATCHES(choose_device(4, 0, 4), ConfigError, says("device", "0 to 3", "4"));
  CHECK_THROWS_MATCHES(choose_device(-1, 0, 4), ConfigError, says("device", "-1"));
  CHECK_THROWS_MATCHES(choose_device({}, 0, 0), ConfigError, says("no CUDA device"));
}
