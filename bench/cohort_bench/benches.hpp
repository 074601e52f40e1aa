// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "runner.hpp"

/// \file
/// The benchmarks. Each is collective and adds its rows to the session's sink.

namespace cohort::bench {

void bench_ceiling(Session& session);
void bench_all_gather(Session& session);
void bench_reduce_scatter(Session& session);
void bench_all_reduce(Session& session);
void bench_all_gather_dim(Session& session);
void bench_all_reduce_norm(Session& session);
void bench_gather_query(Session& session);
void bench_dcp_merge(Session& session);
void bench_merge_by_token(Session& session);
void bench_merge_replicated(Session& session);
void bench_merge_splits(Session& session);
void bench_merge_sink(Session& session);
void bench_gather_quantised(Session& session);
void bench_place_step(Session& session);
void bench_decode_step(Session& session);
void bench_arena(Session& session);
void bench_scope(Session& session);
void bench_recorder(Session& session);
void bench_registration(Session& session);
void bench_formation(Session& session);

}  // namespace cohort::bench
