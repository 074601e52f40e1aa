// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <string>

#include "cohort/cuda/inbox.hpp"

/// \file
/// How many thread blocks a peer kernel is launched with, so that kernels which wait for peers
/// cannot keep each other off a card. Pure.

namespace cohort::cuda {

/// What a card has to hold at once.
struct BlockDemand {
  int multiprocessors = 0;  ///< Of the smallest card of the group.
  int ranks_per_card = 1;   ///< On the card that most ranks of the world share.
  int kernels_at_once = 2;  ///< Of one rank, on as many streams.
};

/// Multiprocessors that a peer kernel of the default budget leaves to others.
inline constexpr int kSpareMultiprocessors = 4;

/// Most thread blocks of a peer kernel; at least 1.
///
/// A block of a peer kernel may fill a multiprocessor, and stays until its peers' blocks of the
/// same number have come; it needs no others of theirs. So a kernel gets on as long as one of its
/// blocks at a time finds room on every card, and none is kept out for good where all kernels but
/// one leave room for it: k kernels of at most (SMs - spare) / (k - 1) blocks.
[[nodiscard]] constexpr int block_budget(const BlockDemand& demand) noexcept {
  const int ranks = std::max(demand.ranks_per_card, 1);
  const int others = ranks * std::max(demand.kernels_at_once, 1) - 1;
  const int fair = demand.multiprocessors / ranks;
  const int spared = demand.multiprocessors - kSpareMultiprocessors;
  return std::clamp(others == 0 ? fair : std::min(fair, spared / others), 1, kMaxPeerBlocks);
}

/// Most clusters of a peer kernel, by their size, on cards that run so many at once where nothing
/// else does; 0 for sizes that are not to be taken.
///
/// A cluster begins once all its blocks have room in one part of the card, and stays until the
/// peers' cluster of the same number has come. As above, no kernel is kept out for good where all
/// but one leave room for a cluster: k kernels of at most (room - 1) / (k - 1).
[[nodiscard]] constexpr ClusterRoom cluster_budget(const ClusterRoom& room,
                                                   const BlockDemand& demand) noexcept {
  const int others = std::max(demand.ranks_per_card, 1) * std::max(demand.kernels_at_once, 1) - 1;
  const auto fair = [others](int clusters) {
    return others == 0 ? clusters : std::max(clusters - 1, 0) / others;
  };
  return {.of_2 = fair(room.of_2), .of_4 = fair(room.of_4), .of_8 = fair(room.of_8)};
}

/// What all of several cards have room for.
[[nodiscard]] constexpr ClusterRoom least(const ClusterRoom& a, const ClusterRoom& b) noexcept {
  return {.of_2 = std::min(a.of_2, b.of_2),
          .of_4 = std::min(a.of_4, b.of_4),
          .of_8 = std::min(a.of_8, b.of_8)};
}

/// What to warn of where so many lanes are more than the kernels that the budget was made for; ""
/// where they are not.
[[nodiscard]] inline std::string lanes_warning(int lanes, int kernels_at_once) {
  if (lanes <= kernels_at_once) {
    return {};
  }
  return fmt::format(
      "{} lanes with CudaOptions::kernels_at_once = {}: own kernels on more than {} of them at "
      "once "
      "may keep each other off the cards, from three ranks on until the time limit; give "
      "kernels_at_once as many as there are lanes, and one for each other stream with calls",
      lanes, kernels_at_once, kernels_at_once);
}

/// The blocks of one call: the caller's limit, 0 for none, within the budget.
[[nodiscard]] constexpr int limited_blocks(int budget, int limit) noexcept {
  return limit > 0 ? std::min(limit, budget) : budget;
}

}  // namespace cohort::cuda
