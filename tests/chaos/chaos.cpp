// SPDX-License-Identifier: Apache-2.0
// Ranks as processes, one of which meets a fault in a random phase. All others must get the right
// result or a typed error within 1.25 times the time limit of each call, the error must name the
// rank that failed or one that gave up because of it, nothing may be left behind, and those that
// live form a new state and go on.
//
//   chaos [--rounds N] [--seed S] [--ranks MOST] [--limit-ms MS] [--fault NAME] [--phase NAME]
//   [--verbose] chaos --rounds 1 --seed 17 --verbose        repeats round 17 alone

#include "chaos/host_machine.hpp"
#include "chaos/supervisor.hpp"

int main(int argc, char** argv) {
  using namespace std::chrono_literals;
  return cohort::chaos::run(
      cohort::chaos::parse(argc, argv),
      {.make = cohort::chaos::make_host_machine, .slack = 600ms, .forming_slack = 600ms});
}
