// SPDX-License-Identifier: Apache-2.0
#include "cohort/captured_calls.hpp"

#include <memory>

#include "support/catch.hpp"

using namespace cohort;

// What recorders make of them: flight_recorder_test.cpp.

namespace {

constexpr TraceRecord kReduce{.signature = 5, .call = TraceCall::all_reduce};
constexpr TraceRecord kSend{.signature = 6, .call = TraceCall::send};

}  // namespace

TEST_CASE("a list counts its calls, and signs those that all ranks make", "[flight_recorder]") {
  const auto ring = std::make_unique<TraceRing>();
  CapturedCalls calls;
  CHECK(calls.empty());
  CHECK(calls.find(9) == nullptr);
  CHECK(calls.add(*ring, kReduce, true, 9, 2) == 1);
  calls.end(*ring, 9, 2, 3, static_cast<std::size_t>(CallPath::own), 40);
  CHECK(calls.add(*ring, kSend, false, 9, 2) == 2);
  calls.end(*ring, 9, 2, 1, static_cast<std::size_t>(CallPath::own), 2);
  CHECK(calls.add(*ring, kReduce, true, 8, 0) == 3);
  const CapturedCalls::List* const list = calls.find(9);
  REQUIRE(list != nullptr);
  CHECK(list->number == 1);
  CHECK(list->calls == 2);
  CHECK(list->collectives == 1);
  REQUIRE(list->steps.size() == 1);
  CHECK(list->steps[0] == std::pair<std::uint8_t, std::uint64_t>{2, 4});
  CHECK(list->counters[static_cast<std::size_t>(CallPath::own)].calls == 2);
  CHECK(list->counters[static_cast<std::size_t>(CallPath::own)].bytes == 42);
  CHECK(list->signature.word() == TraceSignature(TraceCall::launch).mix(5).word());
  CHECK(calls.find(8)->number == 2);
  CHECK_FALSE(calls.forgot());
  const auto listed = calls.listed();
  REQUIRE(listed.size() == 3);
  CHECK(listed[0].where == 1);
  CHECK((listed[0].flags & TraceRecord::kNumbered) != 0);
  CHECK((listed[1].flags & TraceRecord::kNumbered) == 0);
  CHECK(TraceRing::at(ring->captured, 2)->call == TraceCall::send);
}

TEST_CASE("what is completed is still there", "[flight_recorder]") {
  const auto ring = std::make_unique<TraceRing>();
  CapturedCalls calls;
  for (std::size_t i = 0; i < CapturedCalls::kMostListed + 2; ++i) {
    static_cast<void>(calls.add(*ring, kReduce, true, 1, 0));
  }
  int completed = 0;
  const auto complete = [&](TraceRecord& record) {
    record.steps = 7;
    ++completed;
  };
  calls.complete(2, complete);
  CHECK(completed == 0);
  calls.complete(3, complete);
  CHECK(completed == 1);
  CHECK(calls.listed().front().steps == 7);
  CHECK(calls.listed().size() == CapturedCalls::kMostListed);
}
