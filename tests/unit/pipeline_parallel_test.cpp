// SPDX-License-Identifier: Apache-2.0
#include "cohort/pipeline_parallel.hpp"

#include <optional>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/group_tensors.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::test;

TEST_CASE("stages know their neighbours", "[pp]") {
  run_ranks(3, [](ControlPlane& world) {
    auto state = make_state(world, {.tp = 1, .pp = 3});
    auto& pp = state.pp();
    const int rank = world.rank();
    check(pp.is_first() == (rank == 0) && pp.is_last() == (rank == 2), "ends");
    check(pp.prev() == (rank == 0 ? std::nullopt : std::optional(rank - 1)), "prev");
    check(pp.next() == (rank == 2 ? std::nullopt : std::optional(rank + 1)), "next");
    if (pp.is_first()) {
      check_throws<UsageError>([&] { (void)pp.recv_tensors(); }, "recv_tensors", "first stage");
      check_throws<UsageError>([&] { pp.recv_tensors_into({}); }, "recv_tensors", "first stage");
    }
    if (pp.is_last()) {
      check_throws<UsageError>([&] { pp.send_tensors({}); }, "send_tensors", "last stage");
    }
  });
}

TEST_CASE("named sets travel through the stages", "[pp]") {
  for (const bool near : {true, false}) {
    for (const int n : {1, 2, 3, 4}) {
      run_ranks(n, [n, near](ControlPlane& world) {
        auto state =
            make_state(world, {.tp = 1, .pp = n}, {.backend = host_backend({.map_peers = near})});
        auto& pp = state.pp();
        for (int step = 0; step < 5; ++step) {
          Site site(pp, Memory::ordinary);
          const auto hidden = site.tensor({3, 40'000}, DType::bf16);
          const auto residual = site.tensor({7, 5}, DType::f32).transpose(0, 1);
          const auto nothing = site.tensor({0, 4}, DType::i64);
          const std::vector<NamedView> set{
              {"hidden", hidden}, {"residual", residual}, {"nothing", nothing}};
          if (pp.is_first()) {
            fill(hidden, step);
            fill(residual, step + 1);
          } else if (step % 2 == 0) {
            pp.recv_tensors_into(set);
          } else {
            const auto received = pp.recv_tensors();
            check_equal(received.size(), std::size_t{3}, "tensors");
            check(received[0].name == "hidden" && received[1].name == "residual" &&
                      received[2].name == "nothing",
                  "names in order");
            check(received[1].tensor.shape() == Dims{5, 7}, "shape");
            check(received[2].tensor.dtype() == DType::i64, "dtype");
            pp.backend().ops().copy(received[0].tensor.view(), hidden, {});
            pp.backend().ops().copy(received[1].tensor.view(), residual, {});
          }
          check_values(hidden, "hidden", [&](std::int64_t flat) { return value_at(step, flat); });
          check_values(residual, "residual",
                       [&](std::int64_t flat) { return value_at(step + 1, flat); });
          if (!pp.is_last()) {
            pp.send_tensors(set);
          }
        }
        // What one stage received did not bring the arenas apart.
        const Tensor x = pp.arena()->empty({4 << 20}, DType::u8, {});
        pp.barrier();
      });
    }
  }
}

TEST_CASE("a set that differs is refused, and the hand-over works on", "[pp]") {
  run_ranks(2, [](ControlPlane& world) {
    auto state = make_state(world, {.tp = 1, .pp = 2});
    auto& pp = state.pp();
    Site site(pp, Memory::ordinary);
    const auto a = site.tensor({4, 6}, DType::f32);
    const auto b = site.tensor({9}, DType::f32);
    const auto half = site.tensor({4, 6}, DType::f16);
    const std::vector<NamedView> sent{{"a", a}, {"b", b}};
    const std::vector<std::pair<std::vector<NamedView>, std::string>> wrong{
        {{{"a", a}}, "2 tensors instead of 1"},
        {{{"b", a}, {"b", b}}, "a f32(4,6) where b f32(4,6) was expected"},
        {{{"a", half}, {"b", b}}, "a f32(4,6) where a f16(4,6) was expected"},
        {{{"a", a}, {"b", b.slice(0, 0, 8)}}, "b f32(9) where b f32(8) was expected"},
        {{{"a", a.transpose(0, 1)}, {"b", b}}, "a f32(4,6) where a f32(6,4) was expected"}};
    if (!pp.is_first()) {  // nothing is received yet
      const std::vector<NamedView> overlapping{{"a", b.slice(0, 0, 5)}, {"c", b.slice(0, 4, 5)}};
      check_throws<UsageError>([&] { pp.recv_tensors_into(overlapping); }, "recv_tensors c",
                               "must not overlap a");
    }
    for (const auto& [expected, text] : wrong) {
      if (pp.is_first()) {
        pp.send_tensors(sent);
      } else {
        try {
          pp.recv_tensors_into(expected);
          check(false, "a difference was noticed");
        } catch (const SymmetryError& error) {
          const std::string what = error.what();
          check(what.find(text) != std::string::npos && what.find("pp[0]") != std::string::npos,
                what);
          check(error.ranks() == std::vector{0}, "names the sender");
        }
      }
    }
    if (pp.is_first()) {
      fill(a, 1);
      fill(b, 2);
      pp.send_tensors(sent);
    } else {
      pp.recv_tensors_into(sent);
      check_values(a, "a", [](std::int64_t flat) { return value_at(1, flat); });
      check_values(b, "b", [](std::int64_t flat) { return value_at(2, flat); });
    }
    pp.barrier();
  });
}
