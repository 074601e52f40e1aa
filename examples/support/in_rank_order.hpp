// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <cstdio>
#include <span>
#include <string>
#include <string_view>

#include "cohort/control_plane.hpp"

namespace example {

/// Collective: every rank's text, printed by rank 0 in rank order. Equal texts that follow each
/// other are printed once.
inline void print_in_rank_order(cohort::ControlPlane& world, std::string_view text) {
  std::string before;
  for (const auto& bytes : world.all_gather(std::as_bytes(std::span(text)))) {
    const std::string theirs(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    if (world.rank() == 0 && theirs != before) {
      fmt::print("{}\n", theirs);
    }
    before = theirs;
  }
  std::fflush(stdout);
}

}  // namespace example
