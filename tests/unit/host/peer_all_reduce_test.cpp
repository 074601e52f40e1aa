// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cohort/host/peer_all_reduce.hpp>

#include "support/catch.hpp"
#include "support/host_site.hpp"

using namespace cohort;
using namespace cohort::test;

TEST_CASE("an all-reduce of every dtype and operation is exact, in one step and in parts",
          "[host]") {
  const int n = GENERATE(2, 3);
  run_ranks(n, [&](ControlPlane& plane) {
    for (const DType dtype : kReducible) {
      for (const ReduceOp op : {ReduceOp::sum, ReduceOp::prod, ReduceOp::min, ReduceOp::max}) {
        Site site(plane, {}, Memory::mixed);
        check_all_reduce(site, plane, Dims{129, 70}, dtype, op, Form::contiguous, true);
        // The last tensor that each of three ranks reduces itself, and the first that goes in
        // parts.
        const auto most = static_cast<std::int64_t>(4096 / size_of(dtype));
        check_all_reduce(site, plane, Dims{most}, dtype, op, Form::contiguous, false);
        check_all_reduce(site, plane, Dims{most + 1}, dtype, op, Form::contiguous, false);
      }
    }
  });
}

TEST_CASE("two ranks each reduce all of what fits a piece, wherever it lies", "[host]") {
  const Memory memory = GENERATE(Memory::ordinary, Memory::window, Memory::mixed);
  run_ranks(2, [&](ControlPlane& plane) {
    // A piece is 512 KiB; beyond, ranks reduce parts, in windows where both have some.
    for (const std::int64_t count : {1023, 1024, 128 * 1024, 128 * 1024 + 1}) {
      for (const Form form : {Form::contiguous, Form::sliced}) {
        for (const int in_place : {0, 1, 2}) {
          Site site(plane, {}, memory);
          // 2: on one of them.
          check_all_reduce(site, plane, Dims{count}, DType::f32, ReduceOp::sum, form,
                           in_place == 2 ? plane.rank() == 1 : in_place == 1);
        }
      }
    }
  });
}

TEST_CASE("parts are reduced in several pieces, where one rank alone has windows too", "[host]") {
  const int n = GENERATE(1, 2, 3, 4, 8);
  const Memory memory = GENERATE(Memory::ordinary, Memory::window, Memory::mixed);
  run_ranks(n, [&](ControlPlane& plane) {
    for (const std::int64_t count : {1025, 5000}) {  // pieces of 4 KiB
      for (const bool in_place : {false, true}) {
        Site site(plane, small_slots(), memory);
        for (const Form form : {Form::contiguous, Form::sliced}) {
          check_all_reduce(site, plane, Dims{count}, DType::f32, ReduceOp::sum, form, in_place);
          check_all_reduce(site, plane, Dims{count}, DType::bf16, ReduceOp::max, form, in_place);
        }
      }
    }
  });
}

TEST_CASE("two ranks may write to what they had reduced as soon as the call returns", "[host]") {
  const bool windows = GENERATE(false, true);
  run_ranks(2, [&](ControlPlane& plane) {
    Site site(plane, windows ? small_slots() : HostOptions{}, Memory::window);
    for (const std::int64_t count : {2048, 32 * 1024}) {
      const auto in = site.tensor(Dims{count}, DType::f32, Form::contiguous);
      const auto out = site.tensor(Dims{count}, DType::f32, Form::contiguous);
      for (const auto& to : {out, in}) {
        check(site.transport->path(Collective::all_reduce, in, to, 0) ==
                  (windows ? "direct" : "slot"),
              "path");
      }
      for (int round = 0; round < 200; ++round) {
        const auto value = static_cast<float>(round + plane.rank());
        std::fill_n(in.data_as<float>(), count, value);
        site.transport->all_reduce(in, out, ReduceOp::sum, {});
        std::fill_n(in.data_as<float>(), count, -1000.0F);  // while a slower rank may still read
        for (std::int64_t i = 0; i < count; ++i) {
          check_equal(out.data_as<float>()[i], static_cast<float>(2 * round + 1), "sum");
        }
      }
    }
  });
}
