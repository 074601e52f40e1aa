// SPDX-License-Identifier: Apache-2.0
// Ranks as processes, one of which meets a fault in a random phase. All others must get the right
// result or a typed error within 1.25 times the time limit of each call, the error must name the
// rank that failed or one that gave up because of it, nothing may be left behind, and those that
// live form a new state and go on.

#include "chaos/host_machine.hpp"
#include "chaos/supervisor.hpp"

int main(int argc, char** argv) {
  using namespace std::chrono_literals;
  const std::string help =
      "Starts ranks as processes, lets one meet a fault in a random phase, and judges the "
      "others.\n\n"
      "  chaos --rounds 1 --seed 17 --verbose\n\n" +
      std::string(cohort::chaos::kOptionHelp);
  return cohort::chaos::run(
      cohort::chaos::parse(argc, argv, help),
      {.make = cohort::chaos::make_host_machine, .slack = 600ms, .forming_slack = 600ms});
}
