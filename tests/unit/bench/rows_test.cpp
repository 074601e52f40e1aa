// SPDX-License-Identifier: Apache-2.0
#include "../bench/cohort_bench/rows.hpp"

#include <string>

#include "support/catch.hpp"

using namespace cohort::bench;

TEST_CASE("a row is one line of JSON with every key") {
  Row row{.bench = "all_gather", .path = "raw", .mode = "graph", .dtype = "bf16", .ranks = 2};
  row.bytes = 2048;
  row.us = {1.5, 2.25, 1.0};
  row.algbw = 1.3653;
  row.busbw = 0.6827;
  row.calls = 50;
  row.samples = 200;
  CHECK(to_json(row) ==
        R"({"bench": "all_gather", "path": "raw", "plan": "-", "mode": "graph", "dtype": "bf16", )"
        R"("ranks": 2, "bytes": 2048, "batch": 0, "us_p50": 1.5000, "us_p95": 2.2500, )"
        R"("us_min": 1.0000, "algbw": 1.365, "busbw": 0.683, "wrong": null, "calls": 50, )"
        R"("samples": 200})");
  row.wrong = 3;
  row.kv_bytes_per_rank = 7;
  const std::string line = to_json(row);
  CHECK(line.find(R"("wrong": 3)") != std::string::npos);
  CHECK(line.find(R"("kv_bytes_per_rank": 7})") != std::string::npos);
}

TEST_CASE("the table's lines are as wide as its head") {
  Row row{.bench = "reduce_scatter", .path = "raw_symmetric", .plan = "staged_fp32"};
  row.mode = "eager";
  row.dtype = "f32";
  CHECK(table_line(row).size() == table_head().size());
}

TEST_CASE("texts are escaped") {
  CHECK(cohort::detail::json_text("a\"b\\c\nd") == "\"a\\\"b\\\\c\\u000ad\"");
  Meta meta;
  meta.text("command", "cohort_bench \"x\"");
  meta.number("ranks", 2);
  meta.list("gpus", {"a", "b"});
  CHECK(meta.to_json() ==
        R"({"meta": {"command": "cohort_bench \"x\"", "ranks": 2, "gpus": ["a", "b"]}})");
}
