// SPDX-License-Identifier: Apache-2.0
#include <cohort/host/peer_scatter.hpp>

#include "support/catch.hpp"
#include "support/host_site.hpp"

using namespace cohort;
using namespace cohort::test;

TEST_CASE("a reduce-scatter of every dtype and operation is exact", "[host]") {
  const int n = GENERATE(2, 3);
  run_ranks(n, [&](ControlPlane& plane) {
    for (const DType dtype : kReducible) {
      for (const ReduceOp op : {ReduceOp::sum, ReduceOp::prod, ReduceOp::min, ReduceOp::max}) {
        Site site(plane, {}, Memory::mixed);
        check_reduce_scatter(site, plane, Dims{5, 40}, 1, equal_sizes(n, 40), dtype, op,
                             Form::contiguous);
        check_reduce_scatter(site, plane, Dims{300, 40}, 0, equal_sizes(n, 300), dtype, op,
                             Form::contiguous);
      }
    }
  });
}
