// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <numeric>
#include <vector>

#include "support/ranks.hpp"

/// \file
/// The ranks of the test program, in few letters.

namespace cohort::test {

[[nodiscard]] inline int ranks() { return world_size(); }
[[nodiscard]] inline int rank() { return world_rank(); }

[[nodiscard]] inline std::vector<int> everyone() {
  std::vector<int> all(static_cast<std::size_t>(ranks()));
  std::iota(all.begin(), all.end(), 0);
  return all;
}

}  // namespace cohort::test
