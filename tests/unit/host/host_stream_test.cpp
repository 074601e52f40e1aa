// SPDX-License-Identifier: Apache-2.0
#include <cohort/call_time.hpp>
#include <cohort/host/host_stream.hpp>
#include <memory>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using namespace cohort::test;
using namespace std::chrono_literals;

TEST_CASE("work runs before submit returns, in order", "[host]") {
  HostStream stream;
  std::vector<int> order;
  for (int i = 0; i < 3; ++i) {
    stream.submit([&order, i] { order.push_back(i); });
    CHECK(order.size() == static_cast<std::size_t>(i + 1));
  }
  CHECK(order == std::vector<int>{0, 1, 2});
  stream.ref().synchronize(1ms);
  CHECK(stream.ref().capture_id() == 0);
}

TEST_CASE("captured work runs at every launch and never before", "[host]") {
  HostStream stream;
  int runs = 0;
  stream.begin_capture();
  stream.submit([&] { ++runs; });
  CHECK(stream.ref().capture_id() != 0);
  const auto graph = stream.end_capture();
  CHECK(stream.ref().capture_id() == 0);
  CHECK(runs == 0);
  graph->launch(stream);
  graph->launch(StreamRef{});
  CHECK(runs == 2);
}

TEST_CASE("a launch inside a capture is recorded, and outlives the inner graph", "[host]") {
  HostStream stream;
  int runs = 0;
  stream.begin_capture();
  stream.submit([&] { ++runs; });
  auto inner = stream.end_capture();
  stream.begin_capture();
  inner->launch(stream);
  inner->launch(stream);
  const auto outer = stream.end_capture();
  inner.reset();
  CHECK(runs == 0);
  outer->launch(stream);
  CHECK(runs == 2);
}

TEST_CASE("no two captures share a number", "[host]") {
  HostStream a;
  HostStream b;
  std::set<CaptureId> ids;
  for (int i = 0; i < 4; ++i) {
    a.begin_capture();
    b.begin_capture();
    ids.insert(a.ref().capture_id());
    ids.insert(b.ref().capture_id());
    (void)a.end_capture();
    (void)b.end_capture();
  }
  CHECK(ids.size() == 8);
}

TEST_CASE("what a capture retains lives as long as the graph", "[host]") {
  HostStream stream;
  auto object = std::make_shared<int>(5);
  const std::weak_ptr<int> watch = object;
  stream.begin_capture();
  stream.ref().retain_in_capture(object);
  auto graph = stream.end_capture();
  object.reset();
  CHECK_FALSE(watch.expired());
  graph.reset();
  CHECK(watch.expired());
  CHECK_THROWS_AS(stream.ref().retain_in_capture(std::make_shared<int>(1)), UsageError);
}

TEST_CASE("a stream that waits for a capturing one joins its capture", "[host]") {
  HostStream main;
  HostStream side;
  HostStream other;
  std::vector<int> order;
  main.begin_capture();
  main.submit([&] { order.push_back(0); });
  side.ref().wait_for(main);
  CHECK(side.ref().capture_id() == main.ref().capture_id());
  side.submit([&] { order.push_back(1); });
  main.ref().wait_for(side);
  main.submit([&] { order.push_back(2); });
  CHECK_THROWS_MATCHES(side.end_capture(), UsageError, says("another stream"));
  other.begin_capture();
  CHECK_THROWS_MATCHES(other.ref().wait_for(main), UsageError, says("different captures"));
  (void)other.end_capture();
  const auto graph = main.end_capture();
  CHECK(side.ref().capture_id() == 0);
  CHECK(order.empty());
  graph->launch(main);
  CHECK(order == std::vector<int>{0, 1, 2});
}

TEST_CASE("captures out of order are refused", "[host]") {
  HostStream stream;
  CHECK_THROWS_MATCHES(stream.end_capture(), UsageError, says("not capturing"));
  stream.begin_capture();
  CHECK_THROWS_MATCHES(stream.begin_capture(), UsageError, says("already"));
  CHECK_THROWS_MATCHES(stream.ref().synchronize(1ms), UsageError, says("capturing"));
  (void)stream.end_capture();
}

TEST_CASE("an exception of captured work comes out of launch", "[host]") {
  HostStream stream;
  int after = 0;
  stream.begin_capture();
  stream.submit([] { throw std::runtime_error("broken"); });
  stream.submit([&] { ++after; });
  const auto graph = stream.end_capture();
  CHECK_THROWS_WITH(graph->launch(stream), "broken");
  CHECK(after == 0);
}

TEST_CASE("a stream that ends in a capture of its own frees those that joined", "[host]") {
  HostStream joined;
  int runs = 0;
  const auto needed = std::make_shared<int>(7);
  const auto event = host_stream_driver().make_event();
  {
    HostStream origin;
    HostStream also_joined;  // ends first, and ends nothing
    origin.begin_capture();
    also_joined.ref().wait_for(origin);
    joined.ref().wait_for(origin);
    host_stream_driver().record(*event, joined.ref().native());
    joined.ref().retain_in_capture(needed);
    joined.submit([&] { runs += 100; });
    CHECK(joined.ref().capture_id() != 0);
  }
  CHECK(needed.use_count() == 1);
  CHECK(joined.ref().capture_id() == 0);
  joined.submit([&] { ++runs; });
  CHECK(runs == 1);
  CHECK_THROWS_AS(joined.end_capture(), UsageError);
  CHECK_NOTHROW(joined.ref().synchronize(1ms));
  host_stream_driver().wait(joined.ref().native(), *event);  // of a capture that is over
  CHECK(joined.ref().capture_id() == 0);
  joined.begin_capture();
  joined.submit([&] { ++runs; });
  joined.end_capture()->launch(joined);
  CHECK(runs == 2);
}

TEST_CASE("the calls of a graph have their time limit each", "[host]") {
  HostStream stream;
  std::vector<std::chrono::steady_clock::duration> left;
  const auto call = [&] {
    const cohort::detail::CallTime time;
    const cohort::detail::LimitedWait wait(800ms);
    left.push_back(wait.deadline() - wait.start());
    std::this_thread::sleep_for(5ms);
  };
  stream.begin_capture();
  stream.submit(call);
  stream.submit(call);
  const auto graph = stream.end_capture();
  stream.begin_capture();
  graph->launch(stream);
  stream.end_capture()->launch(stream);
  graph->launch(stream);
  CHECK(left == std::vector<std::chrono::steady_clock::duration>(4, 800ms));
}

TEST_CASE("the steps of a recorded call share its time limit", "[host]") {
  HostStream stream;
  std::vector<std::chrono::steady_clock::duration> left;
  const auto step = [&] {
    const cohort::detail::CallTime time;
    const cohort::detail::LimitedWait wait(800ms);
    left.push_back(wait.deadline() - wait.start());
    std::this_thread::sleep_for(5ms);
  };
  stream.begin_capture();
  for (int i = 0; i < 2; ++i) {
    const cohort::detail::CallTime call;
    stream.submit(step);
    stream.submit(step);
  }
  const auto graph = stream.end_capture();
  for (int replay = 0; replay < 2; ++replay) {
    left.clear();
    graph->launch(stream);
    REQUIRE(left.size() == 4);
    CHECK(left[0] == 800ms);
    CHECK(left[1] <= 795ms);
    CHECK(left[2] == 800ms);
    CHECK(left[3] <= 795ms);
  }
}

TEST_CASE("recorded calls of two threads do not share a time limit", "[host]") {
  HostStream stream;
  std::vector<std::chrono::steady_clock::duration> left;
  stream.begin_capture();
  for (int i = 0; i < 2; ++i) {
    std::thread([&] {
      const cohort::detail::CallTime call;
      stream.submit([&] {
        const cohort::detail::LimitedWait wait(800ms);
        left.push_back(wait.deadline() - wait.start());
        std::this_thread::sleep_for(5ms);
      });
    }).join();
  }
  stream.end_capture()->launch(stream);
  CHECK(left == std::vector<std::chrono::steady_clock::duration>(2, 800ms));
}

TEST_CASE("enqueue copies arguments only where it must", "[host]") {
  struct Counted {
    int* copies;
    explicit Counted(int* c) : copies(c) {}
    Counted(const Counted& o) : copies(o.copies) { ++*copies; }
  };
  HostStream stream;
  int copies = 0;
  int ran = 0;
  const Counted argument(&copies);
  const auto body = [&](const Counted&) { ++ran; };
  host::enqueue(StreamRef{}, body, argument);
  host::enqueue(stream, body, argument);
  CHECK(ran == 2);
  CHECK(copies == 0);
  stream.begin_capture();
  host::enqueue(stream, body, argument);
  CHECK(ran == 2);
  CHECK(copies > 0);
  stream.end_capture()->launch(stream);
  CHECK(ran == 3);
}

TEST_CASE("a launch checks the owners of its work before any of it runs", "[host]") {
  HostStream stream;
  int ran = 0;
  const auto owner = std::make_shared<Lifeline>("the owner");
  CHECK_THROWS_AS(stream.ref().check_at_launch(owner), UsageError);  // it is not capturing
  stream.begin_capture();
  stream.submit([&] { ++ran; });
  stream.ref().check_at_launch(owner);
  stream.ref().check_at_launch(owner);
  CHECK(owner.use_count() == 2);  // kept once
  const auto graph = stream.end_capture();
  graph->launch(stream);
  CHECK(ran == 1);
  owner->end();
  CHECK_THROWS_AS(graph->launch(stream), UsageError);
  CHECK(ran == 1);
}

TEST_CASE("a launch checks the owners of graphs that it replays before any work", "[host]") {
  HostStream stream;
  int ran = 0;
  const auto owner = std::make_shared<Lifeline>("the owner");
  stream.begin_capture();
  stream.ref().check_at_launch(owner);
  const auto inner = stream.end_capture();
  stream.begin_capture();
  stream.submit([&] { ++ran; });
  inner->launch(stream);
  const auto middle = stream.end_capture();
  stream.begin_capture();
  stream.submit([&] { ++ran; });
  middle->launch(stream);
  const auto outer = stream.end_capture();
  outer->launch(stream);
  CHECK(ran == 2);
  owner->end();
  CHECK_THROWS_MATCHES(outer->launch(stream), UsageError, says("the owner", "shutdown"));
  CHECK_THROWS_AS(middle->launch(stream), UsageError);
  CHECK(ran == 2);
}

TEST_CASE("a recorded call checks its owner before any work of the graph", "[host]") {
  HostStream stream;
  int ran = 0;
  const auto owner = std::make_shared<Lifeline>("the owner");
  const auto body = [&] { ++ran; };
  host::enqueue_call(owner, stream, body);
  host::enqueue_call(owner, {}, body);
  CHECK(ran == 2);
  stream.begin_capture();
  host::enqueue(stream, body);
  host::enqueue_call(owner, stream, body);
  const auto graph = stream.end_capture();
  graph->launch(stream);
  CHECK(ran == 4);
  owner->end();
  CHECK_THROWS_MATCHES(graph->launch(stream), UsageError, says("the owner", "shutdown"));
  CHECK(ran == 4);
}
