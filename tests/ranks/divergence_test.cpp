// SPDX-License-Identifier: Apache-2.0
#include "support/divergence_checks.hpp"

#include "support/catch.hpp"
#include "support/ranks.hpp"
#include "support/trace_checks.hpp"

using namespace cohort::test;

TEST_CASE("another size is named") { check_other_size(world()); }

TEST_CASE("another order is named") { check_other_order(world()); }

TEST_CASE("releases in other orders leave offsets equal") { check_other_releases(world()); }

TEST_CASE("arenas recover from what one rank did") { check_recovery(world()); }

TEST_CASE("a failed allocation is named") { check_failed_allocation(world()); }

TEST_CASE("a failed allocation is known in both groups of an audience") {
  if (skip_all_if(world_size() % 2 != 0 || world_size() < 4, "needs two DCP groups")) {
    return;
  }
  check_failed_audience(world());
}

TEST_CASE("other options are named") { check_other_options(world()); }

TEST_CASE("other calls are named") {
  check_other_call(world(), false);
  check_other_call(world(), true);
  check_other_merge(world());
  check_other_query(world());
}

// Each ends the use of MPI, so each is a run of its own.
TEST_CASE("absent from growth", "[.absent_growth]") { check_absent_from_growth(world()); }

TEST_CASE("absent from a collective", "[.absent_collective]") {
  check_absent_from_collective(world());
}

// Judged by trace.sh, from what the ranks wrote.
TEST_CASE("traced: late for a call", "[.traced_call]") { hang_in_a_call(world()); }
TEST_CASE("traced: late for a replay", "[.traced_replay]") { hang_in_a_replay(world()); }
TEST_CASE("traced: late for growth", "[.traced_growth]") { hang_in_growth(world()); }
TEST_CASE("traced: killed", "[.traced_death]") { hang_after_a_death(world()); }
TEST_CASE("traced: late for a pair", "[.traced_pair]") { hang_in_a_pair(world()); }
TEST_CASE("traced: late for a state", "[.traced_formation]") { hang_in_formation(world()); }
TEST_CASE("traced: late for a shutdown", "[.traced_shutdown]") { hang_in_shutdown(world()); }
TEST_CASE("traced: another call", "[.traced_difference]") { differ_in_a_call(world()); }
