// SPDX-License-Identifier: Apache-2.0
#include "cohort/inquiry.hpp"

#include <chrono>
#include <optional>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using namespace cohort::detail;
using namespace std::chrono_literals;

using Ranks = std::vector<int>;

TEST_CASE("who waits is asked for whom, along the chain, and anew once it has answered") {
  Inquiry inquiry(0, 80ms);
  const Deadline start{};
  CHECK(inquiry.whom_to_ask({1}, start) == Ranks{1});
  CHECK(inquiry.whom_to_ask({1}, start + 500ms).empty());  // has not answered yet
  inquiry.hear(1, {0, 2}, start + 500ms);
  CHECK(inquiry.whom_to_ask({1}, start + 501ms) == Ranks{2});  // not this rank itself
  CHECK(inquiry.whom_to_ask({1}, start + 510ms) == Ranks{1});
  inquiry.hear(1, {3}, start + 511ms);
  CHECK(inquiry.whom_to_ask({1}, start + 512ms) == Ranks{3});
  CHECK(inquiry.waits_for(1, start + 512ms) == Ranks{3});
  inquiry.hear(3, {1}, start + 513ms);  // in a circle
  CHECK(inquiry.whom_to_ask({1}, start + 530ms) == Ranks{1, 3});
}

TEST_CASE("what a rank has answered counts while it goes on answering") {
  Inquiry inquiry(0, 80ms);
  const Deadline start{};
  CHECK_FALSE(inquiry.waits_for(1, start));
  REQUIRE(inquiry.whom_to_ask({1}, start) == Ranks{1});
  CHECK_FALSE(inquiry.waits_for(1, start + 10ms));
  inquiry.hear(1, {2}, start + 10ms);
  CHECK(inquiry.waits_for(1, start + 10s) == Ranks{2});  // nobody has asked it since
  REQUIRE(inquiry.whom_to_ask({1}, start + 20ms) == Ranks{1, 2});
  CHECK(inquiry.waits_for(1, start + 100ms) == Ranks{2});
  CHECK_FALSE(inquiry.waits_for(1, start + 101ms));  // stopped within its wait
  inquiry.hear(1, {}, start + 102ms);                // its wait has ended
  CHECK_FALSE(inquiry.waits_for(1, start + 102ms));
}

TEST_CASE("a rank that gave up on others is asked nothing more, and they stand for it") {
  Inquiry inquiry(0, 80ms);
  const Deadline start{};
  REQUIRE(inquiry.whom_to_ask({1}, start) == Ranks{1});
  inquiry.hear(1, {2}, start + 10ms, true);
  CHECK(inquiry.whom_to_ask({1}, start + 10s) == Ranks{2});
  CHECK(inquiry.waits_for(1, start + 10s) == Ranks{2});
  CHECK(inquiry.is_settled({1}, start + 11s));
}

TEST_CASE("an inquiry is settled where each of the chain has answered, or had the time to") {
  Inquiry inquiry(0, 80ms);
  const Deadline start{};
  CHECK_FALSE(inquiry.is_settled({1}, start));
  REQUIRE(inquiry.whom_to_ask({1}, start) == Ranks{1});
  CHECK_FALSE(inquiry.is_settled({1}, start + 80ms));
  CHECK(inquiry.is_settled({1}, start + 81ms));
  inquiry.hear(1, {2}, start + 82ms);
  CHECK_FALSE(inquiry.is_settled({1}, start + 90ms));  // 2 has not been asked
  REQUIRE(inquiry.whom_to_ask({1}, start + 85ms) == Ranks{2});
  CHECK_FALSE(inquiry.is_settled({1}, start + 90ms));
  inquiry.hear(2, {0}, start + 91ms);
  CHECK(inquiry.is_settled({1}, start + 91ms));
  CHECK(inquiry.is_settled({}, start));
}

TEST_CASE("a rank that goes on answering that it is in no wait has had its time as well") {
  Inquiry inquiry(0, 80ms);
  const Deadline start{};
  REQUIRE(inquiry.whom_to_ask({1}, start) == Ranks{1});
  for (auto now = start + 10ms; now <= start + 80ms; now += 10ms) {
    inquiry.hear(1, {}, now);
    CHECK_FALSE(inquiry.is_settled({1}, now));
    CHECK(inquiry.whom_to_ask({1}, now + 10ms) == Ranks{1});
  }
  CHECK(inquiry.is_settled({1}, start + 81ms));
  CHECK_FALSE(inquiry.waits_for(1, start + 81ms));

  inquiry.hear(1, {0}, start + 100ms);  // and then it waits
  CHECK(inquiry.is_settled({1}, start + 100ms));
  CHECK(inquiry.waits_for(1, start + 100ms) == Ranks{0});
  inquiry.hear(1, {}, start + 200ms);  // from there on it has its time again
  CHECK(inquiry.whom_to_ask({1}, start + 210ms) == Ranks{1});
  CHECK_FALSE(inquiry.is_settled({1}, start + 280ms));
  CHECK(inquiry.is_settled({1}, start + 281ms));
}
