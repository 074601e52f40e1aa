// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cohort/host/rendezvous.hpp>
#include <functional>
#include <memory>
#include <vector>

#include "support/threads.hpp"

/// \file
/// Ranks of the host transport that are threads of the test program, without a transport.

namespace cohort::test {

[[nodiscard]] inline host::PadGeometry small_pads(int ranks) {
  return {.ranks = ranks, .slot_bytes = 4096};
}

/// One for each rank, with its head.
[[nodiscard]] inline std::vector<std::shared_ptr<host::SharedMemory>> pads_of(
    const host::PadGeometry& geometry) {
  std::vector<std::shared_ptr<host::SharedMemory>> pads;
  for (int r = 0; r < geometry.ranks; ++r) {
    pads.push_back(host::make_shared_memory(geometry.bytes(), host::Commit::at_first_access));
    host::GroupPads::construct(*pads.back(), geometry);
  }
  return pads;
}

[[nodiscard]] inline host::Showing showing(host::Place place) {
  host::Showing result{};
  result.place = place;
  return result;
}

/// Runs `body(rendezvous)` for each of n ranks on threads of one process.
inline void meet(int n, std::chrono::milliseconds limit,
                 const std::function<void(host::Rendezvous&)>& body) {
  const host::PadGeometry geometry = small_pads(n);
  const auto pads = pads_of(geometry);
  run_ranks(n, [&](ControlPlane& plane) {
    host::Rendezvous rendezvous(pads, geometry, plane.rank(), "test", limit);
    body(rendezvous);
    plane.barrier();  // a rank that leaves early would be noticed
  });
}

}  // namespace cohort::test
