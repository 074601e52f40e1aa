// SPDX-License-Identifier: Apache-2.0
#include <sched.h>

#include <cohort/host/group_pads.hpp>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <set>
#include <vector>

#include "support/catch.hpp"
#include "support/rendezvous_ranks.hpp"
#include "support/skip.hpp"

using namespace cohort;
using namespace cohort::host;
using namespace cohort::test;

TEST_CASE("what one rank fills is what the others read, each at a place of its own", "[host]") {
  const PadGeometry geometry = small_pads(3);
  const auto files = pads_of(geometry);
  const GroupPads one(files, geometry, 1);
  const GroupPads two(files, geometry, 2);
  CHECK(one.rank() == 1);
  CHECK(one.size() == 3);
  CHECK(one.slot_bytes() == 4096);
  CHECK(&one.own_head() == &two.head(1));
  CHECK(&one.own_head() != &two.own_head());
  CHECK(&one.channel(1, 2) == &two.channel(1, 2));
  CHECK(one.own_slot(5) == two.slot_of(1, 5));
  CHECK(one.own_slot(5) == one.own_slot(7));
  CHECK(one.own_parcel(2, 3) == two.parcel_of(1, 3));
  CHECK(one.own_parcel(2, 3) == one.own_parcel(2, 3 + kParcels));
  std::set<const void*> places{&one.own_head(), one.own_slot(0), one.own_slot(1)};
  std::size_t count = 3;
  for (const int peer : {0, 1, 2}) {
    places.insert(&one.channel(1, peer));
    ++count;
    for (std::uint64_t number = 0; number < kParcels; ++number) {
      places.insert(one.own_parcel(peer, number));
      ++count;
    }
  }
  CHECK(places.size() == count);
}

TEST_CASE("a rank is here until its presence says otherwise", "[host]") {
  const PadGeometry geometry = small_pads(2);
  const auto files = pads_of(geometry);
  const GroupPads pads(files, geometry, 0);
  CHECK(pads.presence_of(0) == Presence::here);
  pads.head(1).presence = Presence::gave_up;
  CHECK(pads.presence_of(1) == Presence::gave_up);
  CHECK(pads.presence_of(0) == Presence::here);
}

TEST_CASE("processors are those that the ranks may run on, all together", "[host]") {
  cpu_set_t allowed;
  REQUIRE(sched_getaffinity(0, sizeof(allowed), &allowed) == 0);
  if (skip_if(CPU_COUNT(&allowed) < 2, "needs two processors")) {
    return;
  }
  std::vector<std::size_t> two;
  for (std::size_t cpu = 0; two.size() < 2; ++cpu) {
    if (CPU_ISSET(cpu, &allowed)) {
      two.push_back(cpu);
    }
  }
  const PadGeometry geometry{.ranks = 2, .slot_bytes = 4096};
  const auto pad_of_rank_on = [&](std::size_t cpu) {
    auto pad = make_shared_memory(geometry.bytes(), Commit::at_first_access);
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    REQUIRE(sched_setaffinity(0, sizeof(one), &one) == 0);
    GroupPads::construct(*pad, geometry);
    REQUIRE(sched_setaffinity(0, sizeof(allowed), &allowed) == 0);
    return pad;
  };
  const auto first = pad_of_rank_on(two[0]);
  const auto second = pad_of_rank_on(two[1]);
  CHECK(GroupPads({first, second}, geometry, 0).processors() == 2);
  CHECK(GroupPads({first, pad_of_rank_on(two[0])}, geometry, 0).processors() == 1);
}
