// SPDX-License-Identifier: Apache-2.0
#include <chrono>
#include <cohort/poll_pause.hpp>
#include <ctime>

#include "support/catch.hpp"
#include "support/fast_signals.hpp"

using namespace cohort;
using namespace std::chrono_literals;

namespace {

using Clock = std::chrono::steady_clock;

/// Pauses until `limit` has passed; how long that took.
Clock::duration pause_for(detail::PollPause pause, Clock::duration limit) {
  const auto begin = Clock::now();
  while (Clock::now() - begin < limit) {
    pause();
  }
  return Clock::now() - begin;
}

}  // namespace

TEST_CASE("a bounded wait ends at its limit", "[poll_pause]") {
  CHECK(pause_for(detail::PollPause(), 100ms) < 1s);
}

TEST_CASE("a bounded wait ends at its limit under signals that come faster than naps end",
          "[poll_pause]") {
  const test::FastSignals signals;
  CHECK(pause_for(detail::PollPause(1us), 200ms) < 5s);
}

TEST_CASE("a long wait leaves the processor to others", "[poll_pause]") {
  const std::clock_t before = std::clock();
  pause_for(detail::PollPause(1us), 500ms);
  const double busy = static_cast<double>(std::clock() - before) / CLOCKS_PER_SEC;
  CHECK(busy < 0.25);  // seconds of the processor in half a second
}
