// SPDX-License-Identifier: Apache-2.0
#include "cohort/stream_marks.hpp"

#include <chrono>
#include <vector>

#include "cohort/host/host_stream.hpp"
#include "support/catch.hpp"
#include "support/counting_driver.hpp"
#include "support/workspace.hpp"

using namespace cohort;
using namespace cohort::test;
using namespace std::chrono_literals;

namespace {

StreamMarks::Marks unchanged(StreamMarks& marks, StreamRef stream) {
  return marks.of(stream, [](const StreamMarks::GivenUp&) { FAIL("marks given up"); });
}

}  // namespace

TEST_CASE("a stream has one mark, and none where nobody waits for it", "[marks]") {
  CountingDriver driver;
  HostStream a;
  HostStream b;
  StreamMarks marks("test", 1000ms);
  CHECK(unchanged(marks, {}) == 0);
  CHECK(unchanged(marks, a) == 0);
  CHECK(unchanged(marks, driver.ref(a)) == 1);
  CHECK(unchanged(marks, driver.ref(b)) == 2);
  CHECK(unchanged(marks, driver.ref(a)) == 1);
  marks.order_behind(3, driver.ref(a));
  CHECK(driver.waits() == 1);  // not for itself
  marks.order_behind(3, {});
  CHECK(driver.waits() == 0);
}

TEST_CASE("marks are given up where there are more streams, by those that are not captured",
          "[marks]") {
  CountingDriver driver;
  std::vector<HostStream> streams(128);
  StreamMarks marks("test", 1000ms);
  for (std::size_t i = 0; i < 63; ++i) {
    CHECK(unchanged(marks, driver.ref(streams[i])) == StreamMarks::Marks{1} << i);
  }
  streams[5].begin_capture();
  StreamMarks::Marks gone = 0;
  StreamMarks::Marks by = 0;
  std::vector<StreamRef> had_two;
  const auto replace = [&](const StreamMarks::GivenUp& given_up) {
    gone = given_up.gone;
    by = given_up.by;
    had_two.clear();
    given_up.for_each(2, [&](StreamRef stream) { had_two.push_back(stream); });
  };
  CHECK(marks.of(driver.ref(streams[63]), replace) == 1);
  CHECK(gone == ((StreamMarks::Marks{1} << 63) - 1 - (1 << 5)));
  CHECK(by == StreamMarks::Marks{1} << 63);
  CHECK(had_two == std::vector<StreamRef>{driver.ref(streams[1])});
  CHECK(marks.anew(driver.ref(streams[63]), replace) == 1);
  CHECK(marks.anew(driver.ref(streams[2]), replace) == by);
  CHECK(unchanged(marks, driver.ref(streams[5])) == 1 << 5);
  marks.order_behind(by, driver.ref(streams[100]));
  CHECK(driver.waits() == 62);
  marks.order_behind(by, {});  // waits here, and then there is no past
  marks.order_behind(by, driver.ref(streams[100]));
  CHECK(driver.waits() == 0);
  CHECK_THROWS_AS(marks.order_behind(1 << 5, driver.ref(streams[100])), UsageError);
  CHECK_THROWS_AS(marks.order_behind(1 << 5, {}), UsageError);

  const auto capture = streams[5].ref().capture_id();
  CHECK(marks.order_within(capture, by | 1 << 5 | 1, driver.ref(streams[5])) == (by | 1));
  CHECK(driver.waits() == 0);

  // Nothing changes where every stream is being captured.
  for (std::size_t i = 64; i < 125; ++i) {
    (void)marks.of(driver.ref(streams[i]), replace);
    streams[i].begin_capture();
  }
  streams[63].begin_capture();
  CHECK_THROWS_MATCHES(marks.of(driver.ref(streams[125]), replace), UsageError,
                       says("test", "63 streams"));
  (void)streams[63].end_capture();
  CHECK(marks.of(driver.ref(streams[125]), replace) == 1);
  CHECK(gone == 1);
}

TEST_CASE("whoever waits here for several streams waits for one limit", "[marks]") {
  RecordingDriver driver;
  std::vector<RecordingDriver::State> states(64);
  StreamMarks marks("test", 600ms);
  for (auto& state : states) {  // those of the past and one that has a mark
    static_cast<void>(marks.of({driver, &state}, [](const StreamMarks::GivenUp&) {}));
  }
  driver.busy = 5ms;
  marks.order_behind(~StreamMarks::Marks{0}, {});
  REQUIRE(driver.limits.size() == 64);
  CHECK(driver.limits.front() <= 600ms);
  CHECK(driver.limits.back() <= 600ms - 63 * 5ms);
}
