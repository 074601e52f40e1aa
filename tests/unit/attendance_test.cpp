// SPDX-License-Identifier: Apache-2.0
#include <atomic>
#include <chrono>
#include <cohort/attendance.hpp>
#include <cohort/message_control_plane.hpp>
#include <cohort/thread_control_planes.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
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

TEST_CASE("who needs a rank that has left in good order learns it at once, and nobody else") {
  run_ranks(4, [](ControlPlane& world) {
    const auto generation = world.new_generations(1);
    const auto group = world.subgroup(std::vector{0, 1, 2, 3}, generation, "group");
    const int rank = group->rank();
    check_all_gather(*group, 0);  // that ranks leave behind their last calls disturbs none of them
    const auto send = [&](int to) { (void)group->exchange({{to, message_of(rank)}}, {}); };
    const auto receive = [&](int from) {
      const ControlPlane::Incoming incoming{from, message_of(from).size()};
      check(group->exchange({}, std::span(&incoming, 1)).front() == message_of(from), "its bytes");
    };
    if (rank == 3) {
      send(0);
      group->leave_in_order();
    }
    world.barrier();                    // it has left
    std::this_thread::sleep_for(20ms);  // behind the last look at what has come
    if (rank == 0) {
      receive(3);  // what it sent before is there
      send(1);
    } else if (rank == 1) {
      receive(0);
    }
    world.barrier();
    if (rank == 2) {
      const auto start = Clock::now();
      check_throws<TransportError>([&] { receive(3); }, "rank 3 has left the group");
      check(Clock::now() - start < kRanksTimeLimit / 2, "before the limit");
    }
    world.barrier();
  });
}

TEST_CASE("sends to a rank that has left in good order are refused, as are calls of all") {
  const bool sends = GENERATE(true, false);
  std::atomic<bool> left{false};
  run_ranks(2, [&](ControlPlane& world) {
    const auto generation = world.new_generations(1);
    const auto group = world.subgroup(std::vector{0, 1}, generation, "group");
    group->barrier();
    if (group->rank() == 1) {
      group->leave_in_order();
      left = true;
    } else {
      while (!left) {
        std::this_thread::sleep_for(1ms);
      }
      std::this_thread::sleep_for(20ms);  // behind the last look at what has come
      const auto start = Clock::now();
      check_throws<TransportError>(
          [&] {
            if (sends) {
              (void)group->exchange({{1, message_of(0)}}, {});
            } else {
              (void)group->all_gather({});
            }
          },
          "rank 1 has left the group");
      check(Clock::now() - start < kRanksTimeLimit / 2, "before the limit");
      check(group->poisoned(), "a message is missing");
      check(group->left_with()->ranks == std::vector{1},
            "other groups are told whose failure it is");
    }
    world.barrier();
  });
}

TEST_CASE("a rank that has finished a call is not troubled by who leaves later ones") {
  run_ranks(
      2,
      [](ControlPlane& plane) {
        plane.barrier();
        if (plane.rank() == 0) {
          plane.broadcast(message_of(2), 0);  // does not wait
          plane.give_up("enough");
        } else {
          std::this_thread::sleep_for(400ms);
          check(plane.broadcast({}, 0) == message_of(2), "sent before rank 0 left");
          check_throws<SymmetryError>([&] { plane.barrier(); }, "rank 0 gave up", "group world",
                                      "enough");
        }
      },
      200ms);
}

TEST_CASE("giving up tells the others at once, whatever they wait for") {
  const auto start = Clock::now();
  run_ranks(
      4,
      [](ControlPlane& plane) {
        plane.barrier();
        const std::vector<ControlPlane::Incoming> incoming{{0, 4}};
        switch (plane.rank()) {
          case 0:
            plane.give_up("no memory left");
            check(plane.poisoned(), "poisoned");
            check_throws<TransportError>([&] { plane.barrier(); }, "form a new group");
            plane.give_up("again");  // they have been told
            return;
          case 1:
            check_throws<SymmetryError>([&] { plane.exchange({}, incoming); }, "rank 0 gave up",
                                        "no memory left");
            return;
          case 2:
            check_throws<SymmetryError>([&] { plane.broadcast({}, 0); }, "rank 0 gave up");
            return;
          default:
            // Rank 2 leaves as well, and may say so, in the words of rank 0.
            check_throws<SymmetryError>([&] { plane.broadcast({}, 2); }, "rank 0 gave up",
                                        "no memory left");
        }
      },
      60s);
  CHECK(seconds_since(start) < 20);
}

TEST_CASE("a rank whose other thread gives up ends its call at once, and a late one with it") {
  struct Case {
    std::string name;
    std::function<void(ControlPlane&)> waits;  // of rank 1
    std::function<void(ControlPlane&)> late;   // of rank 0
  };
  const auto& [name, waits, late] = GENERATE(values<Case>({
      {"barrier", [](ControlPlane& p) { p.barrier(); }, [](ControlPlane& p) { p.barrier(); }},
      {"broadcast", [](ControlPlane& p) { p.broadcast({}, 0); },
       [](ControlPlane& p) { p.broadcast(Bytes(3), 0); }},
      {"exchange",
       [](ControlPlane& p) {
         p.exchange({{0, Bytes(4)}}, std::vector<ControlPlane::Incoming>{{0, 4}});
       },
       [](ControlPlane& p) {
         p.exchange({{1, Bytes(4)}}, std::vector<ControlPlane::Incoming>{{1, 4}});
       }},
  }));
  const auto& [first, second] = std::tie(waits, late);
  CAPTURE(name);
  const auto start = Clock::now();
  std::atomic<bool> over{false};
  run_ranks(2, [&, &first = first, &second = second](ControlPlane& plane) {
    plane.barrier();
    if (plane.rank() == 1) {
      std::thread watchdog([&] {
        std::this_thread::sleep_for(100ms);
        plane.give_up("the watchdog saw a dead card");
      });
      try {
        check_throws<SymmetryError>([&] { first(plane); }, "rank 1 gave up", "a dead card");
      } catch (...) {
        watchdog.join();
        throw;
      }
      watchdog.join();
      over = true;
      check_throws<TransportError>([&] { plane.barrier(); }, "form a new group");
      return;
    }
    while (!over && seconds_since(start) < 30) {
      std::this_thread::sleep_for(1ms);
    }
    check_throws<SymmetryError>([&] { second(plane); }, "rank 1 gave up", "a dead card");
  });
  CHECK(seconds_since(start) < 20);
}

TEST_CASE("whoever sees that a rank has left finds the first reason, whichever thread it was") {
  const auto planes = make_thread_control_planes(2);
  const std::string reason(1000, 'r');
  std::atomic<int> failures{0};
  for (std::uint64_t round = 0; round < 300; ++round) {
    const auto group = planes[0]->subgroup(std::vector{0, 1}, round, "group");
    std::thread watching([&] {
      while (!group->poisoned()) {
      }
      const auto said = group->left_with();
      group->give_up("late");
      failures += said && said->text == group->left_with()->text ? 0 : 1;
    });
    group->give_up(reason);
    watching.join();
    CHECK_THAT(group->left_with()->text, contains(reason));
    CHECK(failures == 0);
  }
}

TEST_CASE("ranks that wait by other means learn who has left, and leave as well") {
  std::atomic<int> looked = 0;
  std::atomic<bool> told = false;
  run_ranks(3, [&](ControlPlane& plane) {
    plane.barrier();
    plane.check_peers();
    check(!plane.poisoned(), "nobody has left");
    ++looked;
    if (plane.rank() == 0) {
      while (looked < 3) {
        std::this_thread::yield();
      }
      std::thread([&] { plane.give_up("its stream stood still"); }).join();
      plane.check_peers();  // its own words are no news
      told = true;
      return;
    }
    while (!told) {
      std::this_thread::yield();
    }
    check_throws<SymmetryError>([&] { plane.check_peers(); }, "rank 0 gave up", "group world",
                                "its stream stood still");
    check(plane.poisoned(), "poisoned");
    check(!plane.is_calm(), "who has left is not calm");
    plane.check_peers();
    check(!plane.is_calm(), "nor behind a look");
    check_throws<TransportError>([&] { plane.barrier(); }, "form a new group");
  });
}

TEST_CASE("what one group's look took in another has heard, while a thread of its own uses it") {
  run_ranks(2, [](ControlPlane& world) {
    const std::vector<int> both{0, 1};
    const auto tp = world.subgroup(both, 1, "tp");
    const auto dcp = world.subgroup(both, 2, "dcp");
    constexpr int kCalls = 200;
    if (world.rank() == 0) {
      for (int i = 0; i < kCalls; ++i) {
        dcp->barrier();
      }
      dcp->give_up("its stream stood still");
      tp->barrier();  // behind the words for the other group
      return;
    }
    std::atomic<bool> over{false};
    std::thread of_dcp([&] {
      try {
        while (true) {
          dcp->barrier();
        }
      } catch (const Error&) {
        over = true;  // SymmetryError, or TransportError where the other thread has heard it first
      }
    });
    bool heard = false;
    const auto hear = [&](PeerLook look) {
      try {
        tp->check_peers(look);
        dcp->check_peers(PeerLook::heard);
      } catch (const SymmetryError& error) {
        heard = std::string(error.what()).find("its stream stood still") != std::string::npos;
      }
    };
    while (!over) {
      hear(PeerLook::lately);
    }
    of_dcp.join();
    tp->barrier();
    hear(PeerLook::now);
    check(heard || dcp->poisoned(), "it has been heard by one thread or the other");
    check(!tp->poisoned(), "the group that looked works on");
  });
}

TEST_CASE("who only asks what was heard takes in no message") {
  run_ranks(2, [](ControlPlane& world) {
    const std::vector<int> both{0, 1};
    const auto tp = world.subgroup(both, 1, "tp");
    const auto dcp = world.subgroup(both, 2, "dcp");
    if (world.rank() == 0) {
      dcp->give_up("its stream stood still");
      tp->barrier();
      return;
    }
    dcp->check_peers(PeerLook::heard);
    check(!dcp->poisoned(), "nothing has been taken in");
    tp->barrier();
    check_throws<SymmetryError>([&] { dcp->check_peers(PeerLook::heard); }, "rank 0 gave up",
                                "its stream stood still");
    tp->check_peers();
  });
}

namespace {

// A messenger whose peer sends what is no frame, or breaks.
class OddMessenger : public Messenger {
 public:
  explicit OddMessenger(std::optional<Bytes> reply, int rank = 0, int size = 2)
      : reply_(std::move(reply)), rank_(rank), size_(size) {}
  [[nodiscard]] int rank() const noexcept override { return rank_; }
  [[nodiscard]] int size() const noexcept override { return size_; }
  void send(int, Bytes) override {
    if (!reply_) {
      throw TransportError({.call = "send", .native_code = 32}, "broken pipe");
    }
  }
  std::optional<Bytes> receive(int, Deadline) override { return reply_; }
  void abandon() noexcept override { abandoned = true; }
  bool abandoned = false;

 private:
  std::optional<Bytes> reply_;
  int rank_;
  int size_;
};

}  // namespace

TEST_CASE("what a messenger throws is told apart from the group's numbers of the ranks") {
  MessageControlPlane plane(std::make_shared<OddMessenger>(std::nullopt, 2, 4), 1s);
  const auto group = plane.subgroup(std::vector{2, 3}, 1, "tp[1]");
  try {
    group->barrier();
    FAIL("the barrier returned");
  } catch (const TransportError& error) {
    CHECK(error.site().group == "tp[1]");
    CHECK(error.site().rank == 0);
    CHECK(error.site().native_code == 32);
    CHECK_THAT(
        std::string(error.what()),
        contains("in group tp[1] on rank 0", "the ranks of the group are 2, 3", "broken pipe"));
  }
}

TEST_CASE("a messenger's failure and foreign bytes are transport errors that poison") {
  const bool broken = GENERATE(false, true);
  auto messenger =
      std::make_shared<OddMessenger>(broken ? std::nullopt : std::optional<Bytes>(Bytes(3)));
  MessageControlPlane plane(messenger, 1s);
  CHECK_THROWS_MATCHES(plane.barrier(), TransportError,
                       says(broken ? "broken pipe" : "3 bytes from rank 1 is no control message"));
  CHECK(plane.poisoned());
  CHECK(messenger->abandoned);
}
