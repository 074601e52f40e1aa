// SPDX-License-Identifier: Apache-2.0
#include "groups.hpp"

#include <cohort/cohort.hpp>
#include <cstddef>
#include <thread>
#include <vector>

std::string groups_of_threads() {
  constexpr int kRanks = 4;
  const auto planes = cohort::make_thread_control_planes(kRanks);
  std::vector<int> dcp_ranks(kRanks, -1);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < kRanks; ++rank) {
    threads.emplace_back([&, rank] {
      auto state = cohort::ParallelState::create(
          *planes[static_cast<std::size_t>(rank)],
          {.layout = {.tp = kRanks, .pp = 1, .dcp = 2}, .backend = cohort::host_backend()});
      dcp_ranks[static_cast<std::size_t>(rank)] = state.dcp().rank();
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  std::string text;
  for (const int rank : dcp_ranks) {
    text += std::to_string(rank);
  }
  return text;
}
