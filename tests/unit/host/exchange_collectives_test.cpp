// SPDX-License-Identifier: Apache-2.0
#include <cohort/host/exchange_collectives.hpp>
#include <vector>

#include "support/catch.hpp"
#include "support/host_site.hpp"

using namespace cohort;
using namespace cohort::test;

TEST_CASE("collectives over the control plane are exact", "[host]") {
  const std::vector<std::vector<std::int64_t>> shapes = {
      {8}, {3, 5, 7}, {2, 3, 2, 3, 2}, {4, 96, 64}};
  const int n = GENERATE(2, 3, 4);
  run_ranks(n, [&](ControlPlane& plane) {
    for (const auto& shape : shapes) {
      for (const Form form : kForms) {
        check_shape(plane, apart(), Memory::ordinary, shape, form);
      }
    }
    Site site(plane, apart(), Memory::ordinary);
    for (const DType dtype : kReducible) {
      check_reduce_scatter(site, plane, Dims{30, 40}, 0, equal_sizes(n, 30), dtype, ReduceOp::prod,
                           Form::contiguous);
    }
  });
}

TEST_CASE("both ways give the same bits", "[host]") {
  run_ranks(3, [](ControlPlane& plane) {
    std::vector<std::vector<float>> results;
    const auto subgroup = plane.split(0, plane.rank(), "apart");
    for (ControlPlane* group : {&plane, subgroup.get()}) {
      Site site(*group, group == &plane ? HostOptions{} : apart(), Memory::ordinary);
      const auto in = site.tensor(Dims{3000}, DType::f32, Form::contiguous);
      const auto out = site.tensor(Dims{1000}, DType::f32, Form::contiguous);
      for (int i = 0; i < 3000; ++i) {  // sums that depend on the order of the operands
        in.data_as<float>()[i] =
            1.0F / static_cast<float>(1 + (i * 7919 + plane.rank() * 104729) % 1000003);
      }
      site.transport->reduce_scatter(in, out, 0, equal_sizes(3, 1000), ReduceOp::sum, {});
      results.emplace_back(out.data_as<float>(), out.data_as<float>() + 1000);
    }
    check(results[0] == results[1], "equal bits");
  });
}

TEST_CASE("a peer in another call is named, and the group is unusable afterwards", "[host]") {
  run_ranks(2, [](ControlPlane& plane) {
    Site site(plane, apart(), Memory::ordinary);
    const auto tensor = site.tensor(Dims{8}, DType::f32, Form::contiguous);
    const auto other = site.tensor(Dims{8}, DType::f32, Form::contiguous);
    check_throws<SymmetryError>(
        [&] {
          if (plane.rank() == 0) {
            site.transport->all_to_all(tensor, other, {});
          } else {
            site.transport->reduce_scatter(tensor, other.slice(0, 0, 4), 0, equal_sizes(2, 4),
                                           ReduceOp::sum, {});
          }
        },
        "exchange in group world: the ranks make different calls: most call all_to_all",
        "rank 1 calls reduce_scatter");
    check_throws<TransportError>([&] { site.transport->barrier({}); }, "earlier call");
  });
}

TEST_CASE("of several ranks in other calls all blame the same ones", "[host]") {
  run_ranks(4, [](ControlPlane& plane) {
    Site site(plane, apart(), Memory::ordinary);
    const auto tensor = site.tensor(Dims{64}, DType::f32, Form::contiguous);
    try {
      switch (plane.rank()) {
        case 1:
          site.transport->broadcast(tensor, 0, {});
          break;
        case 2:
          site.transport->barrier({});
          break;
        default:
          site.transport->all_reduce(tensor, tensor, ReduceOp::sum, {});
      }
      check(false, "a SymmetryError is thrown");
    } catch (const SymmetryError& error) {
      check(error.ranks() == std::vector{1, 2}, error.what());
      check_throws<SymmetryError>([] { throw; }, "rank 1 calls broadcast", "rank 2 calls barrier");
    }
  });
}

TEST_CASE("messages of another type or shape are refused", "[host]") {
  run_ranks(2, [](ControlPlane& plane) {
    for (const bool by_shape : {false, true}) {
      const auto group = plane.split(0, plane.rank(), by_shape ? "shape" : "type");
      Site site(*group, apart(), Memory::ordinary);
      const auto words = site.tensor(Dims{2, 3}, DType::i32, Form::contiguous);
      const auto floats = site.tensor(Dims{2, 3}, DType::f32, Form::contiguous);
      fill(floats, plane.rank());
      if (plane.rank() == 0) {
        site.transport->send(floats, 1, {});
        try {
          site.transport->send(floats, 1, {});
        } catch (const SymmetryError&) {  // may end behind the refusal
          check(site.transport->failed(), "the group has ended");
        }
        continue;
      }
      site.transport->recv(floats.reshape({3, 2}), 0, {});  // shapes count where it is asked for
      check_element(DType::f32, static_cast<const std::byte*>(floats.data()) + 20, value_at(0, 5),
                    "recv");
      if (by_shape) {
        site.transport->compare_shapes();
        check_throws<SymmetryError>(
            [&] {
              site.transport->recv(floats.reshape({3, 2}), 0, {});
            },
            "rank 0", "another shape");
      } else {
        check_throws<SymmetryError>([&] { site.transport->recv(words, 0, {}); }, "of f32",
                                    "expected 24 bytes of i32");
      }
    }
  });
}

TEST_CASE("who waits ends when a peer has refused what came from another", "[host]") {
  const auto start = Clock::now();
  run_ranks(3, [](ControlPlane& plane) {
    Site site(plane, apart(), Memory::ordinary);
    const auto words = site.tensor(Dims{4}, DType::i32, Form::contiguous);
    const auto floats = site.tensor(Dims{4}, DType::f32, Form::contiguous);
    if (plane.rank() == 1) {
      check_throws<SymmetryError>([&] { site.transport->recv(words, 0, {}); }, "of f32");
    } else {
      try {
        if (plane.rank() == 0) {
          site.transport->send(floats, 1, {});  // may end behind the refusal
        }
        site.transport->recv(floats, 1, {});
        check(false, "a SymmetryError is thrown");
      } catch (const SymmetryError& error) {
        check(error.ranks() == std::vector{0}, error.what());
        check_throws<SymmetryError>([] { throw; }, "rank 1 gave up", "of f32");
      }
    }
  });
  CHECK(Clock::now() - start < kRanksTimeLimit / 2);
}
