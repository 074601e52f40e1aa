// SPDX-License-Identifier: Apache-2.0
#include "cohort/trace_failures.hpp"

#include <atomic>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "cohort/flight_recorder.hpp"
#include "support/catch.hpp"

using namespace cohort;

TEST_CASE("the failure that tells most is kept, and each is acted upon", "[trace_failures]") {
  const FlightRecorder recorder("tp[0]", 0, {0, 1}, {});
  TraceFailures failures;
  CHECK_FALSE(failures.telling().has_value());
  std::vector<std::string> acted;
  failures.on_failure([&](const FlightRecorder& of, const TraceFailure& failure) {
    CHECK(&of == &recorder);
    acted.push_back(failure.why);
  });
  const auto kept = [&](const TraceFailure& failure) {
    failures.add(recorder, failure);
    return failures.telling()->why;
  };
  CHECK(kept({.why = "a cable", .ended = 3}) == "a cable");
  CHECK(kept({.why = "what follows", .ended = 3}) == "a cable");
  CHECK(kept({.why = "a time-out", .late = true, .missing = {1}, .ended = 3}) == "a time-out");
  CHECK(kept({.why = "another", .late = true, .ended = 3}) == "a time-out");
  CHECK(kept({.why = "another day", .ended = 4}) == "another day");
  CHECK(acted == std::vector<std::string>{"a cable", "what follows", "a time-out", "another",
                                          "another day"});
}

TEST_CASE("who takes back what is done at a failure waits until it is done", "[trace_failures]") {
  FlightRecorder recorder("tp[0]", 0, {0, 1}, {});
  std::atomic<bool> begun{false};
  std::atomic<bool> done{false};
  recorder.on_failure([&](const FlightRecorder&, const TraceFailure&) {
    begun = true;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    done = true;
  });
  std::thread other([&] { recorder.failed("a cable", false); });
  while (!begun) {
    std::this_thread::yield();
  }
  recorder.on_failure({});
  CHECK(done);
  other.join();
}
