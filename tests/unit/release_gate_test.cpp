// SPDX-License-Identifier: Apache-2.0
#include "cohort/release_gate.hpp"

#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "support/catch.hpp"
#include "support/forked.hpp"

namespace {

using Gate = cohort::detail::ReleaseGate<std::uint64_t>;

template <class Free>
void release(Gate& gate, std::uint64_t block, const Free& free) {
  gate.release([&] { free(block); }, [&] { return block; });
}

}  // namespace

TEST_CASE("the thread that works frees at once, others at its next work", "[release_gate]") {
  Gate gate;
  std::vector<std::uint64_t> freed;
  const auto free = [&](std::uint64_t block) { freed.push_back(block); };
  gate.enter(free);
  release(gate, 1, free);
  CHECK(freed == std::vector<std::uint64_t>{1});
  std::thread([&] {
    release(gate, 2, free);
    release(gate, 6, free);
  }).join();
  CHECK(freed.size() == 1);
  release(gate, 3, free);
  CHECK(freed == std::vector<std::uint64_t>{1, 3});
  gate.enter(free);
  CHECK(freed == std::vector<std::uint64_t>{1, 3, 2, 6});
  std::thread([&] {
    gate.enter(free);
    release(gate, 4, free);
    CHECK(freed.size() == 5);
  }).join();
  release(gate, 5, free);  // no longer the one that works
  CHECK(freed.size() == 5);
  gate.enter(free);
  CHECK(freed == std::vector<std::uint64_t>{1, 3, 2, 6, 4, 5});
}

TEST_CASE("what is never taken back goes with the gate", "[release_gate]") {
  Gate gate;
  gate.enter([](std::uint64_t) {});
  std::thread([&] {
    release(gate, 1, [](std::uint64_t) { FAIL("freed beside the worker"); });
  }).join();
}

TEST_CASE("a forked child does not wait for a release of its parent's", "[release_gate]") {
  Gate gate;
  std::atomic<bool> releasing{false};
  std::atomic<bool> over{false};
  std::thread worker([&] {
    gate.enter([](std::uint64_t) {});
    release(gate, 1, [&](std::uint64_t) {
      releasing = true;
      while (!over) {
        std::this_thread::yield();
      }
    });
  });
  while (!releasing) {
    std::this_thread::yield();
  }
  CHECK_NOTHROW(cohort::test::run_in_child([&] {
    alarm(10);  // kills it where it waits
    gate.enter([](std::uint64_t) {});
  }));
  over = true;
  worker.join();
}

TEST_CASE("each release is taken back once, whichever threads work and drop", "[release_gate]") {
  constexpr std::uint64_t kBlocks = 20'000;
  constexpr int kDroppers = 3;
  Gate gate;
  std::vector<int> freed(kBlocks * kDroppers);  // by whoever works: unguarded on purpose
  const auto free = [&](std::uint64_t block) { ++freed[block]; };
  std::atomic<bool> done{false};
  // Work moves between two threads, which hand it over in order.
  std::atomic<int> turn{0};
  const auto work = [&](int me) {
    while (!done) {
      if (turn == me) {
        gate.enter(free);
        turn = 1 - me;
      }
    }
  };
  std::vector<std::thread> workers;
  workers.emplace_back(work, 0);
  workers.emplace_back(work, 1);
  std::vector<std::thread> droppers;
  for (int d = 0; d < kDroppers; ++d) {
    droppers.emplace_back([&, d] {
      for (std::uint64_t i = 0; i < kBlocks; ++i) {
        release(gate, static_cast<std::uint64_t>(d) * kBlocks + i, free);
      }
    });
  }
  for (auto& dropper : droppers) {
    dropper.join();
  }
  done = true;
  for (auto& worker : workers) {
    worker.join();
  }
  gate.enter(free);
  CHECK(freed == std::vector<int>(kBlocks * kDroppers, 1));
}
