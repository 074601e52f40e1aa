// SPDX-License-Identifier: Apache-2.0
#include <cohort/log.hpp>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;

namespace {

// Installs a sink for the life of a test case.
class SinkGuard {
 public:
  explicit SinkGuard(LogSink sink) : before_(set_log_sink(std::move(sink))) {}
  ~SinkGuard() { set_log_sink(std::move(before_)); }
  SinkGuard(const SinkGuard&) = delete;
  SinkGuard& operator=(const SinkGuard&) = delete;

 private:
  LogSink before_;
};

using Lines = std::vector<std::pair<LogLevel, std::string>>;

}  // namespace

TEST_CASE("a format takes its arguments, and is all that is said where they make no text",
          "[log]") {
  Lines lines;
  const SinkGuard guard(
      [&](LogLevel level, std::string_view text) { lines.emplace_back(level, std::string(text)); });
  log(LogLevel::info, "rank {} of group {}", 3, std::string("dcp[0]"));
  log(LogLevel::info, "{}", std::string(2000, 'x'));
  log(LogLevel::error, "a destructor failed: {:{}}", 1, -1);
  CHECK(lines == Lines{{LogLevel::info, "rank 3 of group dcp[0]"},
                       {LogLevel::info, std::string(2000, 'x')},
                       {LogLevel::error, "a destructor failed: {:{}}"}});
}

TEST_CASE("levels have names", "[log]") {
  STATIC_REQUIRE(to_string(LogLevel::info) == "info");
  STATIC_REQUIRE(to_string(LogLevel::warning) == "warning");
  STATIC_REQUIRE(to_string(LogLevel::error) == "error");
  STATIC_REQUIRE(to_string(static_cast<LogLevel>(7)) == "unknown");
}

TEST_CASE("an installed sink gets every message with its level, in order", "[log]") {
  Lines lines;
  const SinkGuard guard(
      [&](LogLevel level, std::string_view text) { lines.emplace_back(level, std::string(text)); });
  log(LogLevel::info, "group dcp0: windows on");
  log(LogLevel::warning, "group tp: windows off");
  log(LogLevel::error, std::string_view("not terminated!", 14));
  CHECK(lines == Lines{{LogLevel::info, "group dcp0: windows on"},
                       {LogLevel::warning, "group tp: windows off"},
                       {LogLevel::error, "not terminated"}});
}

TEST_CASE("set_log_sink gives back the sink before", "[log]") {
  int first = 0;
  int second = 0;
  const SinkGuard guard([&](LogLevel, std::string_view) { ++first; });
  LogSink before = set_log_sink([&](LogLevel, std::string_view) { ++second; });
  log(LogLevel::error, "to the second");
  set_log_sink(std::move(before));
  log(LogLevel::error, "to the first");
  CHECK(first == 1);
  CHECK(second == 1);
}

TEST_CASE("an empty sink drops messages", "[log]") {
  const SinkGuard guard(LogSink{});
  STATIC_REQUIRE(noexcept(log(LogLevel::error, "")));
  log(LogLevel::error, "nobody listens");
  SUCCEED("no crash");
}

TEST_CASE("a sink that throws does not reach the caller, and the next message gets through",
          "[log]") {
  int calls = 0;
  const SinkGuard guard([&](LogLevel, std::string_view) {
    if (++calls == 1) {
      throw std::runtime_error("disk full");
    }
  });
  log(LogLevel::error, "thrown away");
  log(LogLevel::error, "delivered");
  CHECK(calls == 2);
}

TEST_CASE("messages of several threads come one at a time and whole", "[log]") {
  constexpr int kThreads = 8;
  constexpr int kMessages = 500;
  int inside = 0;  // unprotected on purpose: the log's lock is what is tested
  int overlaps = 0;
  std::vector<int> next(kThreads, 0);
  bool in_order = true;
  {
    const SinkGuard guard([&](LogLevel, std::string_view text) {
      overlaps += inside++ != 0 ? 1 : 0;
      const auto colon = text.find(':');
      const auto thread = std::stoul(std::string(text.substr(0, colon)));
      in_order = in_order && std::stoi(std::string(text.substr(colon + 1))) == next[thread]++;
      --inside;
    });
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([t] {
        for (int i = 0; i < kMessages; ++i) {
          log(LogLevel::info, std::to_string(t) + ":" + std::to_string(i));
        }
      });
    }
    for (auto& thread : threads) {
      thread.join();
    }
  }
  CHECK(overlaps == 0);
  CHECK(in_order);
  CHECK(next == std::vector<int>(kThreads, kMessages));
}
