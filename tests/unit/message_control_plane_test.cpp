// SPDX-License-Identifier: Apache-2.0
#include <fmt/ranges.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cohort/message_control_plane.hpp>
#include <cohort/thread_control_planes.hpp>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "support/catch.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::test;
using namespace std::chrono_literals;

namespace {

// As many bytes as the rank says, each telling rank and position.
Bytes message_of(int rank, int round = 0) {
  Bytes bytes(static_cast<std::size_t>(3 * rank + round));
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<std::byte>(17 * rank + 5 * round + static_cast<int>(i));
  }
  return bytes;
}

MessageControlPlane plane_of(const std::shared_ptr<detail::ThreadHub>& hub, int rank,
                             std::chrono::milliseconds limit) {
  return MessageControlPlane(std::make_shared<detail::ThreadMessenger>(hub, rank), limit);
}

void check_all_gather(ControlPlane& plane, int round) {
  const auto all = plane.all_gather(message_of(plane.rank(), round));
  check_equal(all.size(), static_cast<std::size_t>(plane.size()), "number of messages");
  for (int r = 0; r < plane.size(); ++r) {
    check(all[static_cast<std::size_t>(r)] == message_of(r, round), "message of each rank");
  }
}

void receive_from(ControlPlane& plane, int from) {
  const ControlPlane::Incoming incoming{from, 4};
  (void)plane.exchange({}, std::span(&incoming, 1));
}

/// Whom the call's `TimeoutError` names.
std::vector<int> blamed(const std::function<void()>& call) {
  try {
    call();
  } catch (const TimeoutError& error) {
    return error.missing();
  }
  return {};
}

std::string ranks_text(const std::vector<int>& ranks) { return fmt::format("{}", ranks); }

}  // namespace

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
    }
    world.barrier();
  });
}

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

TEST_CASE("a rank that dies within a call is blamed, not the one that waits for it there") {
  const auto blames = [](const auto& call, auto... parts) {
    try {
      call();
      check(false, "throws");
    } catch (const TimeoutError& error) {
      check(error.missing() == std::vector{2}, error.what());
      check_throws<TimeoutError>([] { throw; }, "rank 2 did not arrive within 2000 ms", parts...);
    }
  };
  // What the first rank calls that has heard the dead one, which the second has not.
  const std::vector<std::function<void(ControlPlane&)>> calls{
      [](ControlPlane& plane) { plane.barrier(); },
      [](ControlPlane& plane) { (void)plane.broadcast({}, 1); },
      [](ControlPlane& plane) {
        (void)plane.exchange({}, std::vector<ControlPlane::Incoming>{{1, 4}});
      },
  };
  std::atomic<int> failures{0};
  const auto run = [&](const auto& body) {
    return std::thread([&failures, body] {
      try {
        body();
      } catch (const std::exception& error) {
        ++failures;
        fmt::print(stderr, "{}\n", error.what());
      }
    });
  };
  std::vector<std::thread> ranks;
  for (const auto& next : calls) {
    const auto hub = std::make_shared<detail::ThreadHub>(3);
    const detail::FrameTrailer arrival{detail::kHashSeed, detail::ControlCall::barrier, 0};
    const auto bytes = std::as_bytes(std::span(&arrival, 1));
    hub->push(2, 0, Bytes(bytes.begin(), bytes.end()));
    ranks.push_back(run([=] {
      MessageControlPlane first(std::make_shared<detail::ThreadMessenger>(hub, 0), 2s);
      const detail::CallTime time;  // so that its limit ends before that of the other
      first.barrier();
      blames([&] { next(first); }, "; rank 1 waited as well");
    }));
    ranks.push_back(run([=] {
      std::this_thread::sleep_for(100ms);
      MessageControlPlane second(std::make_shared<detail::ThreadMessenger>(hub, 1), 2s);
      blames([&] { second.barrier(); });
    }));
  }
  for (std::thread& rank : ranks) {
    rank.join();
  }
  CHECK(failures == 0);
}

TEST_CASE("a rank that waits is not blamed, however long the chain and whenever it began") {
  run_ranks(
      4,
      [](ControlPlane& plane) {
        if (plane.rank() < 3) {
          std::this_thread::sleep_for(200ms * plane.rank());
          check(blamed([&] { receive_from(plane, plane.rank() + 1); }) == std::vector{3}, "blamed");
        }
      },
      1s);
}

TEST_CASE("a rank that waited in a call, and does so no more, is blamed") {
  // Rank 1 comes near the limit, so that the others' last wait of the call is short, and rank 0
  // does not come to that.
  run_ranks(
      4,
      [](ControlPlane& plane) {
        const detail::CallTime time;
        if (plane.rank() == 1) {
          std::this_thread::sleep_for(950ms);
        }
        plane.barrier();
        if (plane.rank() != 0) {
          check(blamed([&] { plane.barrier(); }) == std::vector{0}, "blamed");
        }
      },
      1s);
}

TEST_CASE("a rank whose wait has ended right before another's limit is blamed") {
  run_ranks(
      3,
      [](ControlPlane& plane) {
        if (plane.rank() == 0) {
          check(blamed([&] { receive_from(plane, 1); }) == std::vector{1}, "blamed");
        } else if (plane.rank() == 1) {
          receive_from(plane, 2);
        } else {
          std::this_thread::sleep_for(960ms);  // 0 has asked, and 1 has answered
          (void)plane.exchange({{1, Bytes(4)}}, {});
        }
      },
      1s);
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
    plane.check_peers();
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
