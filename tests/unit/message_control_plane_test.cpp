// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cohort/message_control_plane.hpp>
#include <cohort/thread_control_planes.hpp>
#include <cstddef>
#include <exception>
#include <memory>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "support/catch.hpp"
#include "support/control_messages.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::test;
using namespace std::chrono_literals;

TEST_CASE("all_gather gives every rank's bytes in rank order, whatever their sizes") {
  const int n = GENERATE(1, 2, 3, 4, 8);
  run_ranks(n, [&](ControlPlane& plane) {
    check_equal(plane.size(), n, "size");
    for (int round = 0; round < 5; ++round) {
      check_all_gather(plane, round);
    }
  });
}

TEST_CASE("broadcast gives the root's bytes, and the root does not wait") {
  const int n = GENERATE(1, 2, 3, 4, 8);
  run_ranks(n, [&](ControlPlane& plane) {
    for (int root = 0; root < n; ++root) {
      // What other ranks pass is not read.
      const auto mine = message_of(plane.rank(), 1);
      check(plane.broadcast(mine, root) == message_of(root, 1), "root's message");
    }
  });
  if (n > 1) {
    const auto planes = make_thread_control_planes(n, 60s);
    const auto start = Clock::now();
    planes[0]->broadcast(message_of(2), 0);  // the others have not even been started
    CHECK(seconds_since(start) < 10);
  }
}

TEST_CASE("nobody leaves a barrier before everybody has entered it") {
  const int n = GENERATE(1, 2, 3, 4, 8);
  std::atomic<int> entered{0};
  run_ranks(n, [&](ControlPlane& plane) {
    for (int round = 1; round <= 10; ++round) {
      ++entered;
      plane.barrier();
      check(entered >= round * n, "all have entered");
      plane.barrier();
    }
  });
}

TEST_CASE("exchange moves bytes between pairs, also to oneself, in the order asked for") {
  const int n = GENERATE(1, 2, 3, 4, 8);
  run_ranks(n, [&](ControlPlane& plane) {
    std::vector<ControlPlane::Outgoing> outgoing;
    std::vector<ControlPlane::Incoming> incoming;
    for (int r = 0; r < n; ++r) {
      outgoing.push_back({r, message_of(plane.rank(), r)});
      outgoing.push_back({r, Bytes(100'000, std::byte{0x5a})});
      const int from = n - 1 - r;
      incoming.push_back({from, message_of(from, plane.rank()).size()});
      incoming.push_back({from, 100'000});
    }
    const auto got = plane.exchange(std::move(outgoing), incoming);
    check_equal(got.size(), incoming.size(), "number of payloads");
    for (std::size_t i = 0; i < got.size(); i += 2) {
      check(got[i] == message_of(incoming[i].from, plane.rank()), "first message of a pair");
      check(got[i + 1] == Bytes(100'000, std::byte{0x5a}), "second message of a pair");
    }
    plane.barrier();
  });
}

TEST_CASE("an exchange of pairs needs no other rank") {
  run_ranks(4, [](ControlPlane& plane) {
    if (plane.rank() == 1) {
      check(plane.exchange({{3, message_of(1)}}, {}).empty(), "nothing asked for");
    } else if (plane.rank() == 3) {
      const std::vector<ControlPlane::Incoming> incoming{{1, message_of(1).size()}};
      check(plane.exchange({}, incoming).at(0) == message_of(1), "the message");
    }
    plane.barrier();  // what came before does not count into the sequence of collective calls
  });
}

TEST_CASE("subgroups are local, ordered as listed, and apart from their parent") {
  run_ranks(4, [](ControlPlane& plane) {
    if (plane.rank() == 1) {
      return;  // never needed
    }
    const std::vector<int> ranks{3, 0, 2};
    const auto group = plane.subgroup(ranks, 0, "three");
    check_equal(group->size(), 3, "size");
    check_equal(ranks[static_cast<std::size_t>(group->rank())], plane.rank(), "order of the list");
    for (int round = 0; round < 3; ++round) {
      check_all_gather(*group, round);
    }
    const auto nested = group->subgroup(std::vector<int>{2, 0, 1}, 0, "nested");
    check_all_gather(*nested, 1);
  });
}

TEST_CASE("each generation of a subgroup is a group of its own") {
  run_ranks(2, [](ControlPlane& plane) {
    const std::vector<int> both{0, 1};
    const auto first = plane.subgroup(both, 1, "first");
    const auto second = plane.subgroup(both, 2, "second");
    // The ranks use them in different order; messages of one must not be taken for the other's.
    const int rank = plane.rank();
    std::vector<Bytes> of_first;
    std::vector<Bytes> of_second;
    if (rank == 0) {
      first->broadcast(message_of(5), 0);
      second->broadcast(message_of(6), 0);
    } else {
      check(second->broadcast({}, 0) == message_of(6), "of the second");
      check(first->broadcast({}, 0) == message_of(5), "of the first");
    }
    check_all_gather(*second, 0);
    check_all_gather(*first, 1);
  });
}

TEST_CASE("a list that is no set of ranks with this one is refused, and the plane works on") {
  run_ranks(2, [](ControlPlane& plane) {
    const auto subgroup = [&](std::vector<int> ranks) {
      return [&plane, ranks] { plane.subgroup(ranks, 0, "odd"); };
    };
    check_throws<UsageError>(subgroup({0, 2}), "odd", "0,2", "world");
    check_throws<UsageError>(subgroup({-1, 0, 1}), "odd", "-1");
    check_throws<UsageError>(subgroup({0, 1, 0}), "odd", "0,1,0");
    check_throws<UsageError>(subgroup({1 - plane.rank()}), "does not hold this rank");
    check_throws<UsageError>(subgroup({}), "does not hold this rank");
    check_throws<UsageError>([&] { plane.broadcast({}, 2); }, "broadcast root", "[0, 2)", "got 2");
    check_throws<UsageError>([&] { plane.exchange({{5, {}}}, {}); }, "exchange to", "got 5");
    const std::vector<ControlPlane::Incoming> incoming{{-1, 0}};
    check_throws<UsageError>([&] { plane.exchange({}, incoming); }, "exchange from", "got -1");
    check(!plane.poisoned(), "not poisoned");
    plane.barrier();
  });
}

TEST_CASE("what is sent to a group that has ended does not stay") {
  const auto planes = make_thread_control_planes(2, 200ms);
  const auto held = [&](int rank) {
    return dynamic_cast<MessageControlPlane&>(*planes[static_cast<std::size_t>(rank)])
        .held_messages();
  };
  const std::vector<int> both{0, 1};
  const auto work = [&](int rank) {
    auto& plane = *planes[static_cast<std::size_t>(rank)];
    for (int round = 0; round < 50; ++round) {
      const auto generation = plane.new_generations(1);
      const auto group = plane.subgroup(both, generation, "short-lived");
      if (rank == 0) {
        group->broadcast(message_of(3), 0);
        group->broadcast(message_of(3), 0);
      } else if (round % 2 == 0) {
        group->broadcast({}, 0);  // and leaves the other
      }
    }
    plane.barrier();
  };
  std::thread other([&] { work(1); });
  work(0);
  other.join();
  CHECK(held(0) == 0);
  CHECK(held(1) == 0);
}

TEST_CASE("survivors of a time-out form a group without the ranks that left") {
  run_ranks(
      4,
      [](ControlPlane& plane) {
        if (plane.rank() == 1) {
          return;
        }
        check_throws<TimeoutError>([&] { plane.barrier(); }, "rank 1 ");
        const std::vector<int> survivors{0, 2, 3};
        const auto group = plane.subgroup(survivors, 1, "survivors");
        check(!group->poisoned(), "a new group is not poisoned");
        check_equal(survivors[static_cast<std::size_t>(group->rank())], plane.rank(), "rank");
        check_all_gather(*group, 2);
      },
      500ms);
}

TEST_CASE("what shall come behind leaving comes once, whoever left, and not behind good order") {
  const int n = GENERATE(2, 3);
  run_ranks(n, [&](ControlPlane& world) {
    std::vector<int> ranks;
    for (int r = 0; r < n; ++r) {
      ranks.push_back(r);
    }
    const auto group = world.subgroup(ranks, world.new_generations(1), "left");
    const auto ordered = world.subgroup(ranks, world.new_generations(1), "in order");
    int ends = 0;
    int ends_in_order = 0;
    group->when_left([&] { ends += 100; });  // the next one takes its place
    group->when_left([&] { ends += 1; });
    ordered->when_left([&] { ends_in_order += 1; });
    group->barrier();
    check_equal(ends, 0, "before");
    world.barrier();
    if (group->rank() == 0) {
      group->give_up("enough");
      check_equal(ends, 1, "by this rank");
    } else {
      check_throws<SymmetryError>([&] { group->barrier(); }, "enough");
      check_equal(ends, 1, "by what another said");
    }
    group->give_up("once more");
    check_equal(ends, 1, "once");
    group->when_left([&] { ends += 10; });
    check_equal(ends, 11, "at once where it has left");
    group->when_left(nullptr);
    ordered->leave_in_order();
    ordered->when_left(nullptr);
    ordered->give_up("nobody asks any more");
    check_equal(ends_in_order, 0, "in order, and behind taking it back");
  });
}

TEST_CASE("what shall come behind leaving does not while another thread tells the others") {
  struct Slow final : detail::ThreadMessenger {
    using ThreadMessenger::ThreadMessenger;
    void send(int to, Bytes message) override {
      begun = true;
      std::this_thread::sleep_for(20ms);
      ThreadMessenger::send(to, std::move(message));
      told = true;
    }
    std::atomic<bool> begun{false};
    std::atomic<bool> told{false};
  };
  const auto messenger = std::make_shared<Slow>(std::make_shared<detail::ThreadHub>(2), 0);
  MessageControlPlane world(messenger, 20s);
  const std::vector<int> both{0, 1};
  const auto group = world.subgroup(both, 1, "told");
  std::thread leaver([&] { group->give_up("enough"); });
  while (!messenger->begun) {
    std::this_thread::yield();
  }
  int ends = 0;
  bool told = false;
  group->when_left([&] {
    ++ends;
    told = messenger->told;
  });
  leaver.join();
  CHECK(ends == 1);
  CHECK(told);
}

TEST_CASE("an exchange of another size is an error that names both sizes") {
  run_ranks(2, [](ControlPlane& plane) {
    if (plane.rank() == 0) {
      try {
        plane.exchange({{1, Bytes(7)}}, {});
      } catch (const SymmetryError&) {  // where it hears of it in time
        check_throws<SymmetryError>([] { throw; }, "rank 1 gave up", "expected 8");
      }
    } else {
      const std::vector<ControlPlane::Incoming> incoming{{0, 8}};
      check_throws<SymmetryError>([&] { plane.exchange({}, incoming); }, "rank 0 sent 7",
                                  "expected 8");
    }
  });
}

TEST_CASE("threads of one rank use groups of their own at the same time") {
  run_ranks(2, [](ControlPlane& plane) {
    const std::vector<int> both{0, 1};
    const auto a = plane.subgroup(both, 1, "a");
    const auto b = plane.subgroup(both, 2, "b");
    std::exception_ptr failure;
    std::thread other([&] {
      try {
        for (int round = 0; round < 200; ++round) {
          check_all_gather(*a, round % 7);
        }
      } catch (...) {
        failure = std::current_exception();
      }
    });
    for (int round = 0; round < 200; ++round) {
      check_all_gather(*b, round % 5);
    }
    other.join();
    if (failure) {
      std::rethrow_exception(failure);
    }
  });
}
