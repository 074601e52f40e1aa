// SPDX-License-Identifier: Apache-2.0
#if !__has_include(<catch2/catch_all.hpp>)
#define CATCH_CONFIG_RUNNER
#endif
#include "support/session.hpp"

#include <array>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <utility>
#include <vector>

#include "support/catch.hpp"
#include "support/skip.hpp"

namespace cohort::test {
namespace {

#if __has_include(<catch2/catch_all.hpp>)
using ListenerBase = Catch::EventListenerBase;
constexpr std::array kNoColour{"--colour-mode", "none"};
#else
using ListenerBase = Catch::TestEventListenerBase;
constexpr std::array kNoColour{"--use-colour", "no"};
#endif

struct State {
  Agree agree;
  bool reports = true;
  Counts counts;
  std::string test_case;
  std::optional<std::string> skip_reason;
};

State& state() {
  static State instance;
  return instance;
}

// Marks the lines that tests/run.sh would otherwise add up.
const char* apart() {
  return std::getenv("COHORT_TEST_NOT_ADDED_UP") != nullptr ? " (not added up)" : "";
}

class Listener : public ListenerBase {
 public:
  using ListenerBase::ListenerBase;

  void testCaseStarting(const Catch::TestCaseInfo& info) override {
    state().test_case = info.name;
    state().skip_reason.reset();
    ListenerBase::testCaseStarting(info);
  }

  void testCaseEnded(const Catch::TestCaseStats& stats) override {
    ListenerBase::testCaseEnded(stats);
    const auto& name = state().test_case;
    const bool failed = stats.totals.testCases.failed > 0;
    const auto verdict =
        state().agree(name, {.failed = failed, .skipped = state().skip_reason.has_value()});
    auto& counts = state().counts;
    ++(verdict.failed ? counts.failed : verdict.skipped ? counts.skipped : counts.passed);
    if (verdict.skipped && state().reports) {
      std::printf("cohort-skip%s: %s: %s\n", apart(), name.c_str(), state().skip_reason->c_str());
    }
    std::fflush(stdout);
  }
};

CATCH_REGISTER_LISTENER(Listener)

}  // namespace

void mark_skipped(const std::string& reason) { state().skip_reason = reason; }

bool full_run() {
  const char* value = std::getenv("COHORT_TEST_FULL");
  return value != nullptr && std::string(value) == "1";
}

SessionResult run_session(int argc, char** argv, const Agree& agree, bool reports) {
  state().agree = agree;
  state().reports = reports;
  // One order and one seed, so that ranks run the same test cases with the same random inputs.
  std::vector<const char*> arguments(argv, argv + argc);
  arguments.insert(arguments.begin() + 1,
                   {"--order", "decl", "--rng-seed", "20240229", kNoColour[0], kNoColour[1]});

  Catch::Session session;
  const int parsed = session.applyCommandLine(static_cast<int>(arguments.size()), arguments.data());
  if (parsed != 0) {
    return {};
  }
  const int status = session.run();
  const auto& counts = state().counts;
  const bool nothing_ran = counts.passed + counts.failed + counts.skipped == 0;
  const bool listing = status == 0 && nothing_ran && argc > 1;
  return {.counts = counts, .ok = listing || (status == 0 && counts.failed == 0 && !nothing_ran)};
}

void print_counts(const Counts& counts) {
  std::printf("cohort-test%s: passed=%d failed=%d skipped=%d\n", apart(), counts.passed,
              counts.failed, counts.skipped);
  std::fflush(stdout);
}

}  // namespace cohort::test
