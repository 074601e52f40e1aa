// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <atomic>
#include <chrono>
#include <cohort/call_time.hpp>
#include <cohort/control_frame.hpp>
#include <cohort/control_talk.hpp>
#include <cohort/flight_recorder.hpp>
#include <cohort/hash.hpp>
#include <cohort/mailbox.hpp>
#include <cohort/membership.hpp>
#include <cohort/message_control_plane.hpp>
#include <cohort/thread_control_planes.hpp>
#include <cohort/traced_agreement.hpp>
#include <cstdio>
#include <exception>
#include <functional>
#include <memory>
#include <span>
#include <thread>
#include <vector>

#include "support/catch.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::test;
using namespace std::chrono_literals;

namespace {

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

}  // namespace

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

TEST_CASE("of ranks that wait in other groups those are named for whom they wait there") {
  struct Case {
    std::chrono::milliseconds inner;  // when the wait for the dead rank begins
    std::chrono::milliseconds outer;  // when that for the rank begins which waits there
    bool told;  // whether the latter learns of the dead from another, whose wait began first
  };
  const auto [inner, outer, told] = GENERATE(values<Case>({
      {0ms, 100ms, false},   // it has given up when the other's limit comes
      {100ms, 0ms, false},   // it still waits then
      {150ms, 100ms, true},  // it has given up because it was told
  }));
  run_ranks(
      5,
      [inner = inner, outer = outer, told = told](ControlPlane& world) {
        const auto near = world.subgroup(std::vector{0, 1, 2, 3, 4}, 0, "all");
        if (world.rank() == 0) {
          const auto pair = near->subgroup(std::vector{0, 2}, 0, "pp[0]");
          std::this_thread::sleep_for(outer);
          const auto words = check_throws<TimeoutError>(
              [&] { receive_from(*pair, 1); }, "rank 3 of group all did not arrive within 2000 ms",
              "; rank 1 waited as well");
          check(words.find("rank 1 did not") == std::string::npos, words);
          const auto why = pair->left_with();
          check(why && why->ranks.empty() && why->world == std::vector{3}, "what it tells");
        } else if (world.rank() == 2) {
          const auto others = near->subgroup(std::vector{2, 3, 4}, 0, "tp[1]");
          std::this_thread::sleep_for(inner);
          check(blamed([&] { others->barrier(); }) == std::vector{1}, "blamed");
          std::this_thread::sleep_for(300ms);
        } else if (world.rank() == 4) {
          const auto others = near->subgroup(std::vector{2, 3, 4}, 0, "tp[1]");
          std::this_thread::sleep_for(told ? 0ms : inner + 30ms);
          check(blamed([&] { others->barrier(); }) == std::vector{1}, "blamed");
        }
      },
      2s);
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

TEST_CASE("a rank that has given up over calls that differ has said in which it was") {
  const auto hub = std::make_shared<detail::ThreadHub>(2);
  struct Rank {
    Rank(const std::shared_ptr<detail::ThreadHub>& to, int rank, const char* call)
        : mailbox(detail::Mailbox::shared(std::make_shared<detail::ThreadMessenger>(to, rank))),
          group("tp[0]", rank, 2),
          recorder("tp[0]", rank, {0, 1}, TraceRings{}),
          open(&recorder, call, 0),
          talk(std::make_unique<detail::ControlTalk>(*mailbox, group, &recorder,
                                                     std::chrono::steady_clock::now(), 1s)) {}

    void look(int missing) {
      mailbox->look();
      talk->look([&] { return std::vector{missing}; });
    }

    std::shared_ptr<detail::Mailbox> mailbox;
    detail::Membership group;
    FlightRecorder recorder;
    detail::TracedAgreement open;
    std::unique_ptr<detail::ControlTalk> talk;
  };
  Rank first(hub, 0, "growth");
  Rank second(hub, 1, "reservation");
  first.look(1);
  second.look(0);
  first.look(1);
  const detail::Fault found = first.talk->at_fault({1});
  CHECK_THAT(found.difference, contains("growth") && contains("reservation"));
  first.talk.reset();  // as it throws

  const detail::Fault later = second.talk->at_fault({0});
  CHECK(later.difference == found.difference);
  CHECK(later.ranks == found.ranks);
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
