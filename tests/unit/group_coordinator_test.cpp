// SPDX-License-Identifier: Apache-2.0
#include "cohort/group_coordinator.hpp"

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "support/capture_checks.hpp"
#include "support/catch.hpp"
#include "support/collective_checks.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::test;

TEST_CASE("all-gather and reduce-scatter are exact along every dimension", "[group]") {
  for (const int n : {1, 2, 3, 4, 8}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_shapes); }
  }
}

TEST_CASE("every collective is exact in every memory and form", "[group]") {
  for (const int n : {1, 2, 3, 4, 8}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_every_collective); }
  }
}

TEST_CASE("every dtype is moved and reduced exactly", "[group]") {
  for (const int n : {1, 2, 3, 8}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_every_dtype); }
  }
}

TEST_CASE("gathering and scattering work in place", "[group]") {
  for (const int n : {1, 2, 3, 4}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_in_place); }
  }
}

TEST_CASE("wrong arguments are named before anything moves, and the group works on", "[group]") {
  for (const int n : {1, 2, 3}) {
    run_ranks(n, [n](ControlPlane& world) {
      auto state = make_state(world, {.tp = n, .dcp = n});
      auto& group = state.dcp();
      Site site(group, Memory::arena);
      const auto x = site.filled({2 * n, 7}, DType::f32);
      const auto half = site.tensor({2 * n, 7}, DType::f16);
      const TensorView scalar(x.data(), DType::f32, Dims{});
      const TensorView elsewhere(x.data(), DType::f32, {2 * n, 7}, {DeviceKind::cuda, 0});
      const auto refused = [](const std::function<void()>& call, std::string_view argument,
                              std::string_view part = "") {
        check_throws<UsageError>(call, argument, part);
      };
      refused([&] { (void)group.all_gather(x, 2); }, "all_gather x dim", "[-2, 2), got 2");
      refused([&] { (void)group.all_gather(x, -3); }, "all_gather x dim", "got -3");
      refused([&] { (void)group.all_gather(scalar, 0); }, "all_gather x dim");
      refused([&] { (void)group.all_gather(elsewhere, 0); }, "all_gather x", "cuda:0");
      refused([&] { group.all_gather_into(x.slice(0, 0, 1), x, 0); }, "all_gather out",
              fmt::format("expected f32({},7)", 2 * n * n));
      refused([&] { group.all_gather_into(half, x.slice(0, 0, 2), 0); }, "all_gather out",
              "expected f32");
      refused([&] { group.all_gather_into(elsewhere, x.slice(0, 0, 2), 0); }, "all_gather out",
              "cuda:0");

      const std::vector<std::int64_t> sizes(u(n), 2);
      const std::vector<std::int64_t> more(u(n) + 1, 2);
      const std::vector<std::int64_t> negative(u(n), -2);
      refused([&] { (void)group.all_gatherv(x, more, 0); }, "all_gather sizes",
              fmt::format("expected {} sizes", n));
      refused([&] { (void)group.all_gatherv(x, {}, 0); }, "all_gather sizes", "got 0");
      refused([&] { (void)group.all_gatherv(x, negative, 0); }, "all_gather sizes", "-2");
      refused([&] { (void)group.all_gatherv(x, sizes, 1); }, "all_gather x", "expected 2 extents");
      refused([&] { (void)group.reduce_scatterv(x, more, 0); }, "reduce_scatter sizes");
      refused([&] { (void)group.reduce_scatterv(x, sizes, 1); }, "reduce_scatter x",
              fmt::format("sum of {} extents along dimension 1", 2 * n));
      refused([&] { (void)group.reduce_scatterv(x, negative, 0); }, "reduce_scatter sizes");
      refused([&] { (void)group.reduce_scatter_along_dim(x, 5); }, "reduce_scatter x dim", "5");
      if (n > 1) {
        refused([&] { (void)group.reduce_scatter_along_dim(x.slice(0, 0, 1), 0); },
                "reduce_scatter x", fmt::format("{} ranks divide", n));
        refused([&] { (void)group.all_to_all(x.slice(0, 0, 1)); }, "all_to_all x", "divide");
      }
      refused([&] { group.reduce_scatter_into(half, x, 0); }, "reduce_scatter out");
      refused([&] { group.all_reduce_into(half, x); }, "all_reduce out", "expected f32");
      refused([&] { group.all_reduce_into(x.transpose(0, 1), x); }, "all_reduce out");
      refused([&] { group.all_reduce(elsewhere); }, "all_reduce", "cuda:0");
      refused([&] { group.broadcast(x, n); }, "broadcast root", fmt::format("[0, {})", n));
      refused([&] { group.broadcast(x, -1); }, "broadcast root", "-1");
      refused([&] { group.all_to_all_into(half, x); }, "all_to_all out");
      refused([&] { group.all_to_all_into(x, x); }, "all_to_all out", "input itself");
      refused([&] { group.send(x, n); }, "send to", "expected a rank");
      refused([&] { group.send(x, group.rank()); }, "send to", "own peer");
      refused([&] { group.recv(x, -1); }, "recv from", "expected a rank");
      refused([&] { group.recv(x, group.rank()); }, "recv from", "own peer");
      const TensorView odd(static_cast<std::byte*>(x.data()) + 2, DType::f32, {2 * n, 3});
      const TensorView even(x.data(), DType::f32, {2 * n, 3});
      const std::string_view multiple = "a multiple of 4 bytes";
      refused([&] { (void)group.all_gather(odd, 0); }, "all_gather x", multiple);
      refused([&] { group.reduce_scatter_into(odd.slice(0, 0, 2), even, 0); }, "reduce_scatter out",
              multiple);
      refused([&] { group.all_reduce(odd); }, "all_reduce", multiple);
      refused([&] { group.broadcast(odd, 0); }, "broadcast", multiple);
      refused([&] { (void)group.all_to_all(odd); }, "all_to_all", multiple);
      refused([&] { group.send(odd, 0); }, "send", multiple);
      check_all_reduce(group, site, {5, 7}, DType::f32, Form::contiguous);
    });
  }
}

TEST_CASE("uneven results keep the arenas alike", "[group]") {
  run_ranks(3, [](ControlPlane& world) {
    auto state = make_state(world, {.tp = 3, .dcp = 3});
    auto& group = state.dcp();
    Site site(group, Memory::ordinary);
    const auto x = site.filled({2000, 7}, DType::f32);
    const std::vector<std::int64_t> sizes{0, 1999, 1};
    const Tensor part = group.reduce_scatterv(x, sizes, 0);
    check(part.shape() == Dims{sizes[u(world.rank())], 7}, "shape");
    const Tensor grown = group.arena()->empty({4 << 20}, DType::u8, {});  // compares histories
  });
}

TEST_CASE("results that lie on their input are refused or exact", "[group]") {
  run_ranks(2, [](ControlPlane& world) {
    auto state = make_state(world, {.tp = 2, .dcp = 2});
    auto& group = state.dcp();
    Site site(group, Memory::arena);
    const auto big = site.filled({96}, DType::f32);
    const auto refused = [&](const std::function<void()>& call, std::string_view argument) {
      check_throws<UsageError>(call, argument, "input");
    };
    refused([&] { group.all_to_all_into(big.slice(0, 16, 64), big.slice(0, 0, 64)); },
            "all_to_all out");
    refused([&] { group.all_gather_into(big.slice(0, 0, 64), big.slice(0, 8, 32), 0); },
            "all_gather out");
    refused([&] { group.reduce_scatter_into(big.slice(0, 8, 32), big.slice(0, 0, 64), 0); },
            "reduce_scatter out");
    refused([&] { group.all_reduce_into(big.slice(0, 1, 64), big.slice(0, 0, 64)); },
            "all_reduce out");
    // In place, but the other rank's part of the input would be overwritten as well.
    const TensorView rows(big.data(), DType::f32, {2, 64}, {32, 1});
    refused([&] { group.reduce_scatter_into(rows.slice(0, group.rank(), 1), rows, 0); },
            "reduce_scatter out");
    check_all_reduce(group, site, {5, 7}, DType::f32, Form::contiguous);
  });
}

TEST_CASE("results that lie on themselves are refused before anything is enqueued", "[group]") {
  run_ranks(2, [](ControlPlane& world) {
    auto state = make_state(world, {.tp = 2, .dcp = 2});
    auto& group = state.dcp();
    Site site(group, Memory::arena);
    const auto x = site.filled({8, 8}, DType::f32);
    const auto y = site.filled({16, 8}, DType::f32);
    float* memory = site.tensor({128}, DType::f32).data_as<float>();
    const auto refused = [&](const std::function<void()>& call, std::string_view argument) {
      check_throws<UsageError>(call, argument, "elements that can be shown to lie apart");
    };
    for (const Dims& strides : {Dims{0, 1}, Dims{8, 0}, Dims{7, 1}, Dims{1, 1}, Dims{-7, 1}}) {
      const auto repeated = [&, strides = strides](const Dims& shape) {
        return TensorView(memory + 64, DType::f32, shape, strides);
      };
      const auto same = repeated({8, 8});
      refused([&] { group.all_gather_into(repeated({16, 8}), x, 0); }, "all_gather out");
      refused([&] { group.reduce_scatter_into(same, y, 0); }, "reduce_scatter out");
      refused([&] { group.all_reduce_into(same, x); }, "all_reduce out");
      refused([&] { group.all_reduce(same); }, "all_reduce out");
      refused([&] { group.broadcast(same, 0); }, "broadcast x");
      refused([&] { group.all_to_all_into(same, x); }, "all_to_all out");
      refused([&] { group.recv(same, 1 - group.rank()); }, "recv x");
    }
    // Where only the input does it is read as it is.
    const TensorView rows(memory, DType::f32, {8, 8}, {0, 1});
    fill(rows.slice(0, 0, 1), group.rank());
    const auto out = site.tensor({8, 8}, DType::f32);
    group.all_reduce_into(out, rows);
    check_values(out, "rows that are one row",
                 [](std::int64_t flat) { return value_at(0, flat % 8) + value_at(1, flat % 8); });
    check_all_reduce(group, site, {5, 7}, DType::f32, Form::contiguous);
  });
}

TEST_CASE("what was reserved for calls suffices, frozen, eagerly and in graphs", "[group]") {
  for (const int n : {1, 2, 3}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_reserved_calls); }
  }
}

TEST_CASE("a group of one returns tensors of its own", "[group]") {
  run_ranks(1, [](ControlPlane& world) {
    auto state = make_state(world, {});
    auto& group = state.world();
    std::vector<float> memory(12, 3.0F);
    const TensorView x(memory.data(), DType::f32, {3, 4});
    const Tensor results[] = {group.all_gather(x, 1), group.reduce_scatter_along_dim(x, 0),
                              group.all_to_all(x)};
    std::fill(memory.begin(), memory.end(), 2.0F);
    for (const Tensor& result : results) {
      check(group.arena()->offset_of(result.data()).has_value(), "in the group's arena");
      check(result.shape() == x.shape(), "shape");
      check(result.data_as<float>()[11] == 3.0F, "the values of the call");
    }
    group.all_gather_into(x, x, 1);  // in place: nothing to copy
    group.all_reduce(x);
    group.broadcast(x, 0);
    group.barrier();
    check(group.path(Collective::all_reduce, x, x) == "single rank", "path");
    check(memory == std::vector<float>(12, 2.0F), "unchanged");
  });
}
