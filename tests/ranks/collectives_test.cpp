// SPDX-License-Identifier: Apache-2.0
#include "support/capture_checks.hpp"
#include "support/catch.hpp"
#include "support/collective_checks.hpp"
#include "support/norm_checks.hpp"
#include "support/ranks.hpp"

using namespace cohort;
using namespace cohort::test;

TEST_CASE("all-gather and reduce-scatter are exact along every dimension") {
  check_shapes(world());
}

TEST_CASE("every collective is exact in every memory and form") { check_every_collective(world()); }

TEST_CASE("every dtype is moved and reduced exactly") { check_every_dtype(world()); }

TEST_CASE("gathering and scattering work in place") { check_in_place(world()); }

TEST_CASE("ranks that cannot map each other exchange the same bytes") {
  auto state =
      make_state(world(), {.tp = world_size()}, {.backend = host_backend({.map_peers = false})});
  auto& tp = state.tp();
  for (const Form form : kForms) {
    Site site(tp, Memory::ordinary);
    check_all_gather(tp, site, {3, 5, 7}, 1, std::vector<std::int64_t>(u(tp.size()), 5),
                     DType::bf16, form);
    check_reduce_scatter(tp, site, {3, 5, 70}, -1, uneven(70, tp.size()), DType::f16, form);
    check_all_reduce(tp, site, {33, 9}, DType::f32, form);
    check_broadcast(tp, site, {33, 9}, DType::i64, form, tp.size() - 1);
    check_all_to_all(tp, site, {3, 9}, DType::f64, form);
    check_send_recv(tp, site, {3, 900}, DType::f32, form);
  }
}

TEST_CASE("an all-reduce with residual and norm is exact, and near fp64") { check_norms(world()); }

TEST_CASE("captured norms go on from what the residual holds") { check_captured_norms(world()); }

TEST_CASE("replays compute from fresh inputs, with eager calls between") { check_replays(world()); }
