// SPDX-License-Identifier: Apache-2.0
#include "cohort/nccl/bounded_call.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <thread>

#include "cohort/call_time.hpp"
#include "support/catch.hpp"

using cohort::detail::call_within;
using cohort::detail::UsedUntilEnded;
using namespace std::chrono_literals;

TEST_CASE("work that ends in time is done when the call returns", "[bounded_call]") {
  int answer = 0;
  CHECK(call_within(10s, [&] { answer = 42; }));
  CHECK(answer == 42);
}

TEST_CASE("what the work throws comes out of the call", "[bounded_call]") {
  CHECK_THROWS_WITH(static_cast<void>(call_within(10s, [] { throw std::runtime_error("no"); })),
                    "no");
}

TEST_CASE("work that does not end is left behind at the limit", "[bounded_call]") {
  const auto release = std::make_shared<std::atomic<bool>>(false);
  const auto done = std::make_shared<std::atomic<bool>>(false);
  const auto begin = std::chrono::steady_clock::now();
  CHECK_FALSE(call_within(50ms, [release, done] {
    while (!*release) {
      std::this_thread::sleep_for(1ms);
    }
    *done = true;
  }));
  CHECK(std::chrono::steady_clock::now() - begin < 5s);
  *release = true;  // so that the test leaves no thread behind
  while (!*done) {
    std::this_thread::sleep_for(1ms);
  }
}

TEST_CASE("calls share the limit of the call that they belong to", "[bounded_call]") {
  const auto release = std::make_shared<std::atomic<bool>>(false);
  const auto stands_still = [release] {
    while (!*release) {
      std::this_thread::sleep_for(1ms);
    }
  };
  const cohort::detail::CallTime call;
  CHECK_FALSE(call_within(2s, stands_still));
  const auto begin = std::chrono::steady_clock::now();
  CHECK_FALSE(call_within(2s, stands_still));
  CHECK(std::chrono::steady_clock::now() - begin < 1500ms);
  *release = true;
}

TEST_CASE("who waits looks around, and leaves the work where something is wrong",
          "[bounded_call]") {
  const auto release = std::make_shared<std::atomic<bool>>(false);
  const auto begin = std::chrono::steady_clock::now();
  int looks = 0;
  CHECK_THROWS_WITH(static_cast<void>(call_within(
                        60s,
                        [release] {
                          while (!*release) {
                            std::this_thread::sleep_for(1ms);
                          }
                        },
                        [&] {
                          if (++looks == 3) {
                            throw std::runtime_error("a peer has left");
                          }
                        })),
                    "a peer has left");
  CHECK(std::chrono::steady_clock::now() - begin < 20s);
  *release = true;
  CHECK(call_within(
      10s, [] {}, [] {}));
}

/// An exit handler that is there before any call, as those of CUDA.
static std::atomic<bool> gives_nine{false};
[[maybe_unused]] static const int first_handler = std::atexit([] {
  if (gives_nine) {
    std::_Exit(9);
  }
});

/// How a process leaves whose other exit handlers give it the status 9, over a call of that length.
static int status_of_leaving(std::chrono::milliseconds length) {
  const pid_t child = ::fork();
  if (child == 0) {
    gives_nine = true;
    static_cast<void>(call_within(10ms, [length] { std::this_thread::sleep_for(length); }));
    std::exit(7);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST_CASE("a process leaves in good order over a call that does not end", "[bounded_call]") {
  CHECK(status_of_leaving(1h) == 7);     // at once, before the others could harm the call
  CHECK(status_of_leaving(100ms) == 9);  // behind it, as ever
}

/// What a child of this process leaves with that runs `body`; -1 where it does not leave.
template <class Body>
static int status_of(const Body& body) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(20);
    gives_nine = true;
    body();
    std::_Exit(1);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST_CASE("a process leaves over a call while another thread waits for input", "[bounded_call]") {
  CHECK(status_of([] {
          std::array<int, 2> input{};
          if (::pipe(input.data()) != 0 || ::dup2(input[0], STDIN_FILENO) < 0) {
            return;
          }
          std::thread([] { (void)std::getchar(); }).detach();
          std::this_thread::sleep_for(100ms);  // it is inside
          static_cast<void>(call_within(10ms, [] { std::this_thread::sleep_for(1h); }));
          std::exit(7);
        }) == 7);
}

TEST_CASE("a child forked during a call leaves as it would without", "[bounded_call]") {
  CHECK(status_of([] {
          static_cast<void>(call_within(10ms, [] { std::this_thread::sleep_for(1h); }));
          const int without = status_of([] { std::exit(5); });
          const int with_its_own = status_of([] {
            static_cast<void>(call_within(10ms, [] { std::this_thread::sleep_for(1h); }));
            std::exit(5);
          });
          std::_Exit(10 * without + with_its_own);
        }) == 95);
}

TEST_CASE("the end comes at once where nobody uses the thing, and once", "[bounded_call]") {
  int ends = 0;
  UsedUntilEnded thing([&] { ++ends; });
  CHECK(UsedUntilEnded::Use(thing));
  CHECK(ends == 0);
  thing.end();
  CHECK(ends == 1);
  CHECK_FALSE(UsedUntilEnded::Use(thing));
  thing.end();
  CHECK(ends == 1);
}

TEST_CASE("the end waits for the last use, and who asks for it does not", "[bounded_call]") {
  int ends = 0;
  UsedUntilEnded thing([&] { ++ends; });
  {
    const UsedUntilEnded::Use outer(thing);
    {
      const UsedUntilEnded::Use inner(thing);
      thing.end();
      CHECK_FALSE(UsedUntilEnded::Use(thing));
    }
    CHECK(ends == 0);
  }
  CHECK(ends == 1);
}

TEST_CASE("threads never use what has ended", "[bounded_call]") {
  for (int round = 0; round < 200; ++round) {
    std::atomic<bool> gone{false};
    std::atomic<int> ends{0};
    std::atomic<int> used_after_the_end{0};
    UsedUntilEnded thing([&] {
      gone = true;
      ++ends;
    });
    const auto uses = [&] {
      while (const UsedUntilEnded::Use use{thing}) {
        used_after_the_end += gone ? 1 : 0;
      }
    };
    std::thread first(uses);
    std::thread second(uses);
    std::this_thread::yield();
    thing.end();
    first.join();
    second.join();
    CHECK(used_after_the_end == 0);
    CHECK(ends == 1);
  }
}
