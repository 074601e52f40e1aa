// SPDX-License-Identifier: Apache-2.0
// Ranks as processes, one of which meets a fault in a random phase. All others must get the right
// result or a typed error within 1.25 times the time limit of each call, the error must name the
// rank that failed or one that gave up because of it, nothing may be left behind, and those that
// live form a new state and go on.

#include <cstdlib>
#include <string>
#include <string_view>

#include "chaos/host_machine.hpp"
#include "chaos/messages.hpp"
#include "chaos/supervisor.hpp"

int main(int argc, char** argv) {
  using namespace std::chrono_literals;
  if (argc == 3 && std::string_view(argv[1]) == "--messages") {
    return cohort::chaos::run_messages(std::atoi(argv[2]), 1s) == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
  }
  const std::string help =
      "Starts ranks as processes, lets one meet a fault in a random phase, and judges the "
      "others.\n\n"
      "  chaos --rounds 1 --seed 17 --verbose\n"
      "  chaos --messages MOST    instead: a rank, a thread here, dies at its k-th message, in so\n"
      "                           many cases, or in all for 0\n\n" +
      std::string(cohort::chaos::kOptionHelp);
  return cohort::chaos::run(
      cohort::chaos::parse(argc, argv, help),
      {.make = cohort::chaos::make_host_machine, .slack = 600ms, .forming_slack = 600ms});
}
