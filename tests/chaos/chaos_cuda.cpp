// SPDX-License-Identifier: Apache-2.0
// Chaos on cards: see chaos.cpp. Ranks share a card where there are fewer than ranks.
//
//   chaos_cuda CARDS [option of chaos...]

#include "chaos/cuda_machine.hpp"
#include "chaos/supervisor.hpp"

int main(int argc, char** argv) {
  using namespace cohort::chaos;
  using namespace std::chrono_literals;
  const int cards = argc > 1 ? std::atoi(argv[1]) : 0;
  if (cards < 1) {
    std::fprintf(stderr, "chaos_cuda CARDS [option of chaos...]\n");
    return 2;
  }
  // Waits that were told to end take up to a second more, and forming makes three communicators.
  return run(parse(argc - 1, argv + 1),
             {.make =
                  [cards](const Plan& plan, int rank, std::chrono::milliseconds limit) {
                    return std::make_unique<CudaMachine>(plan, rank, cards, limit);
                  },
              .adapt = for_cards,
              .slack = 1600ms,
              .forming_slack = 4000ms});
}
