// SPDX-License-Identifier: Apache-2.0
#include <string>

#include "support/session.hpp"

int main(int argc, char** argv) {
  using namespace cohort::test;
  const auto result = run_session(
      argc, argv, [](const std::string&, Verdict here) { return here; }, true);
  print_counts(result.counts);
  return result.ok ? 0 : 1;
}
