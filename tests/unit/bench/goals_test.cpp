// SPDX-License-Identifier: Apache-2.0
#include "../bench/cohort_bench/goals.hpp"

#include <cmath>
#include <string>
#include <vector>

#include "../bench/cohort_bench/headline.hpp"
#include "support/catch.hpp"

using namespace cohort::bench;
using cohort::BackendKind;

namespace {

bool is_near(double a, double b) { return std::abs(a - b) < 1e-9; }

Row row(const std::string& bench, const std::string& path, const std::string& plan,
        const std::string& mode, std::int64_t bytes, std::int64_t batch, double us) {
  Row made{.bench = bench, .path = path, .plan = plan, .mode = mode, .dtype = "f32", .ranks = 2};
  made.bytes = bytes;
  made.batch = batch;
  made.us = {us, us, us};
  return made;
}

}  // namespace

TEST_CASE("a host goal compares rows of one payload, with the limit of its size") {
  const std::vector<Row> rows{row("all_gather", "raw", "-", "eager", 2048, 0, 1.0),
                              row("all_gather", "symmetric", "-", "eager", 2048, 0, 0.4),
                              row("all_gather", "raw", "-", "eager", 65536, 0, 10.0),
                              row("all_gather", "symmetric", "-", "eager", 65536, 0, 6.0),
                              row("all_gather", "shared_loop", "-", "eager", 65536, 0, 8.0),
                              row("reduce_scatter", "raw", "-", "eager", 8192, 0, 10.0),
                              row("reduce_scatter", "symmetric", "-", "eager", 8192, 0, 1.0),
                              row("all_gather", "plain", "-", "eager", 65536, 0, 10.5),
                              row("all_gather", "symmetric", "-", "graph", 65536, 0, 0.1)};
  const auto goals = goals_of(BackendKind::host, rows);
  REQUIRE(goals.size() == 5);
  CHECK(is_near(goals[0].value, 0.4));
  CHECK(goals[0].limit == 0.5);
  CHECK(goals[0].met());
  CHECK(is_near(goals[1].value, 0.6));
  CHECK(goals[1].limit == 0.5);
  CHECK_FALSE(goals[1].met());
  CHECK(is_near(goals[2].value, 0.1));
  CHECK(goals[2].limit == 0.2);
  CHECK(is_near(goals[3].value, 0.75));
  CHECK(goals[3].limit == 1.0);
  CHECK(goals[4].limit == 1.05);
  const std::string table = goals_table(goals);
  CHECK(table.find("64 KiB: symmetric / raw") != std::string::npos);
  CHECK(table.find("UNMET") != std::string::npos);
  CHECK(table.find("4 of 5 goals met") != std::string::npos);
}

TEST_CASE("the merge is compared with the staged plan in the type that MPI can add") {
  const std::vector<Row> rows{row("dcp_merge", "own", "one_kernel", "eager", 100, 4, 3.0),
                              row("dcp_merge", "raw", "staged_fp32", "eager", 100, 4, 10.0),
                              row("scope", "symmetric", "-", "eager", 0, 0, 0.021),
                              row("arena", "symmetric", "-", "eager", 0, 10'000, 0.1),
                              row("arena", "symmetric", "-", "eager", 0, 10, 0.1)};
  const auto goals = goals_of(BackendKind::host, rows);
  REQUIRE(goals.size() == 3);
  CHECK(is_near(goals[0].value, 0.3));
  CHECK(goals[0].what.find("raw staged_fp32") != std::string::npos);
  CHECK_FALSE(goals[1].met());  // 21 ns
  CHECK(goals[2].met());
}

TEST_CASE("a record is judged by itself, and by what it adds to a call") {
  const std::vector<Row> rows{row("recorder", "plain", "-", "eager", 0, 0, 0.049),
                              row("recorded_call", "own", "record", "issue", 2048, 0, 0.051),
                              row("recorded_call", "own", "record, cold", "issue", 2048, 0, 0.3)};
  const auto goals = goals_of(BackendKind::cuda, rows);
  REQUIRE(goals.size() == 2);
  CHECK(goals[0].met());
  CHECK(is_near(goals[1].value, 51));
  CHECK_FALSE(goals[1].met());
}

TEST_CASE("goals of cards count the run's own ceilings") {
  std::vector<Row> rows{row("ceiling", "barrier", "-", "graph", 0, 0, 2.0),
                        row("ceiling", "peer_write", "-", "graph", 1 << 20, 0, 3.0),
                        row("dcp_merge", "own", "one_kernel", "graph", 100, 1, 2.1),
                        row("dcp_merge", "own", "one_kernel", "graph", 100, 128, 30.0),
                        row("all_reduce", "plain", "-", "eager", 4096, 0, 10.5),
                        row("all_reduce", "raw", "-", "eager", 4096, 0, 10.0),
                        row("all_reduce", "own", "-", "issue", 4096, 0, 1.6)};
  rows[1].busbw = 400;
  rows[3].busbw = 380;
  const auto goals = goals_of(BackendKind::cuda, rows);
  REQUIRE(goals.size() == 4);
  CHECK(is_near(goals[0].value, 1.05));
  CHECK(goals[0].met());
  CHECK(goals[1].at_least);
  CHECK(is_near(goals[1].value, 0.95));
  CHECK(goals[1].met());
  CHECK(is_near(goals[2].value, 0.5));  // microseconds a call
  CHECK_FALSE(goals[2].met());
  CHECK(goals[3].what.find("4 KiB: own, us to enqueue") != std::string::npos);
  CHECK_FALSE(goals[3].met());
}

TEST_CASE("decode_step's summary compares with what engines run in a graph") {
  std::vector<Row> rows{row("decode_step", "raw", "staged", "eager", 100, 1, 4000),
                        row("decode_step", "raw", "staged", "graph", 100, 1, 1000),
                        row("decode_step", "own", "one_kernel", "graph", 100, 1, 250),
                        row("decode_step", "raw", "tp_only", "graph", 50, 1, 500),
                        row("decode_step", "own", "tp_only", "graph", 50, 1, 300),
                        row("decode_step", "own", "one_kernel", "graph", 800, 8, 77)};
  for (Row& each : rows) {
    each.kv_bytes_per_rank = std::int64_t{each.plan == "tp_only" ? 2 : 1} << 30;
  }
  const std::string text = headline(rows, "f32", 1, 61);
  CHECK(text.find("250.0 us    0.250 of raw staged graph") != std::string::npos);
  CHECK(text.find("4000.0 us    4.000 of") != std::string::npos);
  CHECK(text.find("KV cache 2.00 GiB a rank; with DCP 1.00 GiB") != std::string::npos);
  CHECK(text.find("300.0 us (own graph)") != std::string::npos);
  CHECK(text.find("77.0") == std::string::npos);
  CHECK(headline(rows, "bf16", 1, 61).empty());
}
