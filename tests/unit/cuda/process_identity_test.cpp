// SPDX-License-Identifier: Apache-2.0
#include "cohort/cuda/process_identity.hpp"

#include <unistd.h>

#include <string>

#include "support/catch.hpp"
#include "support/forked.hpp"
#include "support/threads.hpp"

using namespace cohort;

TEST_CASE("a process knows itself", "[process_identity]") {
  const ProcessIdentity a = this_process();
  const ProcessIdentity b = this_process();
  CHECK(a.pid == ::getpid());
  CHECK(a.uid == ::geteuid());
  CHECK(a.start_time > 0);
  CHECK(a.start_time == process_start_time(std::to_string(::getpid())));
  CHECK(a.same_process(b));
  CHECK(a.secret != b.secret);  // one for each rank, also where ranks are threads
}

TEST_CASE("a forked child is another process", "[process_identity]") {
  const ProcessIdentity parent = this_process();
  test::run_in_child([&] {
    const ProcessIdentity child = this_process();
    test::check(child.same_machine(parent) && !child.same_process(parent), "not the parent");
    test::check(child.same_process(this_process()), "one and the same");
  });
  CHECK(parent.same_process(this_process()));
}

TEST_CASE("machines are told apart by boot id, never by guesses", "[process_identity]") {
  const ProcessIdentity here = this_process();
  ProcessIdentity elsewhere = here;
  elsewhere.boot_id[0] = elsewhere.boot_id[0] == 'f' ? '0' : 'f';
  CHECK_FALSE(here.same_machine(elsewhere));
  CHECK_FALSE(here.same_process(elsewhere));
  const ProcessIdentity unknown;
  CHECK_FALSE(unknown.same_machine(unknown));
}

TEST_CASE("NCCL's host identity follows its variable", "[process_identity]") {
  CHECK(nccl_host_identity("pair0") == "pair0");
  CHECK(nccl_host_identity("") == "");
  CHECK(nccl_host_identity(nullptr) == nccl_host_identity(nullptr));
  CHECK(nccl_host_identity(nullptr) != nccl_host_identity("pair0"));
}

TEST_CASE("a process that does not exist has no start", "[process_identity]") {
  CHECK(process_start_time("0") == 0);
}
