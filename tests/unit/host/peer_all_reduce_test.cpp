// SPDX-License-Identifier: Apache-2.0
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
        // The last tensor that every rank reduces itself, and the first that goes in parts.
        const auto most = static_cast<std::int64_t>(4096 / size_of(dtype));
        check_all_reduce(site, plane, Dims{most}, dtype, op, Form::contiguous, false);
        check_all_reduce(site, plane, Dims{most + 1}, dtype, op, Form::contiguous, false);
      }
    }
  });
}
