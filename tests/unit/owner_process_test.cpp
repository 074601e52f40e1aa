// SPDX-License-Identifier: Apache-2.0
#include <cohort/owner_process.hpp>

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
