// SPDX-License-Identifier: Apache-2.0
#include "cohort/call_time.hpp"

#include <chrono>
#include <cstdint>
#include <set>
#include <thread>

#include "support/catch.hpp"

using namespace cohort::detail;
using namespace std::chrono_literals;

namespace {

/// How long a wait that starts now may take.
std::chrono::steady_clock::duration left_of(std::chrono::steady_clock::duration limit) {
  const LimitedWait wait(limit);
  return wait.deadline() - wait.start();
}

void wait_for(std::chrono::milliseconds time, std::chrono::milliseconds limit = 1s) {
  const LimitedWait wait(limit);
  std::this_thread::sleep_for(time);
}

}  // namespace

TEST_CASE("the waits of a call share its limit", "[call_time]") {
  const CallTime call;
  CHECK(left_of(800ms) <= 800ms);
  wait_for(30ms);
  std::this_thread::sleep_for(20ms);  // work does not count
  CHECK(left_of(800ms) <= 770ms);
  {
    const CallTime part;
    wait_for(30ms);
  }
  CHECK(left_of(800ms) <= 740ms);
  CHECK(left_of(40ms) == 5ms);  // an eighth where nothing is left
  CHECK(left_of(0ms) == 0ms);
  std::thread([] { CHECK(left_of(800ms) == 800ms); }).join();
}

TEST_CASE("waits that each end in time are over at 1.25 limits", "[call_time]") {
  using Time = std::chrono::steady_clock::duration;
  Time waited{};
  for (int i = 0; i < 1000; ++i) {
    const Time wait = LimitedWait::left(1s, waited, 1s);
    CHECK(wait > 0s);
    waited += i == 0 ? wait : wait * 9 / 10;
    if (waited <= 1s) {
      CHECK(wait >= 125ms);
    }
  }
  CHECK(waited <= 1250ms);
  CHECK(LimitedWait::left(1s, 0s, 1s) == 1s);
  CHECK(LimitedWait::left(1s, 300ms, 1s) == 700ms);
  CHECK(LimitedWait::left(1s, 1s, 1s) == 125ms);
  CHECK(LimitedWait::left(1s, 1150ms, 1s) == 50ms);
  CHECK(LimitedWait::left(1s, 1250ms, 1s) == 0s);
  CHECK(LimitedWait::left(1s, 1h, 1s) == 0s);
  CHECK(LimitedWait::left(40ms, 500ms, 1s) == 5ms);  // others of the call have longer ones
  const CallTime call;
  CHECK(left_of(40ms) == 40ms);
  wait_for(60ms, 50ms);
  CHECK(left_of(40ms) <= 1250us);  // half of what is left of 62.5 ms
}

TEST_CASE("a wait says how much of the limit it had", "[call_time]") {
  CHECK(LimitedWait(800ms).describe(800ms) == "800 ms");
  const CallTime call;
  CHECK(LimitedWait(800ms).describe(800ms) == "800 ms");
  wait_for(50ms);
  CHECK(LimitedWait(40ms).describe(40ms) ==
        "40 ms, which all waits of the call share: this one had 5 ms");
}

TEST_CASE("calls begin anew, and waits outside of any have their limit each", "[call_time]") {
  for (int i = 0; i < 2; ++i) {
    const CallTime call;
    CHECK(left_of(10s) > 9s);
    wait_for(20ms);
    CHECK(left_of(100ms) <= 80ms);
  }
  wait_for(20ms);
  CHECK(left_of(100ms) == 100ms);
}

TEST_CASE("no time limit overflows, and none is at once over", "[call_time]") {
  constexpr auto kMost = cohort::kLongestTimeLimit;
  const auto now = std::chrono::steady_clock::now();
  for (const auto limit : {std::chrono::milliseconds(std::chrono::hours(24 * 365 * 300)),
                           std::chrono::milliseconds::max(), kMost + 1ms}) {
    CHECK(cohort::checked_limit("wait", limit) == kMost);
    CHECK_FALSE(cohort::is_time_limit(limit));
    CHECK(deadline_after(limit) >= now + kMost);
  }
  CHECK(cohort::checked_limit("wait", 1ms) == 1ms);
  CHECK(cohort::is_time_limit(1ms));
  CHECK(cohort::is_time_limit(kMost));
  for (const auto limit : {0ms, -1ms, std::chrono::milliseconds::min()}) {
    CHECK_THROWS_AS(cohort::checked_limit("wait", limit), cohort::UsageError);
    CHECK_FALSE(cohort::is_time_limit(limit));
    CHECK(deadline_after(limit) >= now);
  }
}

TEST_CASE("recordings tell the calls of all threads apart", "[call_time]") {
  CHECK(recorded_call() == 0);
  std::set<std::uint64_t> numbers;
  const auto record = [&] {
    for (int i = 0; i < 3; ++i) {
      const CallTime call;
      const auto number = recorded_call();
      CHECK(number != 0);
      CHECK(numbers.insert(number).second);
      const CallTime part;
      CHECK(recorded_call() == number);  // its parts belong to it
    }
  };
  record();
  std::thread(record).join();
  CHECK(numbers.size() == 6);
}

TEST_CASE("what is left until a deadline is whole milliseconds, and never none") {
  const auto now = std::chrono::steady_clock::now();
  CHECK(left_until(now - 1h) == 1ms);
  CHECK(left_until(now) == 1ms);
  const auto left = left_until(now + 1h);
  CHECK(left <= 1h);
  CHECK(left > 59min);
}
