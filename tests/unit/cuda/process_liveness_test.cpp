// SPDX-License-Identifier: Apache-2.0
#include <sys/wait.h>
#include <unistd.h>

#include <cohort/cuda/process_liveness.hpp>

#include "support/catch.hpp"

using namespace cohort;

TEST_CASE("a process is gone when it has ended, collected or not", "[process_liveness]") {
  const ProcessIdentity me = this_process();
  CHECK_FALSE(process_is_gone(me, me));
  int ends[2];
  REQUIRE(::pipe(ends) == 0);
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    char byte = 0;
    ::close(ends[1]);
    static_cast<void>(!::read(ends[0], &byte, 1));
    ::_exit(0);
  }
  ProcessIdentity other = me;
  other.pid = child;
  other.start_time = process_start_time(std::to_string(child));
  CHECK_FALSE(process_is_gone(me, other));
  ProcessIdentity before = other;  // had the number before the child
  before.start_time -= 1;
  CHECK(process_is_gone(me, before));
  ::close(ends[1]);
  ::close(ends[0]);
  siginfo_t info{};
  REQUIRE(::waitid(P_PID, static_cast<id_t>(child), &info, WEXITED | WNOWAIT) == 0);
  CHECK(process_is_gone(me, other));  // waits for its parent
  REQUIRE(::waitpid(child, nullptr, 0) == child);
  CHECK(process_is_gone(me, other));
}

TEST_CASE("nothing is said of processes elsewhere", "[process_liveness]") {
  const ProcessIdentity me = this_process();
  ProcessIdentity elsewhere = me;
  elsewhere.pid = 1 << 30;
  CHECK(process_is_gone(me, elsewhere));
  elsewhere.pid_namespace += 1;
  CHECK_FALSE(process_is_gone(me, elsewhere));
  elsewhere = me;
  elsewhere.boot_id[0] = elsewhere.boot_id[0] == 'x' ? 'y' : 'x';
  CHECK_FALSE(process_is_gone(me, elsewhere));
}
