// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstring>
#include <span>
#include <utility>
#include <vector>

#include "cohort/control_plane.hpp"

/// \file
/// What the ranks measured, brought together.

namespace cohort::bench {

/// Every rank's values, by rank. Collective.
template <class T>
[[nodiscard]] std::vector<std::vector<T>> gather(ControlPlane& world, std::span<const T> mine) {
  std::vector<std::vector<T>> all;
  for (const auto& bytes : world.all_gather(std::as_bytes(mine))) {
    std::vector<T> theirs(bytes.size() / sizeof(T));
    if (!theirs.empty()) {
      std::memcpy(theirs.data(), bytes.data(), theirs.size() * sizeof(T));
    }
    all.push_back(std::move(theirs));
  }
  return all;
}

}  // namespace cohort::bench
