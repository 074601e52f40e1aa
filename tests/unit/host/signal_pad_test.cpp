// SPDX-License-Identifier: Apache-2.0
#include <cohort/host/signal_pad.hpp>
#include <cstddef>
#include <set>

#include "support/catch.hpp"

using namespace cohort;
using namespace cohort::host;
using namespace cohort::test;

TEST_CASE("signals of different words share no lines", "[host]") {
  CHECK(sizeof(Ticket) == 2 * 64);
  CHECK(offsetof(Ticket, strides) == 64);  // what every call reads is one line
  CHECK(alignof(SignalPad) == kSignalAlignment);
  CHECK(offsetof(SignalPad, finished) == 2 * kSignalAlignment);
  CHECK(offsetof(SignalPad, presence) == 3 * kSignalAlignment);
  CHECK(sizeof(ChannelEnd) == kSignalAlignment);
}

TEST_CASE("the parts of a pad do not overlap", "[host]") {
  for (const int ranks : {2, 3, 8, 64}) {
    for (const std::size_t slot : {std::size_t{4096}, std::size_t{1} << 20}) {
      const PadGeometry pad{.ranks = ranks, .slot_bytes = slot};
      std::size_t end = sizeof(SignalPad);
      const auto follows = [&](std::size_t begin, std::size_t bytes) {
        REQUIRE(begin >= end);
        REQUIRE(begin % 64 == 0);
        end = begin + bytes;
      };
      follows(pad.channel_ends(), static_cast<std::size_t>(ranks) * sizeof(ChannelEnd));
      follows(pad.slot(2), slot);
      follows(pad.slot(3), slot);
      for (int r = 0; r < ranks; ++r) {
        for (std::uint64_t number = 0; number < kParcels; ++number) {
          follows(pad.parcel(r, number), sizeof(ParcelHeader) + kParcelBytes);
        }
      }
      CHECK(pad.bytes() >= end);
      CHECK(pad.bytes() % 4096 == 0);
    }
  }
}

TEST_CASE("slots and parcels alternate", "[host]") {
  const PadGeometry pad{.ranks = 2, .slot_bytes = 4096};
  CHECK(pad.slot(1) == pad.slot(3));
  CHECK(pad.slot(1) != pad.slot(2));
  CHECK(pad.parcel(1, 0) == pad.parcel(1, kParcels));
}

TEST_CASE("calls differ by everything that must agree", "[host]") {
  const Call call{.operation = Operation::all_gather, .dtype = DType::f32, .bytes = 64};
  Call other = call;
  CHECK(other == call);
  other.dim = 1;
  CHECK_FALSE(other == call);
  other = call;
  other.mix(3);
  CHECK_FALSE(other == call);
  Call swapped = call;
  swapped.mix(2);
  swapped.mix(3);
  other.mix(2);
  CHECK_FALSE(other == swapped);  // the order of extents counts
  CHECK_THAT(describe(call), contains("all_gather", "64 bytes", "f32"));
}
