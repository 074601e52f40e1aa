// SPDX-License-Identifier: Apache-2.0
#include "benches.hpp"
#include "decode_calls.hpp"
#include "statistics.hpp"

namespace cohort::bench {

void bench_gather_query(Session& session) {
  if (!divides_heads(session, "gather_query")) {
    return;
  }
  for (const DType dtype : session.options.dtypes) {
    for (const std::int64_t batch : session.options.batches) {
      const StepShape shape{batch, dtype, session.options.head_dim};
      Case work{.bench = "gather_query",
                .dtype = std::string(to_string(dtype)),
                .bytes = query_bytes(session.options, shape),
                .batch = batch,
                .bus_factor = gather_bus_factor(session.ranks())};
      for (const Way& way : ways(session)) {
        add_modes(session, work, gather_variant(session, way, shape));
      }
      session.runner.run(work);
    }
  }
}

void bench_dcp_merge(Session& session) {
  if (!divides_heads(session, "dcp_merge")) {
    return;
  }
  for (const DType dtype : session.options.dtypes) {
    for (const std::int64_t batch : session.options.batches) {
      const StepShape shape{batch, dtype, session.options.head_dim};
      Case work{.bench = "dcp_merge",
                .dtype = std::string(to_string(dtype)),
                .bytes = partial_bytes(session.options, shape),
                .batch = batch,
                .bus_factor = gather_bus_factor(session.ranks())};
      for (const MergeWay& merge : merge_ways(session, shape)) {
        add_modes(session, work, merge_variant(session, merge, shape));
      }
      session.runner.run(work);
    }
  }
}

}  // namespace cohort::bench
