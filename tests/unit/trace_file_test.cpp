// SPDX-License-Identifier: Apache-2.0
#include "cohort/trace_file.hpp"

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using cohort::test::contains;

TEST_CASE("texts are quoted", "[trace_file]") {
  CHECK(detail::json_text("a\"b\\c\n") == "\"a\\\"b\\\\c\\u000a\"");
  CHECK(detail::json_text("") == "\"\"");
}

TEST_CASE("records' times are those of the day", "[trace_file]") {
  const TraceClock clock;
  const auto before = TraceClock::now();
  std::int64_t last = before.ns;
  while (last - before.ns < 20'000'000) {  // long enough for the rate to be known
    last = TraceClock::now().ns;
  }
  const auto end = TraceClock::now();
  CHECK(clock.ns(end.ticks, end) == end.ns);
  CHECK(std::abs(clock.ns(before.ticks, end) - before.ns) < 5'000'000);
}

TEST_CASE("a group's rings are written with what was recorded", "[trace_file]") {
  FlightRecorder recorder("tp[\"0\"]", 1, {4, 5}, {});
  const TraceEntry entry = recorder.begin({.signature = 9,
                                           .call = TraceCall::all_reduce,
                                           .dtype = DType::bf16,
                                           .ndim = 2,
                                           .variant = 3,
                                           .extents = {8, 16}},
                                          256, true, {}, 0, {}, 0);
  recorder.end(entry, {.steps = 1, .path = CallPath::own}, 2);
  static_cast<void>(recorder.agree("growth of arena tp[0]", 4096));
  const TraceClock clock;
  std::string out;
  detail::write_group(out, recorder, clock, TraceClock::now());
  CHECK_THAT(out, contains(R"({"name":"tp[\"0\"]","rank":1,"ranks":[4,5],"rings":[)"));
  CHECK_THAT(out, contains(R"("own":true)", R"("gone":false)", R"("open":2)"));
  CHECK_THAT(out, contains(R"("all_reduce",1,9,"bf16","own",0,0,1,0,3,2,[8,16]])"));
  CHECK_THAT(out, contains(R"("counters":[["own",1,256,2]])"));
  CHECK_THAT(out, contains(R"("notes":[[1,"growth of arena tp[0]"]])"));
  CHECK_THAT(out, contains(R"("progress":[[0,1,0,0]])"));
}

TEST_CASE("counters are written for Prometheus", "[trace_file]") {
  const auto recorder =
      std::make_shared<FlightRecorder>("tp[0]", 0, std::vector{0, 1}, TraceRings{});
  const TraceEntry entry = recorder->begin({.call = TraceCall::all_reduce}, 64, true, {}, 0, {}, 0);
  recorder->end(entry, {.path = CallPath::nccl}, 3);
  const std::vector groups{recorder};
  CHECK(prometheus_text(groups) ==
        "# HELP cohort_calls_total Calls that took a path.\n"
        "# TYPE cohort_calls_total counter\n"
        "cohort_calls_total{group=\"tp[0]\",path=\"nccl\"} 1\n"
        "# HELP cohort_bytes_total Bytes of the tensors that they were called with.\n"
        "# TYPE cohort_bytes_total counter\n"
        "cohort_bytes_total{group=\"tp[0]\",path=\"nccl\"} 64\n"
        "# HELP cohort_waits_total Times that the host waited in them for other ranks.\n"
        "# TYPE cohort_waits_total counter\n"
        "cohort_waits_total{group=\"tp[0]\",path=\"nccl\"} 3\n");
}
