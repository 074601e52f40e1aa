// SPDX-License-Identifier: Apache-2.0
#include "cohort/trace_file.hpp"

#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using cohort::test::contains;

TEST_CASE("texts are quoted", "[trace_file]") {
  CHECK(detail::json_text("a\"b\\c\n") == "\"a\\\"b\\\\c\\u000a\"");
  CHECK(detail::json_text("") == "\"\"");
  CHECK(detail::json_text("\xc3\xa4\xe2\x82\xac\xf0\x9f\x98\x80") ==
        "\"\xc3\xa4\xe2\x82\xac\xf0\x9f\x98\x80\"");
  // Cut in the middle, a tail alone, in more bytes than it takes, a surrogate, beyond Unicode.
  for (const char* const text :
       {"\xc3", "\xa4", "\xc0\xaf", "\xe0\x80\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xff"}) {
    std::string expected;
    for (std::size_t i = 0; i < std::string_view(text).size(); ++i) {
      expected += "\\ufffd";
    }
    CHECK(detail::json_text(text) == '"' + expected + '"');
  }
  CHECK(detail::json_text("a\xc3z") == "\"a\\ufffdz\"");
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
  CHECK_THAT(out,
             contains(R"({"name":"tp[\"0\"]","rank":1,"ranks":[4,5],"failure":null,"rings":[)"));
  CHECK_THAT(out, contains(R"("own":true)", R"("gone":false)", R"("open":2)", R"("live":false)"));
  CHECK_THAT(out, contains(R"("all_reduce",1,9,"bf16","own",2,0,1,0,3,2,[8,16]])"));
  CHECK_THAT(out, contains(R"("counters":[["own",1,256,2]])"));
  CHECK_THAT(out, contains(R"("notes":[[1,"growth of arena tp[0]"]])"));
  CHECK_THAT(out, contains(R"("progress":[[0,1,0,0,0]])"));
}

TEST_CASE("a failure is written with who was missing", "[trace_file]") {
  FlightRecorder recorder("tp[0]", 1, {4, 5}, {});
  recorder.failed("rank 0 did not come", true, {0});
  const TraceClock clock;
  std::string out;
  detail::write_group(out, recorder, clock, TraceClock::now());
  CHECK_THAT(
      out,
      contains(
          R"("failure":{"why":"rank 0 did not come","late":true,"missing":[0],"over":false})"));
}

TEST_CASE("a rank's own lists are written whole", "[trace_file]") {
  FlightRecorder recorder("tp[0]", 0, {0, 1}, {});
  for (std::size_t i = 0; i < TraceRing::kRecords + 5; ++i) {
    const TraceEntry entry = recorder.begin({.call = TraceCall::barrier}, 0, true, {}, 1, {}, 0);
    recorder.end(entry, {}, 0);
  }
  const TraceClock clock;
  std::string out;
  detail::write_group(out, recorder, clock, TraceClock::now());
  const auto count = [&out](std::string_view what) {
    std::size_t found = 0;
    for (auto at = out.find(what); at != std::string::npos; at = out.find(what, at + 1)) {
      ++found;
    }
    return found;
  };
  CHECK(count("\"barrier\"") == TraceRing::kRecords + 5);
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
