// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <chrono>
#include <cohort/host/rendezvous.hpp>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "support/catch.hpp"
#include "support/rendezvous_ranks.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::host;
using namespace cohort::test;
using namespace std::chrono_literals;

TEST_CASE("what is in a slot at a step is what peers read at that step", "[host]") {
  const int n = GENERATE(2, 3, 8);
  meet(n, kRanksTimeLimit, [n](Rendezvous& rendezvous) {
    for (std::uint64_t step = 1; step <= 300; ++step) {
      auto* words = reinterpret_cast<std::uint64_t*>(rendezvous.next_slot());
      for (std::size_t i = 0; i < 512; ++i) {
        words[i] = step * 100 + static_cast<std::uint64_t>(rendezvous.rank());
      }
      rendezvous.enter(Call{.bytes = step}, showing(Place::slot));
      for (int r = 0; r < n; ++r) {
        const Ticket& ticket = rendezvous.await(r);
        check_equal(ticket.call.bytes, step, "ticket");
        const auto* theirs = reinterpret_cast<const std::uint64_t*>(rendezvous.slot_of(r));
        for (const std::size_t i : {std::size_t{0}, std::size_t{511}}) {
          check_equal(theirs[i], step * 100 + static_cast<std::uint64_t>(r), "slot");
        }
      }
    }
  });
}

TEST_CASE("a rank that showed its memory waits until all have read it", "[host]") {
  std::vector<std::uint64_t> shown(3);
  meet(3, kRanksTimeLimit, [&](Rendezvous& rendezvous) {
    for (std::uint64_t step = 1; step <= 300; ++step) {
      shown[static_cast<std::size_t>(rendezvous.rank())] = step;
      rendezvous.enter(Call{}, showing(Place::direct));
      rendezvous.await_all();
      for (const auto value : shown) {
        check_equal(value, step, "exposed memory");
      }
      rendezvous.finish_reading();
      rendezvous.await_readers();
    }
  });
}

TEST_CASE("messages keep their order and wait only for room", "[host]") {
  meet(2, kRanksTimeLimit, [](Rendezvous& rendezvous) {
    const int peer = 1 - rendezvous.rank();
    const auto send = [&](std::uint64_t word, std::size_t bytes) {
      rendezvous.send(peer, {.bytes = bytes},
                      [&](std::size_t first, std::size_t count, std::byte* to) {
                        std::fill_n(to, count, static_cast<std::byte>(word + first / kParcelBytes));
                      });
    };
    const auto receive = [&](std::uint64_t word, std::size_t bytes) {
      std::size_t seen = 0;
      rendezvous.receive(
          peer, {.bytes = bytes}, [&](std::size_t first, std::size_t count, const std::byte* from) {
            check_equal(first, seen, "pieces in order");
            seen += count;
            check(from[count - 1] == static_cast<std::byte>(word + first / kParcelBytes),
                  "content");
          });
      check_equal(seen, bytes, "whole message");
    };
    for (std::uint64_t round = 0; round < 50; ++round) {
      for (std::uint64_t i = 0; i < kParcels; ++i) {
        send(round + i, 100);  // both directions outstanding
      }
      for (std::uint64_t i = 0; i < kParcels; ++i) {
        receive(round + i, 100);
      }
    }
    const std::size_t large = 10 * kParcelBytes + 3;
    if (rendezvous.rank() == 0) {
      send(1, large);
      receive(2, large);
    } else {
      receive(1, large);
      send(2, large);
    }
  });
}

TEST_CASE("a message that changes its size on the way is refused", "[host]") {
  const PadGeometry geometry = small_pads(2);
  const auto pads = pads_of(geometry);
  Rendezvous sender(pads, geometry, 0, "test", 1000ms);
  Rendezvous receiver(pads, geometry, 1, "test", 1000ms);
  const std::size_t bytes = 2 * kParcelBytes;
  sender.send(1, {.bytes = bytes}, [](std::size_t, std::size_t, std::byte*) {});
  new (pads[0]->data() + geometry.parcel(1, 1))
      ParcelHeader{{.bytes = 3 * kParcelBytes}, kParcelBytes};
  CHECK_THROWS_MATCHES(
      receiver.receive(0, {.bytes = bytes}, [](std::size_t, std::size_t, const std::byte*) {}),
      TransportError, says("byte 65536", "rank 0", "196608"));
  CHECK(receiver.departure().failed());
}
