// SPDX-License-Identifier: Apache-2.0
#include <fmt/ranges.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cohort/control_wait.hpp>
#include <cohort/message_control_plane.hpp>
#include <cohort/thread_control_planes.hpp>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "support/catch.hpp"
#include "support/control_messages.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::test;
using namespace std::chrono_literals;

namespace {

std::string ranks_text(const std::vector<int>& ranks) { return fmt::format("{}", ranks); }

}  // namespace

TEST_CASE("a time-out names the call, the group and the ranks that did not come, and poisons") {
  const int n = GENERATE(2, 3, 4, 8);
  const auto limit = 300ms;
  const std::vector<int> absent = n > 4 ? std::vector{2, 5} : std::vector{n - 1};
  const auto start = Clock::now();
  run_ranks(
      n,
      [&](ControlPlane& plane) {
        plane.barrier();
        if (std::count(absent.begin(), absent.end(), plane.rank()) > 0) {
          return;
        }
        try {
          plane.all_gather({});
          check(false, "all_gather throws");
        } catch (const TimeoutError& error) {
          check(error.missing() == absent, "missing: got " + ranks_text(error.missing()));
          check_throws<TimeoutError>([] { throw; }, "all_gather #1", "group world",
                                     fmt::format("rank {} did", fmt::join(absent, ", ")), "300 ms");
        }
        check(plane.poisoned(), "poisoned");
        check_throws<TransportError>([&] { plane.barrier(); }, "barrier", "group world",
                                     "an earlier call");
        check_throws<TransportError>([&] { plane.all_gather({}); }, "an earlier call");
        check_throws<TransportError>([&] { plane.broadcast({}, 0); }, "an earlier call");
        check_throws<TransportError>([&] { plane.exchange({}, {}); }, "an earlier call");
      },
      limit);
  CHECK(seconds_since(start) >= 0.3);
  CHECK(seconds_since(start) < 10);
}

TEST_CASE("a rank that comes after another has given up does not go on alone") {
  const auto limit = 300ms;
  using Call = std::function<void(ControlPlane&)>;
  const auto [name, waits, late] = GENERATE_COPY(table<std::string, Call, Call>({
      {"all_gather", [](ControlPlane& p) { p.all_gather(Bytes(3)); },
       [](ControlPlane& p) { p.all_gather(Bytes(3)); }},
      {"barrier", [](ControlPlane& p) { p.barrier(); }, [](ControlPlane& p) { p.barrier(); }},
      {"broadcast", [](ControlPlane& p) { p.broadcast({}, 1); },
       [](ControlPlane& p) { p.broadcast(Bytes(3), 1); }},
      {"exchange",
       [](ControlPlane& p) {
         p.exchange({}, std::vector<ControlPlane::Incoming>{{1, 4}});
       },
       [](ControlPlane& p) {
         p.exchange({{0, Bytes(4)}}, {});
       }},
  }));
  const bool warm = GENERATE(false, true);  // whether the ranks have met before
  const auto& [label, first, second] = std::tie(name, waits, late);
  CAPTURE(label, warm);
  run_ranks(
      2,
      [&, &first = first, &second = second](ControlPlane& plane) {
        if (warm) {
          plane.barrier();
          plane.exchange({{1 - plane.rank(), Bytes(1)}},
                         std::vector<ControlPlane::Incoming>{{1 - plane.rank(), 1}});
        }
        if (plane.rank() == 1) {
          std::this_thread::sleep_for(4 * limit);
        }
        try {
          plane.rank() == 0 ? first(plane) : second(plane);
          check(false, "the call throws on rank " + std::to_string(plane.rank()));
        } catch (const TimeoutError& error) {
          // Both know the same: rank 1 was missing.
          check(error.missing() == std::vector{1}, "missing: " + ranks_text(error.missing()));
          check_throws<TimeoutError>([] { throw; }, "rank 1 did not arrive within 300 ms",
                                     plane.rank() == 0 ? "" : "rank 0 gave up");
        }
        check(plane.poisoned(), "poisoned");
        check_throws<TransportError>([&] { plane.barrier(); }, "form a new group");
      },
      limit);
}

TEST_CASE("who still waits ends as soon as another gives up") {
  const auto start = Clock::now();
  run_ranks(3, [](ControlPlane& plane) {
    if (plane.rank() == 2) {
      return;
    }
    // Of a minute and of a moment: rank 1 does not sit out its own limit.
    try {
      plane.all_gather_within({}, plane.rank() == 0 ? 300ms : 60'000ms);
      check(false, "throws");
    } catch (const TimeoutError& error) {
      check(error.missing() == std::vector{2}, "missing: " + ranks_text(error.missing()));
      check_throws<TimeoutError>([] { throw; }, "rank 2 did not arrive within 300 ms");
    }
  });
  CHECK(seconds_since(start) < 20);
}

TEST_CASE("an exchange with a rank that does not come ends when another has given up on it") {
  const auto hub = std::make_shared<detail::ThreadHub>(3);
  auto hasty = plane_of(hub, 0, 100ms);
  auto patient = plane_of(hub, 1, 60s);
  const auto ask = [](ControlPlane& plane, int from) {
    plane.exchange({}, std::vector<ControlPlane::Incoming>{{from, 4}});
  };
  const auto start = Clock::now();
  std::thread other([&] {
    try {
      ask(hasty, 2);
    } catch (const TimeoutError&) {
    }
  });
  try {
    ask(patient, 2);
    FAIL("throws");
  } catch (const TimeoutError& error) {
    CHECK(error.missing() == std::vector{2});
    CHECK_THAT(std::string(error.what()),
               contains("rank 0 gave up", "rank 2 did not arrive within 100 ms"));
  }
  other.join();
  CHECK(seconds_since(start) < 20);
}

TEST_CASE("an exchange takes what had come before another gave up") {
  const auto planes = make_thread_control_planes(3, 60s);
  planes[0]->exchange({{1, Bytes(4)}}, {});
  planes[2]->give_up("its card fell off the bus");
  planes[1]->exchange({}, std::vector<ControlPlane::Incoming>{{0, 4}});
  CHECK_THROWS_MATCHES(planes[1]->exchange({}, std::vector<ControlPlane::Incoming>{{0, 4}}),
                       SymmetryError, says("rank 2 gave up", "fell off the bus"));
}

TEST_CASE("a late rank hears who has left behind whatever was sent to other groups") {
  constexpr int kMessages = 1'000;  // a look of two milliseconds got not even a hundred
  std::atomic<bool> over{false};
  run_ranks(
      3,
      [&](ControlPlane& plane) {
        if (plane.rank() == 2) {
          return;
        }
        const std::vector<int> two{0, 1};
        const auto pair = plane.subgroup(two, 6, "pair");
        const auto side = plane.subgroup(two, 7, "side");
        pair->barrier();
        if (plane.rank() == 0) {
          while (!over) {
            std::this_thread::sleep_for(1ms);
          }
          check_throws<TimeoutError>([&] { pair->barrier(); }, "rank 0 did not arrive");
          return;
        }
        std::thread sender([&] {
          std::this_thread::sleep_for(50ms);
          for (int i = 0; i < kMessages; ++i) {
            std::vector<ControlPlane::Outgoing> outgoing;
            outgoing.push_back({0, Bytes(64)});
            side->exchange(std::move(outgoing), {});
          }
        });
        try {
          pair->barrier();
        } catch (const TimeoutError&) {
          over = true;
        }
        sender.join();
        check(over.exchange(true), "rank 1 has given up");
      },
      500ms);
}

TEST_CASE("ranks with unlike time limits do not go on alone") {
  const auto hub = std::make_shared<detail::ThreadHub>(2);
  auto patient = plane_of(hub, 0, 60s);
  auto hasty = plane_of(hub, 1, 100ms);
  std::thread other([&] { hasty.barrier(); });
  patient.barrier();
  other.join();
  CHECK_THROWS_AS(hasty.barrier(), TimeoutError);
  CHECK_THROWS_AS(patient.barrier(), TimeoutError);
}

TEST_CASE("waits on broadcast and exchange are bounded and name the rank too") {
  run_ranks(
      3,
      [](ControlPlane& plane) {
        if (plane.rank() == 2) {
          return;
        }
        const auto other = plane.subgroup(std::vector<int>{0, 1, 2}, 0, "other");
        check_throws<TimeoutError>([&] { other->broadcast({}, 2); }, "broadcast #0", "group other",
                                   "rank 2 ");
        const std::vector<ControlPlane::Incoming> incoming{{2, 4}};
        check_throws<TimeoutError>([&] { plane.exchange({}, incoming); }, "exchange", "rank 2 ");
      },
      200ms);
}

TEST_CASE("ranks in different calls get an error that names both") {
  run_ranks(3, [](ControlPlane& plane) {
    plane.barrier();
    if (plane.rank() == 1) {
      check_throws<SymmetryError>([&] { plane.barrier(); }, "rank 0 is in all_gather #1",
                                  "rank 1 is in barrier #1");
    } else {
      check_throws<SymmetryError>([&] { plane.all_gather({}); }, "rank 1 is in barrier #1",
                                  "in all_gather #1");
    }
    check(plane.poisoned(), "ranks out of step cannot go on");
  });
}

TEST_CASE("a rank that has skipped a call is found by the number") {
  run_ranks(2, [](ControlPlane& plane) {
    // Rank 0's broadcast does not wait, so it runs ahead, unless it hears that rank 1 has left.
    check_throws<SymmetryError>(
        [&] {
          if (plane.rank() == 0) {
            plane.broadcast(message_of(1), 0);
          }
          plane.barrier();
        },
        "rank 1 is in barrier #0");
  });
}

namespace {

// A messenger whose peer sends without end, but nothing for the group that waits.
class FloodingMessenger : public Messenger {
 public:
  [[nodiscard]] int rank() const noexcept override { return 0; }
  [[nodiscard]] int size() const noexcept override { return 2; }
  void send(int, Bytes) override {}
  std::optional<Bytes> receive(int, Deadline) override {
    if (Clock::now() > end_) {
      return std::nullopt;  // so that a wait without end fails this test and does not stop it
    }
    std::this_thread::sleep_for(std::chrono::microseconds(100));
    return Bytes(ControlPlane::kTrailerBytes + 8);
  }

 private:
  Deadline end_ = Clock::now() + 20s;
};

}  // namespace

TEST_CASE("a peer that floods other groups is missing at the time limit") {
  MessageControlPlane plane(std::make_shared<FloodingMessenger>(), 1s);
  const auto begin = Clock::now();
  CHECK_THROWS_MATCHES(plane.barrier(), TimeoutError, says("rank 1 did not arrive"));
  CHECK(Clock::now() - begin < 10s);
}
