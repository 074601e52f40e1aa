// SPDX-License-Identifier: Apache-2.0
#include <chrono>
#include <cohort/host/departure.hpp>
#include <cohort/host/rendezvous.hpp>
#include <cstddef>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "support/catch.hpp"
#include "support/rendezvous_ranks.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::host;
using namespace cohort::test;
using namespace std::chrono_literals;

TEST_CASE("whoever waits for a rank that gave up learns it before the limit", "[host]") {
  meet(2, kRanksTimeLimit, [](Rendezvous& rendezvous) {
    if (rendezvous.rank() == 1) {
      rendezvous.departure().give_up(cohort::detail::GiveUp::by(1, "its card fell off the bus"));
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
      check(rendezvous.departure().failed(), "it has left as well");
    };
    if (rendezvous.rank() == 0) {
      std::this_thread::sleep_for(100ms);
      rendezvous.departure().give_up(cohort::detail::GiveUp::because(
          std::make_exception_ptr(TimeoutError("it waited for rank 3", {3})), 0));
      rendezvous.departure().give_up(cohort::detail::GiveUp::by(0, "another thing, later"));
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
      ends([&] { rendezvous.departure().check_peers(); });
    }
  });
}

TEST_CASE("a rank that has left in good order ends no wait for another", "[host]") {
  const PadGeometry geometry = small_pads(3);
  const auto pads = pads_of(geometry);
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
  CHECK_FALSE(receiver.departure().failed());
  // Who waits for a step that a rank has left without it would wait in vain.
  receiver.enter(Call{}, {});
  CHECK_THROWS_MATCHES(receiver.await(1), TransportError, says("rank 0 has destroyed"));
  try {
    sender.departure().check_peers();
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
      rendezvous.departure().give_up(cohort::detail::GiveUp::by(1, "its card fell off the bus"));
      return;
    }
    const auto send = [&] {
      rendezvous.send(1, {.bytes = 8}, [](std::size_t, std::size_t, std::byte*) {});
    };
    const auto start = Clock::now();
    while (!rendezvous.departure().failed() && Clock::now() - start < kRanksTimeLimit) {
      try {
        send();
        std::this_thread::sleep_for(1ms);
      } catch (const SymmetryError& error) {
        check(error.ranks() == std::vector{1}, error.what());
      }
    }
    check(rendezvous.departure().failed(), "refused");
  });
}
