// SPDX-License-Identifier: Apache-2.0
#include "cohort/wait_notice.hpp"

#include <chrono>
#include <string>
#include <utility>
#include <vector>

#include "cohort/log.hpp"
#include "support/catch.hpp"

using namespace cohort;
using namespace std::chrono_literals;

TEST_CASE("a wait says once, after its share, whom it misses", "[wait_notice]") {
  std::vector<std::string> said;
  LogSink before = set_log_sink([&](LogLevel level, std::string_view text) {
    said.push_back(std::string(to_string(level)) + ": " + std::string(text));
  });
  const detail::WaitNotice::Clock::time_point start{};
  detail::WaitNotice notice(start, 2000ms, 25);
  CHECK(notice.due() == start + 500ms);
  const auto text = [] { return "rank 1 is missing"; };
  notice.say(start + 499ms, text);
  CHECK(said.empty());
  notice.say(start + 510ms, text);
  notice.say(start + 1900ms, text);
  set_log_sink(std::move(before));
  CHECK(said == std::vector<std::string>{"warning: rank 1 is missing, for 510 ms of at most 2000"});
}

TEST_CASE("a share of zero is for never", "[wait_notice]") {
  detail::WaitNotice notice({}, 1ms, 0);
  notice.say(detail::WaitNotice::Clock::time_point{} + 24h, []() -> std::string {
    FAIL("nothing is to be said");
    return "";
  });
  CHECK(notice.due() == detail::WaitNotice::Clock::time_point::max());
}
