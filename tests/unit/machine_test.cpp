// SPDX-License-Identifier: Apache-2.0
#include <cohort/machine.hpp>

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <string>

#include "support/catch.hpp"

using namespace cohort;

TEST_CASE("the boot id is the kernel's: 36 characters that stay", "[machine]") {
  const std::string id = boot_id();
  CHECK(id.size() == 36);
  CHECK(id[8] == '-');
  CHECK(boot_id() == id);
}

TEST_CASE("a boot id that cannot be read says why", "[machine]") {
  const pid_t child = fork();
  if (child == 0) {
    const rlimit none{0, 0};
    setrlimit(RLIMIT_NOFILE, &none);
    const BootId id = read_boot_id();
    _exit(id.text.empty() && id.error == EMFILE ? 0 : 1);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
}

TEST_CASE("the namespace is the one that /proc names, also in a child", "[machine]") {
  char link[64] = {};
  REQUIRE(readlink("/proc/self/ns/pid", link, sizeof(link) - 1) > 0);
  CHECK(std::string(link) == "pid:[" + std::to_string(pid_namespace()) + "]");
  const std::uint64_t mine = pid_namespace();
  const pid_t child = fork();
  if (child == 0) {
    _exit(pid_namespace() == mine ? 0 : 1);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
}
