// SPDX-License-Identifier: Apache-2.0
#include "support/capture_checks.hpp"
#include "support/catch.hpp"
#include "support/decode_checks.hpp"
#include "support/partials_checks.hpp"
#include "support/query_checks.hpp"
#include "support/ranks.hpp"

using namespace cohort::test;

TEST_CASE("merges are exact in every plan, type, base, layout and memory") {
  check_merges(world());
}

TEST_CASE("merges with exactly known answers") { check_exact_merges(world()); }

TEST_CASE("splits, sinks and ranks without tokens are merged exactly into every result") {
  check_partials(world());
}

TEST_CASE("queries of all heads are gathered in rank order") { check_gather_query(world()); }

TEST_CASE("quantised queries and their scales are gathered as rows of bytes") {
  check_gather_quantised(world());
}

TEST_CASE("all ranks' counts and slots of a step make up its sequences") {
  check_placed_steps(world());
}

TEST_CASE("what was reserved suffices for every plan") { check_reserved_decode(world()); }

TEST_CASE("a decode step is captured whole") { check_captured_decode(world()); }
