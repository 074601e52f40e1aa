// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

/// \file
/// Skipped test cases, counted apart from passed ones. Catch2 2.13 has no SKIP.

namespace cohort::test {

/// Marks the running test case as skipped. Return from the test case afterwards.
void mark_skipped(const std::string& reason);

/// `if (skip_if(pages < 2, "needs two pages")) return;`
[[nodiscard]] inline bool skip_if(bool condition, const std::string& reason) {
  if (condition) {
    mark_skipped(reason);
  }
  return condition;
}

/// Whether the long run was asked for (`tests/run.sh --full`): the place for long matrices.
[[nodiscard]] bool full_run();

}  // namespace cohort::test
