// SPDX-License-Identifier: Apache-2.0
#include "cohort/flight_ring.hpp"

#include <cstdint>
#include <memory>
#include <set>
#include <thread>

#include "support/catch.hpp"

using namespace cohort;

TEST_CASE("calls and paths have names", "[flight_ring]") {
  std::set<std::string_view> names;
  for (int call = 0; call <= static_cast<int>(TraceCall::launch); ++call) {
    CHECK(names.insert(to_string(static_cast<TraceCall>(call))).second);
  }
  CHECK(to_string(TraceCall::launch) == "launch");
  CHECK(to_string(static_cast<TraceCall>(200)) == "unknown");
  names.clear();
  for (std::size_t path = 0; path < kCallPaths; ++path) {
    CHECK(names.insert(to_string(static_cast<CallPath>(path))).second);
  }
  CHECK(to_string(CallPath::nccl_symmetric) == "nccl symmetric");
}

TEST_CASE("a ring keeps the last records", "[flight_ring]") {
  const auto ring = std::make_unique<TraceRing>();
  CHECK_FALSE(TraceRing::at(ring->records, 1).has_value());
  constexpr std::uint64_t kLast = TraceRing::kRecords + 3;
  for (std::uint64_t sequence = 1; sequence <= kLast; ++sequence) {
    TraceRing::push(ring->records, ring->calls,
                    {.sequence = sequence, .where = 7 * sequence, .call = TraceCall::barrier});
  }
  CHECK(ring->calls == kLast);
  CHECK_FALSE(TraceRing::at(ring->records, 3).has_value());
  for (std::uint64_t sequence = 4; sequence <= kLast; ++sequence) {
    const auto record = TraceRing::at(ring->records, sequence);
    REQUIRE(record.has_value());
    CHECK(record->where == 7 * sequence);
  }
}

TEST_CASE("who reads while another writes gets whole records or none", "[flight_ring]") {
  const auto ring = std::make_unique<TraceRing>();
  constexpr std::uint64_t kLast = 20'000;
  std::thread writer([&] {
    for (std::uint64_t sequence = 1; sequence <= kLast; ++sequence) {
      TraceRing::push(ring->records, ring->calls,
                      {.sequence = sequence, .ticks = sequence, .where = ~sequence});
    }
  });
  std::uint64_t torn = 0;
  std::uint64_t last = 0;
  while (last < kLast) {
    last = TraceRing::load(ring->calls);
    if (const auto record = last == 0 ? std::nullopt : TraceRing::at(ring->records, last)) {
      torn += record->ticks == last && record->where == ~last ? 0U : 1U;
    }
  }
  writer.join();
  CHECK(torn == 0);
}

TEST_CASE("a look at a device tells what has ended, what has not, and what nobody knows",
          "[flight_ring]") {
  struct Want {
    std::uint64_t entered, left, perhaps_left;
  };
  const auto look = [](const DeviceLook& seen, std::uint64_t settled, const Want& want) {
    TraceProgress progress{.issued = 9, .settled = settled};
    TraceRing::look(progress, seen);
    CHECK(progress.issued == 9);
    CHECK(progress.entered == want.entered);
    CHECK(progress.left == want.left);
    CHECK(progress.perhaps_left == want.perhaps_left);
  };
  look({.begun = 7}, 0, {7, 6, 7});
  look({.begun = 7}, 6, {7, 6, 7});
  look({.begun = 7}, 7, {7, 7, 7});  // the host waited for it
  look({.begun = 7, .over = true}, 0, {7, 7, 7});
  look({.begun = 7, .waits = true}, 6, {7, 6, 6});
  look({}, 0, {0, 0, 0});
  look({.over = true}, 0, {0, 0, 0});
}

TEST_CASE("signatures tell calls and arguments apart", "[flight_ring]") {
  const auto of = [](TraceCall call, const Dims& shape, int variant) {
    return TraceSignature(call).mix(shape).mix(variant).word();
  };
  std::set<std::uint32_t> words;
  for (const TraceCall call : {TraceCall::all_gather, TraceCall::all_reduce}) {
    for (const Dims& shape : {Dims{}, Dims{0}, Dims{1}, Dims{1, 1}, Dims{2, 3}, Dims{3, 2}, Dims{6},
                              Dims{std::int64_t{1} << 40}}) {
      for (const int variant : {0, 1, 3}) {
        CHECK(words.insert(of(call, shape, variant)).second);
      }
    }
  }
  CHECK(of(TraceCall::all_gather, {2, 3}, 1) == of(TraceCall::all_gather, {2, 3}, 1));
}
