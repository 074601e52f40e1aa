// SPDX-License-Identifier: Apache-2.0
#include "cohort/traced_agreement.hpp"

#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "cohort/error.hpp"
#include "support/catch.hpp"

using namespace cohort;

namespace {

constexpr TraceRecord kReduce{.signature = 5, .call = TraceCall::all_reduce, .dtype = DType::bf16};

}  // namespace

TEST_CASE("agreements say on what, within the call that needs them", "[flight_recorder]") {
  FlightRecorder recorder("tp[0]", 0, {0, 1}, {});
  const TraceEntry outer = recorder.begin(kReduce, 0, true, {}, 0, {}, 0);
  {
    const detail::TracedAgreement inner(&recorder, "growth of arena tp[0]", 4096);
    CHECK(recorder.open_call() == "agreement #2, growth of arena tp[0]");
  }
  CHECK(recorder.open_call() == "all_reduce #1");
  recorder.end(outer, {}, 0);
  CHECK(recorder.open_call().empty());
  const detail::TracedAgreement nowhere(nullptr, "nothing", 0);
}

TEST_CASE("failures are reported, wrong arguments are not", "[flight_recorder]") {
  FlightRecorder recorder("tp[0]", 0, {0, 1}, {});
  std::vector<std::string> reported;
  recorder.on_failure([&](const FlightRecorder& of, const TraceFailure& failure) {
    CHECK(&of == &recorder);
    reported.push_back(failure.why + (failure.late ? " late" : ""));
  });
  const auto fail = [&](const auto& error) {
    CHECK_THROWS_AS(detail::reporting(&recorder, [&]() { throw error; }),
                    std::remove_cvref_t<decltype(error)>);
  };
  fail(UsageError("usage"));
  fail(ConfigError("config"));
  fail(TimeoutError("time", {1}));
  fail(SymmetryError("symmetry", {1}));
  CHECK(reported == std::vector<std::string>{"time late", "symmetry"});
  CHECK(recorder.failure()->why == "time");  // which tells more than what follows
  CHECK(recorder.failure()->missing == std::vector{1});
  const TraceEntry entry = recorder.begin(kReduce, 4, true, {}, 0, {}, 0);  // it works again
  recorder.end(entry, {.steps = 1, .path = CallPath::mapped}, 0);
  fail(SymmetryError("symmetry", {1}));
  CHECK(recorder.failure()->why == "symmetry");
  CHECK_THROWS_AS(detail::reporting(
                      &recorder, []() { throw TimeoutError("of others", {1}); }, false),
                  TimeoutError);
  CHECK(recorder.failure()->why == "of others");
  CHECK(recorder.failure()->missing.empty());
  CHECK(detail::reporting(&recorder, [] { return 5; }) == 5);
  CHECK_THROWS_AS(detail::reporting(nullptr, []() { throw TimeoutError("time", {1}); }),
                  TimeoutError);
}
