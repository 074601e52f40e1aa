// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "cohort/control_plane.hpp"
#include "cohort/cuda/descriptor_exchange.hpp"
#include "cohort/cuda/inbox.hpp"
#include "cohort/error.hpp"
#include "cohort/flight_recorder.hpp"
#include "cohort/flight_ring.hpp"
#include "cohort/host/shared_memory.hpp"
#include "cohort/log.hpp"

/// \file
/// Memory of the host for the records of a group whose tensors lie on cards: a memory file of each
/// rank, which the ranks of its machine map. It has no name, and goes with the last that maps it.

namespace cohort {

/// Collective. The rings of the ranks that this one can map; where the system refuses memory files,
/// or a rank is on another machine, there is none of it. Throws what the control plane throws.
[[nodiscard]] inline TraceRings make_trace_rings(ControlPlane& group) {
  std::shared_ptr<host::SharedMemory> mine;
  host::MemoryHandle handle{};
  const auto without = [&group](const Error& error) {
    log(LogLevel::info, "group {}: records that others cannot see: {}", group.name(), error.what());
  };
  try {
    mine = host::make_shared_memory(sizeof(TraceRing), host::Commit::at_first_access);
    handle = mine->handle();
  } catch (const TransportError& error) {
    without(error);
  }
  const auto handles = detail::gather_values(group, handle);
  auto all = std::make_shared<std::vector<std::shared_ptr<host::SharedMemory>>>();
  TraceRings rings;
  for (std::size_t r = 0; r < handles.size(); ++r) {
    std::shared_ptr<host::SharedMemory> memory;
    try {
      if (static_cast<int>(r) == group.rank()) {
        memory = mine;
      } else if (handles[r].bytes == sizeof(TraceRing) &&
                 detail::text_of(handles[r].machine) == detail::text_of(handle.machine)) {
        memory = host::import_shared_memory(handles[r]);
      }
    } catch (const TransportError& error) {
      without(error);
    }
    rings.by_rank.push_back(memory != nullptr ? reinterpret_cast<TraceRing*>(memory->data())
                                              : nullptr);
    all->push_back(std::move(memory));
  }
  group.barrier();  // all that can have mapped it
  if (mine != nullptr) {
    mine->close_file();
  }
  rings.keep = std::move(all);
  return rings;
}

/// Writes how far a card has come into its rank's ring.
/// @param epochs  The last call of each inbox that it has begun.
/// @param over    All of them have ended, and none before its time.
/// @param error   The first wait of the group that failed.
inline void look_at_epochs(TraceRing& ring, std::span<const std::uint64_t> epochs, bool over,
                           const cuda::InboxError& error, int rank) noexcept {
  constexpr std::uint64_t kErrorEpoch = (std::uint64_t{1} << 40) - 1;  // what an error has of one
  for (std::size_t inbox = 0; inbox < epochs.size(); ++inbox) {
    const bool waits =
        error && error.waiting_rank == rank && error.epoch == (epochs[inbox] & kErrorEpoch);
    TraceRing::look(ring.progress[inbox], {.begun = epochs[inbox], .over = over, .waits = waits});
  }
}

}  // namespace cohort
