// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <string>

/// \file
/// The Catch session behind the main programs of unit and rank tests.

namespace cohort::test {

/// How one test case ended.
struct Verdict {
  bool failed = false;
  bool skipped = false;
};

/// Turns this process's verdict on a test case into that of all ranks.
using Agree = std::function<Verdict(const std::string& test_case, Verdict here)>;

/// What a program did, counted in test cases.
struct Counts {
  int passed = 0;
  int failed = 0;
  int skipped = 0;
};

struct SessionResult {
  Counts counts;
  bool ok = false;  ///< Catch ran and no test case failed.
};

/// Runs the test cases that the arguments select. `agree` is called after each, in the same order
/// on every rank. `reports`: this process prints the reasons of skips, one rank of a job.
[[nodiscard]] SessionResult run_session(int argc, char** argv, const Agree& agree, bool reports);

/// Prints the line that tests/run.sh adds up; a run that another test judges by its output is
/// started with COHORT_TEST_NOT_ADDED_UP in its environment.
void print_counts(const Counts& counts);

}  // namespace cohort::test
