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

TEST_CASE("ranks of norms that differ in anything are told which one does", "[norm]") {
  for (const int n : {2, 3}) {
    DYNAMIC_SECTION(n << " ranks") {
      run_ranks(n, check_norms_that_differ);
      run_ranks(n, check_captured_norms_that_differ);
    }
  }
}

TEST_CASE("a path tells where the sum of a norm lies", "[norm]") {
  for (const int n : {1, 2}) {
    run_ranks(n, check_norm_paths);
  }
}

TEST_CASE("debug checks tell ranks whose epsilons differ", "[norm]") {
  run_ranks(2, [](ControlPlane& world) {
    auto state = make_state(world, {.tp = 2}, {.debug_checks = true});
    auto& group = state.tp();
    Site site(group, Memory::ordinary);
    const NormTensors t(site, {});
    const auto norm = t.norm(group.rank() == 0 ? 1e-5F : 1e-6F);
    check_throws<SymmetryError>([&] { group.all_reduce_rms_norm_into(t.out, t.x, norm); },
                                "epsilon 1e-05", "epsilon 1e-06");
  });
}

TEST_CASE("a rank without rows is told from those that have some", "[norm]") {
  for (const bool map_peers : {true, false}) {
    run_ranks(2, [&](ControlPlane& world) {
      auto state =
          make_state(world, {.tp = 2}, {.backend = host_backend({.map_peers = map_peers})});
      auto& group = state.tp();
      std::vector<float> x(8, 1.0F);
      std::vector<float> residual(8, 1.0F);
      std::vector<float> weight(8, 1.0F);
      std::vector<float> out(8);
      const Dims shape{group.rank(), 8};
      const auto rows = [&](std::vector<float>& of) {
        return TensorView(of.data(), DType::f32, shape);
      };
      const ResidualNorm norm{.residual = rows(residual),
                              .weight = TensorView(weight.data(), DType::f32, {8})};
      check_throws<SymmetryError>([&] { group.all_reduce_rms_norm_into(rows(out), rows(x), norm); },
                                  "the ranks make different calls");
      check(residual == std::vector<float>(8, 1.0F), "nothing was added");
    });
  }
}
