// SPDX-License-Identifier: Apache-2.0
#include "cohort/flight_recorder.hpp"

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "cohort/error.hpp"
#include "cohort/host/host_stream.hpp"
#include "support/catch.hpp"
#include "support/forked.hpp"

using namespace cohort;
using cohort::test::contains;

namespace {

constexpr TraceRecord kReduce{.signature = 5, .call = TraceCall::all_reduce, .dtype = DType::bf16};

/// Two ranks' rings in one process, as in memory that both map.
struct TwoRanks {
  std::shared_ptr<TraceRing> memory = shared();  ///< Of both.
  std::unique_ptr<FlightRecorder> ranks[2];

  /// Zeros that a forked child shares.
  static std::shared_ptr<TraceRing> shared() {
    void* const pages = ::mmap(nullptr, 2 * sizeof(TraceRing), PROT_READ | PROT_WRITE,
                               MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    REQUIRE(pages != MAP_FAILED);
    return {static_cast<TraceRing*>(pages),
            [](TraceRing* rings) { ::munmap(rings, 2 * sizeof(TraceRing)); }};
  }

  TwoRanks() {
    for (int r = 0; r < 2; ++r) {
      ranks[r] = std::make_unique<FlightRecorder>(
          "tp[0]", r, std::vector{4, 5},
          TraceRings{.by_rank = {&memory.get()[0], &memory.get()[1]}, .keep = memory});
    }
  }
};

void call(FlightRecorder& recorder, CaptureId capture, std::uint64_t steps) {
  const TraceEntry entry = recorder.begin(kReduce, 100, true, {}, capture, {.steps = 10}, 2);
  recorder.end(entry, {.steps = 10 + steps, .path = CallPath::mapped}, 5);
}

}  // namespace

TEST_CASE("a call is counted with its path, bytes, waits and steps", "[flight_recorder]") {
  FlightRecorder recorder("tp[0]", 0, {0, 1}, {});
  CHECK(recorder.open_call().empty());
  const TraceEntry entry = recorder.begin(kReduce, 100, true, {}, 0, {.steps = 10}, 2);
  CHECK(recorder.open_call() == "all_reduce #1");
  recorder.end(entry, {.steps = 12, .path = CallPath::mapped}, 5);
  CHECK(recorder.open_call().empty());
  call(recorder, 0, 1);
  CHECK(recorder.counters(CallPath::mapped).calls == 2);
  CHECK(recorder.counters(CallPath::mapped).bytes == 200);
  CHECK(recorder.counters(CallPath::mapped).waits == 6);
  CHECK(recorder.counters(CallPath::own).calls == 0);
  CHECK(recorder.own().progress[0].issued == 3);
  const auto record = TraceRing::at(recorder.own().records, 1);
  REQUIRE(record.has_value());
  CHECK(record->path == CallPath::mapped);
  CHECK(record->steps == 2);
  CHECK(record->number == 1);
  CHECK(recorder.ring(1) == nullptr);
}

TEST_CASE("calls between pairs have no number", "[flight_recorder]") {
  FlightRecorder recorder("tp[0]", 0, {0, 1}, {});
  const TraceEntry entry = recorder.begin({.call = TraceCall::send}, 4, false, {}, 0, {}, 0);
  recorder.end(entry, {}, 0);
  call(recorder, 0, 1);
  CHECK(TraceRing::at(recorder.own().records, 1)->number == 0);
  CHECK(TraceRing::at(recorder.own().records, 1)->flags == 0);
  CHECK(TraceRing::at(recorder.own().records, 2)->number == 1);
  CHECK(TraceRing::at(recorder.own().records, 2)->flags == TraceRecord::kNumbered);
}

TEST_CASE("numbers go on behind 32 bits", "[flight_recorder]") {
  TwoRanks two;
  constexpr std::uint64_t kWide = std::uint64_t{1} << 32;
  for (const auto& rank : two.ranks) {
    rank->own().numbered = kWide - 2;
    call(*rank, 0, 1);
  }
  call(*two.ranks[0], 0, 1);
  TraceRing& ring = two.ranks[0]->own();
  const auto number = [&ring](std::uint64_t sequence) {
    return TraceRing::full_number(ring.numbered, *TraceRing::at(ring.records, sequence));
  };
  CHECK(number(1) == kWide - 1);
  CHECK(number(2) == kWide);
  CHECK(two.ranks[0]->behind() ==
        "rank 1 has not come to all_reduce #4294967296; its last call is all_reduce #4294967295");
  CHECK(two.ranks[1]->behind().empty());
  // A reader that looked at the last number before the record was written.
  CHECK(TraceRing::full_number(kWide - 1, *TraceRing::at(ring.records, 2)) == kWide);
}

TEST_CASE("a call that is left by an exception is under way no longer", "[flight_recorder]") {
  FlightRecorder recorder("tp[0]", 0, {0, 1}, {});
  const TraceEntry entry = recorder.begin(kReduce, 100, true, {}, 0, {.steps = 10}, 2);
  recorder.abandon(entry, {.steps = 11, .path = CallPath::mapped});
  CHECK(recorder.open_call().empty());
  CHECK(recorder.ended_calls() == 0);
  CHECK(recorder.own().progress[0].issued == 1);
  const auto record = TraceRing::at(recorder.own().records, 1);
  CHECK(record->flags == (TraceRecord::kNumbered | TraceRecord::kFailed));
  CHECK(record->steps == 1);
}

TEST_CASE("a graph's calls are listed once and counted at each launch", "[flight_recorder]") {
  FlightRecorder recorder("tp[0]", 0, {0, 1}, {});
  recorder.launch({}, 77);  // of a graph without calls of the group
  CHECK(recorder.own().calls == 0);
  call(recorder, 77, 1);
  call(recorder, 78, 1);
  call(recorder, 77, 2);
  CHECK(recorder.own().calls == 0);
  CHECK(recorder.own().listed == 3);
  CHECK(recorder.own().captures == 2);
  CHECK(recorder.counters(CallPath::mapped).calls == 0);
  recorder.launch({}, 77);
  recorder.launch({}, 77);
  recorder.launch({}, 79);
  CHECK(recorder.own().calls == 2);
  CHECK(recorder.own().progress[0].issued == 6);
  CHECK(recorder.counters(CallPath::mapped).calls == 4);
  const auto launch = TraceRing::at(recorder.own().records, 2);
  CHECK(launch->where == 1);
  CHECK(launch->number == 2);
  CHECK(launch->extents[0] == 2);
  CHECK(launch->extents[1] == 3);
  CHECK(launch->extents[2] == 1);
  recorder.launch({}, 0);  // the engine's own
  const auto unknown = TraceRing::at(recorder.own().records, 3);
  CHECK(unknown->where == 0);
  CHECK(unknown->flags == 0);
}

TEST_CASE("what only some ranks do in a graph has no number, nor does a graph of nothing else",
          "[flight_recorder]") {
  FlightRecorder sender("world", 0, {0, 1, 2}, {});
  FlightRecorder other("world", 2, {0, 1, 2}, {});
  const auto send = [&](CaptureId capture) {
    const TraceEntry entry =
        sender.begin({.signature = 8, .call = TraceCall::send}, 4, false, {}, capture, {}, 0);
    sender.end(entry, {.steps = 1, .path = CallPath::own}, 0);
  };
  send(5);
  call(sender, 5, 1);
  call(other, 5, 1);
  sender.launch({}, 5);
  other.launch({}, 5);
  const auto last = [](FlightRecorder& recorder) {
    return *TraceRing::at(recorder.own().records, recorder.own().calls);
  };
  CHECK(last(sender).number == 1);
  CHECK(last(sender).signature == last(other).signature);
  CHECK(last(sender).extents[0] == 2);
  CHECK(sender.listed()[0].number == 0);
  CHECK(sender.listed()[1].number == 1);
  send(6);  // in a graph of its own
  sender.launch({}, 6);
  CHECK(last(sender).flags == 0);
  call(sender, 0, 1);
  call(other, 0, 1);
  CHECK(last(sender).number == last(other).number);
}

TEST_CASE("each inbox of a graph is counted", "[flight_recorder]") {
  FlightRecorder recorder("tp[0]", 0, {0, 1}, {});
  for (const std::uint8_t inbox : {std::uint8_t{0}, std::uint8_t{1}}) {
    const TraceEntry entry = recorder.begin(kReduce, 4, true, {}, 5, {.inbox = inbox}, 0);
    recorder.end(entry, {.steps = 1, .inbox = inbox, .path = CallPath::own}, 0);
  }
  recorder.launch({}, 5);
  CHECK(recorder.own().progress[0].issued == 1);
  CHECK(recorder.own().progress[1].issued == 1);
  CHECK(TraceRing::at(recorder.own().records, 1)->extents[2] == 2);
}

TEST_CASE("lists of captured calls are longer than the ring that other ranks see",
          "[flight_recorder]") {
  FlightRecorder recorder("tp[0]", 0, {0, 1}, {});
  constexpr std::size_t kCalls = 3 * TraceRing::kRecords;
  for (std::size_t i = 0; i < kCalls; ++i) {
    call(recorder, 1 + i % 7, 1);
  }
  auto listed = recorder.listed();
  REQUIRE(listed.size() == kCalls);
  CHECK(listed.front().sequence == 1);
  CHECK(listed.front().path == CallPath::mapped);
  CHECK(listed.front().steps == 1);
  CHECK(listed.back().where == 1 + (kCalls - 1) % 7);
  for (std::size_t i = kCalls; i <= CapturedCalls::kMostListed; ++i) {
    call(recorder, 1, 1);
  }
  listed = recorder.listed();
  CHECK(listed.size() == CapturedCalls::kMostListed);
  CHECK(listed.front().sequence == 2);
}

TEST_CASE("a rank sees who is behind", "[flight_recorder]") {
  TwoRanks two;
  FlightRecorder& first = *two.ranks[0];
  CHECK(first.behind().empty());
  call(first, 0, 1);
  CHECK(first.behind() == "rank 1 has not come to all_reduce #1; its last call is none");
  call(*two.ranks[1], 0, 1);
  CHECK(first.behind().empty());
  call(first, 0, 1);
  CHECK(first.behind() == "rank 1 has not come to all_reduce #2; its last call is all_reduce #1");
  CHECK(two.ranks[1]->behind().empty());
  two.ranks[1]->own().process_start = 1;  // the number belongs to another process now
  CHECK_THAT(first.behind(), contains(", and its process is gone"));
}

TEST_CASE("a forked child leaves its parent's records alone", "[flight_recorder]") {
  TwoRanks two;
  FlightRecorder& recorder = *two.ranks[0];
  call(recorder, 0, 1);
  const pid_t child = ::fork();
  if (child == 0) {
    int status = 1;
    try {
      call(recorder, 0, 1);
    } catch (const UsageError&) {
      recorder.agreed(recorder.agree("growth", 1));
      recorder.close();
      status = 0;
    }
    ::_exit(status);
  }
  int status = -1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  CHECK(recorder.own().calls == 1);
  CHECK(recorder.own().ended == 0);
}

TEST_CASE("a forked child closes it though a thread of its parent's looks", "[flight_recorder]") {
  FlightRecorder recorder("tp[0]", 0, {0, 1}, {});
  std::atomic<bool> begun{false};
  std::atomic<bool> over{false};
  const auto wait = [&] {
    begun = true;
    while (!over) {
      std::this_thread::yield();
    }
  };
  recorder.look_at_device([&](TraceRing&) { wait(); });
  recorder.on_failure([&](const FlightRecorder&, const TraceFailure&) { wait(); });
  const bool looks = GENERATE(true, false);
  std::thread thread([&] { looks ? recorder.look_at_device() : recorder.failed("late", true); });
  while (!begun) {
    std::this_thread::yield();
  }
  CHECK_NOTHROW(cohort::test::run_in_child([&] {
    alarm(10);  // kills it where it waits
    recorder.on_failure({});
    recorder.close();
  }));
  over = true;
  thread.join();
}

TEST_CASE("a wait that came back ends what its stream got", "[flight_recorder]") {
  FlightRecorder recorder("tp[0]", 0, {0, 1}, {});
  HostStream streams[2];
  const auto call_on = [&](int stream, std::uint8_t inbox, CaptureId capture = 0) {
    const TraceEntry entry = recorder.begin(kReduce, 8, true, streams[stream].ref(), capture,
                                            {.steps = 3, .inbox = inbox}, 0);
    recorder.end(entry, {.steps = 5, .inbox = inbox, .path = CallPath::own}, 0);
  };
  const auto settled = [&](std::size_t inbox) { return recorder.own().progress[inbox].settled; };
  call_on(0, 0);
  recorder.settle(streams[1].ref());
  CHECK(settled(0) == 0);
  recorder.settle(streams[0].ref());
  CHECK(settled(0) == 2);

  SECTION("of those inboxes alone whose last call it had") {
    call_on(0, 0);
    call_on(0, 1);
    call_on(1, 1);
    recorder.settle(streams[0].ref());
    CHECK(settled(0) == 4);
    CHECK(settled(1) == 0);
    recorder.settle(streams[1].ref());
    CHECK(settled(1) == 4);
  }
  SECTION("launches of graphs too") {
    call_on(0, 0, 77);
    call_on(0, 1, 77);
    CHECK(settled(0) == 2);
    recorder.launch(streams[1].ref(), 77);
    recorder.settle(streams[0].ref());
    CHECK(settled(0) == 2);
    recorder.settle(streams[1].ref());
    CHECK(settled(0) == 4);
    CHECK(settled(1) == 2);
  }
  SECTION("not what another thread may be enqueueing more of") {
    call_on(0, 0);
    std::thread([&] { recorder.settle(streams[0].ref()); }).join();
    CHECK(settled(0) == 2);
    recorder.settle(streams[0].ref());
    CHECK(settled(0) == 4);
  }
  SECTION("nothing of a call that is left by an exception is missed") {
    const TraceEntry entry = recorder.begin(kReduce, 8, true, streams[0].ref(), 0, {}, 0);
    recorder.abandon(entry, {.steps = 1});
    recorder.settle(streams[0].ref());
    CHECK(settled(0) == 3);
  }
}

TEST_CASE("a recorder that is turned off notes no launches", "[flight_recorder]") {
  FlightRecorder recorder("tp[0]", 0, {0, 1}, {});
  CHECK(recorder.is_on());
  call(recorder, 77, 1);
  recorder.turn(false);
  recorder.launch({}, 77);
  CHECK_FALSE(recorder.is_on());
  CHECK(recorder.own().calls == 0);
  CHECK(recorder.own().progress[0].issued == 0);
  recorder.turn(true);
  recorder.launch({}, 77);
  CHECK(recorder.own().calls == 1);
}

TEST_CASE("the device is asked until the group closes", "[flight_recorder]") {
  FlightRecorder recorder("tp[0]", 0, {0, 1}, {});
  recorder.look_at_device();  // nothing has to be done
  int asked = 0;
  recorder.look_at_device([&](TraceRing& ring) {
    ++asked;
    ring.progress[0].left = 9;
  });
  recorder.look_at_device();
  CHECK(recorder.own().progress[0].left == 9);
  CHECK(recorder.own().looked != 0);
  recorder.close();
  recorder.look_at_device();
  CHECK(asked == 1);
  CHECK(recorder.own().ended == 1);
}
