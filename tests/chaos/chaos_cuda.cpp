// SPDX-License-Identifier: Apache-2.0
// Chaos on cards: see chaos.cpp. Ranks share a card where there are fewer than ranks.

#include "chaos/cuda_machine.hpp"
#include "chaos/supervisor.hpp"

int main(int argc, char** argv) {
  using namespace cohort::chaos;
  using namespace std::chrono_literals;
  const std::string help =
      "Chaos among ranks on CARDS cards: one meets a fault in a random phase, the others are "
      "judged."
      "\n\n  gpu_chaos 2 --rounds 1 --seed 17 --verbose\n\n" +
      std::string(kOptionHelp);
  cohort::tools::help_if_asked(argc, argv, help);
  const int cards = argc > 1 ? std::atoi(argv[1]) : 0;
  if (cards < 1) {
    cohort::tools::refuse(argc > 1 ? cohort::tools::no_such_option(argv[1], help)
                                   : "CARDS: expected how many; --help says more");
  }
  // A stream drains within three seconds beyond its limit, and forming makes three communicators.
  // Of a wait in a kernel of NCCL nobody knows for whom it is, unless a process is gone.
  return run(parse(argc - 1, argv + 1, help),
             {.make =
                  [cards](const Plan& plan, int rank, std::chrono::milliseconds limit) {
                    return std::make_unique<CudaMachine>(plan, rank, cards, limit);
                  },
              .adapt = for_cards,
              .slack = 3600ms,
              .forming_slack = 8000ms,
              .cannot_name =
                  [](const std::string& text) {
                    return text.find("the stream was still busy") != std::string::npos ||
                           text.find("did not return within") != std::string::npos;
                  }});
}
