// SPDX-License-Identifier: Apache-2.0
#include "cohort/norm_arguments.hpp"

#include "support/catch.hpp"
#include "support/norm_checks.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::test;

TEST_CASE("an all-reduce with residual and norm is exact, and near fp64", "[norm]") {
  for (const int n : {1, 2, 3, 4, 8}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_norms); }
  }
}

TEST_CASE("captured norms go on from what the residual holds", "[norm]") {
  for (const int n : {1, 2, 3}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_captured_norms); }
  }
}

TEST_CASE("wrong arguments of a norm are named before anything moves", "[norm]") {
  for (const int n : {1, 2}) {
    run_ranks(n, check_norm_errors);
  }
}

TEST_CASE("debug checks tell norms from all-reduces, and from norms of other outputs", "[norm]") {
  for (const bool same_call : {false, true}) {
    run_ranks(2, [&](ControlPlane& world) {
      auto state = make_state(world, {.tp = 2}, {.debug_checks = true});
      auto& group = state.tp();
      const bool second = group.rank() == 1;
      const NormCase c{.fp8 = second};
      Site site(group, Memory::ordinary);
      const NormTensors t(site, c);
      check_throws<SymmetryError>(
          [&] {
            if (second || same_call) {
              group.all_reduce_rms_norm_into(t.out, t.x, t.norm());
            } else {
              group.all_reduce(t.x);
            }
          },
          "all_reduce");
    });
  }
}
