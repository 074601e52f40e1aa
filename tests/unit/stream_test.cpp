// SPDX-License-Identifier: Apache-2.0
#include "cohort/stream.hpp"

#include <memory>
#include <utility>
#include <vector>

#include "cohort/error.hpp"
#include "cohort/host/host_stream.hpp"
#include "support/catch.hpp"

using namespace cohort;
using cohort::test::says;

TEST_CASE("devices have names", "[stream]") {
  CHECK(to_string(Device{}) == "host");
  CHECK(to_string(Device{DeviceKind::cuda, 3}) == "cuda:3");
  CHECK(Device{DeviceKind::cuda, 1} != Device{DeviceKind::cuda, 2});
}

TEST_CASE("stream references compare by stream", "[stream]") {
  HostStream a;
  HostStream b;
  CHECK_FALSE(StreamRef{}.valid());
  CHECK(a.ref().valid());
  CHECK(a.ref() == a.ref());
  CHECK(a.ref() != b.ref());
  CHECK(a.ref() != StreamRef{});
  CHECK(a.ref().by_words() == a.ref());
  CHECK_FALSE(StreamRef{}.by_words().valid());
}

TEST_CASE("a reference to no stream refuses to work", "[stream]") {
  const StreamRef none;
  HostStream stream;
  CHECK_THROWS_MATCHES(none.submit([] {}), UsageError, says("submit", "got none"));
  CHECK_THROWS_MATCHES(none.wait_for(stream), UsageError, says("wait_for", "got none"));
  CHECK_THROWS_MATCHES(stream.ref().wait_for(none), UsageError, says("signaller", "got none"));
  CHECK_THROWS_MATCHES(none.capture_id(), UsageError, says("capture_id", "got none"));
  CHECK_THROWS_MATCHES(none.retain_in_capture(nullptr), UsageError, says("got none"));
  CHECK_THROWS_MATCHES(none.synchronize(std::chrono::milliseconds(1)), UsageError,
                       says("synchronize", "got none"));
  CHECK_THROWS_MATCHES(stream.submit({}), UsageError, says("submit work", "empty"));
}

TEST_CASE("a host stream runs work at once, or at every replay", "[stream]") {
  HostStream stream;
  std::vector<int> seen;
  stream.submit([&] { seen.push_back(1); });
  CHECK(seen == std::vector{1});
  CHECK(stream.ref().capture_id() == 0);

  stream.begin_capture();
  const auto id = stream.ref().capture_id();
  CHECK(id != 0);
  stream.submit([&] { seen.push_back(2); });
  stream.submit([&] { seen.push_back(3); });
  CHECK(seen.size() == 1);
  const auto graph = stream.end_capture();
  CHECK(seen.size() == 1);
  graph->launch(stream);
  graph->launch({});
  CHECK(seen == std::vector{1, 2, 3, 2, 3});

  stream.begin_capture();
  CHECK(stream.ref().capture_id() != id);
  CHECK_THROWS_AS(stream.begin_capture(), UsageError);
  CHECK_THROWS_AS(stream.ref().synchronize(std::chrono::milliseconds(1)), UsageError);
  stream.end_capture().reset();
  CHECK_THROWS_AS(stream.end_capture(), UsageError);
  stream.ref().synchronize(std::chrono::milliseconds(1));
}

TEST_CASE("a stream that waits for a capturing one joins its capture", "[stream]") {
  HostStream origin;
  HostStream joined;
  std::vector<int> seen;
  origin.begin_capture();
  joined.ref().wait_for(origin);
  CHECK(joined.ref().capture_id() == origin.ref().capture_id());
  joined.submit([&] { seen.push_back(1); });
  CHECK_THROWS_AS(joined.end_capture(), UsageError);
  origin.ref().wait_for(joined);
  const auto graph = origin.end_capture();
  CHECK(joined.ref().capture_id() == 0);
  CHECK(seen.empty());
  graph->launch(origin);
  CHECK(seen == std::vector{1});
}

TEST_CASE("streams that joined a capture keep nothing of it", "[stream]") {
  HostStream origin;
  HostStream joined;
  const auto object = std::make_shared<int>(1);
  origin.begin_capture();
  joined.ref().wait_for(origin);
  joined.submit([object] {});
  joined.ref().retain_in_capture(object);
  origin.ref().wait_for(joined);
  auto graph = origin.end_capture();
  CHECK(object.use_count() == 3);
  graph.reset();
  CHECK(object.use_count() == 1);
}

TEST_CASE("a capture keeps what it retains until its graph goes", "[stream]") {
  HostStream stream;
  auto object = std::make_shared<int>(1);
  CHECK_THROWS_AS(stream.ref().retain_in_capture(object), UsageError);
  stream.begin_capture();
  stream.ref().retain_in_capture(object);
  auto graph = stream.end_capture();
  CHECK(object.use_count() == 2);
  graph->launch(stream);
  CHECK(object.use_count() == 2);
  graph.reset();
  CHECK(object.use_count() == 1);
}
