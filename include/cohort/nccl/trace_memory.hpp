// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

#include "cohort/control_plane.hpp"
#include "cohort/cuda/descriptor_exchange.hpp"
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

}  // namespace cohort
