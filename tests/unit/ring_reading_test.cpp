// SPDX-License-Identifier: Apache-2.0
#include "cohort/ring_reading.hpp"

#include <unistd.h>

#include <cstdint>
#include <memory>

#include "support/catch.hpp"

using namespace cohort;
using cohort::test::contains;

// What recorders make of them: flight_recorder_test.cpp.

namespace {

/// A ring of its own, which its writer fills.
struct Written {
  std::unique_ptr<TraceRing> ring = std::make_unique<TraceRing>();

  Written() {
    ring->process = ::getpid();
    ring->process_namespace = pid_namespace();
    ring->process_start = process_start_time("self");
  }
  /// A call, and whether all ranks make it.
  void add(TraceCall call, bool numbered = true, std::int32_t variant = 0) const {
    ring->numbered += numbered ? 1 : 0;
    TraceRing::push(ring->records, ring->calls,
                    {.sequence = ring->calls + 1,
                     .number = numbered ? static_cast<std::uint32_t>(ring->numbered) : 0,
                     .call = call,
                     .flags = numbered ? TraceRecord::kNumbered : std::uint8_t{0},
                     .variant = variant});
  }
};

}  // namespace

TEST_CASE("the call to compare is the open one, or the launch that runs", "[ring_reading]") {
  const Written one;
  CHECK_FALSE(open_call_in(*one.ring));
  one.add(TraceCall::all_gather);
  CHECK_FALSE(open_call_in(*one.ring));  // it has ended
  one.ring->open = 1;
  const auto open = open_call_in(*one.ring);
  REQUIRE(open);
  CHECK(open->number == 1);
  CHECK(open->text == "all_gather #1");
  one.add(TraceCall::recv, false);
  one.ring->open = 2;
  CHECK(open_call_in(*one.ring)->number == 0);
  one.ring->open = 0;
  one.add(TraceCall::launch);
  CHECK(open_call_in(*one.ring)->text == "launch #2");
}

TEST_CASE("a record is told by its call, its number and its note", "[ring_reading]") {
  const Written one;
  const auto last = [&one] {
    return describe_record(*one.ring, *TraceRing::at(one.ring->records, one.ring->calls));
  };
  one.add(TraceCall::all_gather);
  CHECK(last() == "all_gather #1");
  one.add(TraceCall::send, false);
  CHECK(last() == "send");
  one.ring->notes[4] = {.sequence = 5, .text = {'g', 'r', 'o', 'w'}};
  one.add(TraceCall::agreement, true, 5);
  CHECK(last() == "agreement #2, grow");
  one.add(TraceCall::agreement, true, 5 - static_cast<int>(TraceRing::kNotes));
  CHECK(last() == "agreement #3");  // whose note was overwritten
}

TEST_CASE("the last call that all ranks make is found behind others", "[ring_reading]") {
  const Written one;
  CHECK_FALSE(last_numbered(*one.ring).has_value());
  one.add(TraceCall::all_reduce);
  for (std::size_t i = 0; i + 1 < TraceRing::kRecords; ++i) {
    one.add(TraceCall::send, false);
  }
  REQUIRE(last_numbered(*one.ring).has_value());
  CHECK(last_numbered(*one.ring)->call == TraceCall::all_reduce);
  one.add(TraceCall::recv, false);
  CHECK_FALSE(last_numbered(*one.ring).has_value());
}

TEST_CASE("who has made fewer calls is behind", "[ring_reading]") {
  const Written mine;
  const Written theirs;
  CHECK(behind_in(*mine.ring, 1, *theirs.ring).empty());
  mine.add(TraceCall::all_reduce);
  CHECK(behind_in(*mine.ring, 1, *theirs.ring) ==
        "rank 1 has not come to all_reduce #1; its last call is none");
  theirs.add(TraceCall::all_reduce);
  CHECK(behind_in(*mine.ring, 1, *theirs.ring).empty());
  mine.add(TraceCall::barrier);
  CHECK(behind_in(*mine.ring, 1, *theirs.ring) ==
        "rank 1 has not come to barrier #2; its last call is all_reduce #1");
  CHECK(behind_in(*theirs.ring, 0, *mine.ring).empty());
  CHECK_FALSE(writer_ended(*theirs.ring));
  theirs.ring->process_start = 1;  // the number belongs to another process now
  CHECK(writer_ended(*theirs.ring));
  CHECK_THAT(behind_in(*mine.ring, 1, *theirs.ring), contains(", and its process is gone"));
  theirs.ring->process_namespace = 0;  // in which nobody here can look
  CHECK_FALSE(writer_ended(*theirs.ring));
}
