// SPDX-License-Identifier: Apache-2.0
#include <sched.h>

#include <chrono>
#include <cohort/host/rendezvous.hpp>
#include <memory>
#include <optional>
#include <string_view>
#include <thread>
#include <vector>

#include "support/catch.hpp"
#include "support/skip.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::host;
using namespace cohort::test;
using namespace std::chrono_literals;

namespace {

Showing showing(Place place) {
  Showing result{};
  result.place = place;
  return result;
}

/// Runs `body(rendezvous)` for each of n ranks on threads of one process.
void meet(int n, std::chrono::milliseconds limit, const std::function<void(Rendezvous&)>& body) {
  const PadGeometry geometry{.ranks = n, .slot_bytes = 4096};
  std::vector<std::shared_ptr<SharedMemory>> pads;
  for (int r = 0; r < n; ++r) {
    pads.push_back(make_shared_memory(geometry.bytes(), Commit::at_first_access));
    Rendezvous::construct(*pads.back(), geometry);
  }
  run_ranks(n, [&](ControlPlane& plane) {
    Rendezvous rendezvous(pads, geometry, plane.rank(), "test", limit);
    body(rendezvous);
    plane.barrier();  // a rank that leaves early would be noticed
  });
}

}  // namespace

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

TEST_CASE("a wait ends at the limit and names who is missing", "[host]") {
  meet(4, 200ms, [](Rendezvous& rendezvous) {
    if (rendezvous.rank() % 2 == 1) {
      std::this_thread::sleep_for(600ms);
      return;
    }
    rendezvous.enter(Call{}, {});
    try {
      rendezvous.await_all();
      check(false, "a TimeoutError is thrown");
    } catch (const TimeoutError& error) {
      check(error.missing() == std::vector<int>{1, 3}, error.what());
    }
    check(rendezvous.failed(), "failed");
    check_throws<TransportError>([&] { rendezvous.check_usable("barrier"); }, "barrier",
                                 "earlier call");
  });
}

TEST_CASE("whoever waits for a rank that gave up learns it before the limit", "[host]") {
  meet(2, kRanksTimeLimit, [](Rendezvous& rendezvous) {
    if (rendezvous.rank() == 1) {
      rendezvous.give_up(cohort::detail::GiveUp::by(1, "its card fell off the bus"));
      return;
    }
    const auto start = Clock::now();
    rendezvous.enter(Call{}, {});
    check_throws<SymmetryError>([&] { rendezvous.await(1); },
                                "rank 1 gave up: its card fell off the bus");
    check(Clock::now() - start < kRanksTimeLimit / 2, "long before the limit");
  });
}

TEST_CASE("every rank throws the first cause, whomever it waits for", "[host]") {
  // Rank 3 never comes. Rank 0 finds it first and rank 1 waits for it as well; rank 2 waits for
  // neither of them, and rank 1 is asked for what it knows.
  const bool sends = GENERATE(true, false);
  meet(4, kRanksTimeLimit, [&](Rendezvous& rendezvous) {
    const auto start = Clock::now();
    const auto ends = [&](const auto& call) {
      try {
        call();
        check(false, "a TimeoutError is thrown");
      } catch (const TimeoutError& error) {
        check(error.missing() == std::vector{3}, error.what());
        check(std::string_view(error.what()).find("rank 0 gave up: it waited for rank 3") == 0,
              error.what());
      }
      check(Clock::now() - start < kRanksTimeLimit / 2, "long before the limit");
      check(rendezvous.failed(), "it has left as well");
    };
    if (rendezvous.rank() == 0) {
      std::this_thread::sleep_for(100ms);
      rendezvous.give_up(cohort::detail::GiveUp::because(
          std::make_exception_ptr(TimeoutError("it waited for rank 3", {3})), 0));
      rendezvous.give_up(cohort::detail::GiveUp::by(0, "another thing, later"));
    } else if (rendezvous.rank() == 1) {
      rendezvous.enter(Call{}, {});
      ends([&] { rendezvous.await(3); });
    } else if (rendezvous.rank() == 2 && sends) {
      ends([&] {
        rendezvous.send(3, {.bytes = (kParcels + 1) * kParcelBytes},
                        [](std::size_t, std::size_t, std::byte*) {});
      });
    } else if (rendezvous.rank() == 2) {
      ends([&] {
        rendezvous.receive(3, {.bytes = 8}, [](std::size_t, std::size_t, const std::byte*) {});
      });
      ends([&] { rendezvous.check_peers(); });
    }
  });
}

TEST_CASE("a rank that has left in good order ends no wait for another", "[host]") {
  const PadGeometry geometry{.ranks = 3, .slot_bytes = 4096};
  std::vector<std::shared_ptr<SharedMemory>> pads;
  for (int r = 0; r < 3; ++r) {
    pads.push_back(make_shared_memory(geometry.bytes(), Commit::at_first_access));
    Rendezvous::construct(*pads.back(), geometry);
  }
  const auto nothing = [](std::size_t, std::size_t, auto*) {};
  std::optional<Rendezvous> done(std::in_place, pads, geometry, 0, "test", kRanksTimeLimit);
  Rendezvous sender(pads, geometry, 1, "test", kRanksTimeLimit);
  Rendezvous receiver(pads, geometry, 2, "test", kRanksTimeLimit);
  done->send(2, {.bytes = 8}, nothing);
  done.reset();
  std::thread later([&] {
    std::this_thread::sleep_for(50ms);
    sender.send(2, {.bytes = 8}, nothing);
  });
  receiver.receive(1, {.bytes = 8}, nothing);
  receiver.receive(0, {.bytes = 8}, nothing);  // what it had sent is there
  later.join();
  CHECK_FALSE(receiver.failed());
  // Who waits for a step that a rank has left without it would wait in vain.
  receiver.enter(Call{}, {});
  CHECK_THROWS_MATCHES(receiver.await(1), TransportError, says("rank 0 has destroyed"));
  try {
    sender.check_peers();
    FAIL("check_peers returned");
  } catch (const TransportError& error) {
    CHECK(error.site().rank == 2);
    CHECK_THAT(std::string(error.what()), contains("rank 2 gave up", "rank 0 has destroyed"));
  }
  CHECK_THROWS_MATCHES(sender.send(0, {.bytes = 8}, nothing), TransportError,
                       says("rank 0 has destroyed its transport"));
}

TEST_CASE("a message to a rank that gave up is refused with its reason", "[host]") {
  meet(2, kRanksTimeLimit, [](Rendezvous& rendezvous) {
    if (rendezvous.rank() == 1) {
      rendezvous.give_up(cohort::detail::GiveUp::by(1, "its card fell off the bus"));
      return;
    }
    const auto send = [&] {
      rendezvous.send(1, {.bytes = 8}, [](std::size_t, std::size_t, std::byte*) {});
    };
    const auto start = Clock::now();
    while (!rendezvous.failed() && Clock::now() - start < kRanksTimeLimit) {
      try {
        send();
        std::this_thread::sleep_for(1ms);
      } catch (const SymmetryError& error) {
        check(error.ranks() == std::vector{1}, error.what());
      }
    }
    check(rendezvous.failed(), "refused");
  });
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
    Rendezvous::construct(*pad, geometry);
    REQUIRE(sched_setaffinity(0, sizeof(allowed), &allowed) == 0);
    return pad;
  };
  const auto first = pad_of_rank_on(two[0]);
  const auto second = pad_of_rank_on(two[1]);
  CHECK(Rendezvous({first, second}, geometry, 0, "test", 100ms).processors() == 2);
  CHECK(Rendezvous({first, pad_of_rank_on(two[0])}, geometry, 0, "test", 100ms).processors() == 1);
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
  const PadGeometry geometry{.ranks = 2, .slot_bytes = 4096};
  std::vector<std::shared_ptr<SharedMemory>> pads;
  for (int r = 0; r < 2; ++r) {
    pads.push_back(make_shared_memory(geometry.bytes(), Commit::at_first_access));
    Rendezvous::construct(*pads.back(), geometry);
  }
  Rendezvous sender(pads, geometry, 0, "test", 1000ms);
  Rendezvous receiver(pads, geometry, 1, "test", 1000ms);
  const std::size_t bytes = 2 * kParcelBytes;
  sender.send(1, {.bytes = bytes}, [](std::size_t, std::size_t, std::byte*) {});
  new (pads[0]->data() + geometry.parcel(1, 1))
      ParcelHeader{{.bytes = 3 * kParcelBytes}, kParcelBytes};
  CHECK_THROWS_MATCHES(
      receiver.receive(0, {.bytes = bytes}, [](std::size_t, std::size_t, const std::byte*) {}),
      TransportError, says("byte 65536", "rank 0", "196608"));
  CHECK(receiver.failed());
}

TEST_CASE("a message that nobody takes ends at the limit", "[host]") {
  meet(2, 200ms, [](Rendezvous& rendezvous) {
    if (rendezvous.rank() == 1) {
      std::this_thread::sleep_for(600ms);
      return;
    }
    try {
      rendezvous.send(1, {.bytes = (kParcels + 1) * kParcelBytes},
                      [](std::size_t, std::size_t, std::byte*) {});
      check(false, "a TimeoutError is thrown");
    } catch (const TimeoutError& error) {
      check(error.missing() == std::vector<int>{1}, error.what());
    }
  });
}

TEST_CASE("ranks that come one after another do not each have the time limit", "[host]") {
  constexpr auto kLimit = 1000ms;
  meet(4, kLimit, [&](Rendezvous& rendezvous) {
    std::this_thread::sleep_for(kLimit * 8 / 10 *
                                rendezvous.rank());  // the last ones come too late
    const auto begin = std::chrono::steady_clock::now();
    const cohort::detail::CallTime call;
    rendezvous.enter(Call{}, showing(Place::slot));
    if (rendezvous.rank() == 0) {
      check_throws<TimeoutError>([&] { rendezvous.await_all(); }, "rank 2, 3 did not arrive");
    } else {  // one that comes in time has waited with it, or hears that it gave up
      check_throws<TimeoutError>([&] { rendezvous.await_all(); }, "rank 2, 3 did not arrive");
    }
    check(std::chrono::steady_clock::now() - begin < kLimit * 5 / 4 + 500ms, "one limit for all");
  });
}

TEST_CASE("ranks that come in pulses keep the others for a quarter of the limit more", "[host]") {
  constexpr auto kLimit = 400ms;
  meet(2, kLimit, [&](Rendezvous& rendezvous) {
    const auto begin = std::chrono::steady_clock::now();
    const cohort::detail::CallTime call;
    const auto run = [&] {
      for (int step = 0; step < 40; ++step) {
        if (rendezvous.rank() == 1) {
          std::this_thread::sleep_for(kLimit / 9);  // in time for what each wait has at least
        }
        rendezvous.enter(Call{}, showing(Place::slot));
        rendezvous.await_all();
      }
    };
    check_throws<TimeoutError>(run, "rank 1 did not arrive");
    check(std::chrono::steady_clock::now() - begin < kLimit * 5 / 4 + 500ms, "one limit for all");
  });
}

TEST_CASE("a rank that comes when the others have given up does not go on alone", "[host]") {
  meet(3, 500ms, [](Rendezvous& rendezvous) {
    if (rendezvous.rank() == 2) {
      std::this_thread::sleep_for(1500ms);
    }
    rendezvous.enter(Call{}, showing(Place::slot));
    // It may be told so itself, by those that waited for it.
    check_throws<TimeoutError>([&] { rendezvous.await_all(); }, "rank 2 did not arrive");
  });
}
