// SPDX-License-Identifier: Apache-2.0
#include <unistd.h>

#include <atomic>
#include <cohort/owner_process.hpp>
#include <mutex>
#include <thread>

#include "support/catch.hpp"
#include "support/forked.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::test;

TEST_CASE("an object is where it was made, and not in a forked child", "[owner_process]") {
  const OwnerProcess owner;
  CHECK(owner.is_here());
  owner.check("group tp[0]");
  run_in_child([&] {
    check(!owner.is_here(), "elsewhere");
    check_throws<UsageError>([&] { owner.check("group tp[0]"); }, "group tp[0]",
                             "forked child of its owner, process " + std::to_string(getppid()));
    const OwnerProcess own;
    check(own.is_here(), "the child's own");
    run_in_child([&] { check(!own.is_here() && !owner.is_here(), "a grandchild's neither"); });
    check(own.is_here(), "still the child's own");
  });
  CHECK(owner.is_here());
}

TEST_CASE("a copy belongs to the process of the original", "[owner_process]") {
  OwnerProcess owner;
  run_in_child([&] {
    OwnerProcess copy = owner;
    check(!copy.is_here(), "a copy");
    copy = OwnerProcess();
    check(copy.is_here(), "replaced");
  });
}

TEST_CASE("a mutex holds back threads of its owner", "[owner_process]") {
  OwnerMutex mutex;
  int count = 0;
  const auto add = [&] {
    for (int i = 0; i < 10'000; ++i) {
      const std::lock_guard lock(mutex);
      ++count;
    }
  };
  std::thread other(add);
  add();
  other.join();
  CHECK(count == 20'000);
}

TEST_CASE("a forked child does not wait for a thread of its parent's", "[owner_process]") {
  OwnerMutex mutex;
  std::atomic<bool> held{false};
  std::atomic<bool> over{false};
  std::thread other([&] {
    const std::lock_guard lock(mutex);
    held = true;
    while (!over) {
      std::this_thread::yield();
    }
  });
  while (!held) {
    std::this_thread::yield();
  }
  CHECK_NOTHROW(run_in_child([&] {
    alarm(10);  // kills it where it waits
    const std::lock_guard lock(mutex);
  }));
  over = true;
  other.join();
}
