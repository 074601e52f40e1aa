// SPDX-License-Identifier: Apache-2.0
#include <chrono>
#include <cohort/call_time.hpp>
#include <cohort/host/pad_wait.hpp>
#include <cohort/host/rendezvous.hpp>
#include <cstddef>
#include <thread>
#include <vector>

#include "support/catch.hpp"
#include "support/rendezvous_ranks.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::host;
using namespace cohort::test;
using namespace std::chrono_literals;

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
    check(rendezvous.departure().failed(), "failed");
    check_throws<TransportError>([&] { rendezvous.departure().check_usable("barrier"); }, "barrier",
                                 "earlier call");
  });
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
