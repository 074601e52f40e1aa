// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "cohort/cohort.hpp"
#include "cohort/torch.hpp"
#include "engines.hpp"
#include "operands.hpp"
#include "torch_pools.hpp"

/// \file
/// The operators of one group beside its collectives: who it is, its room, and its symmetric
/// memory.

namespace cohort::python {

/// This rank, then the world ranks of all, by rank in the group.
inline Sizes members(Name group) {
  const GroupUse<> use(group);
  Sizes numbers{use->rank()};
  numbers.insert(numbers.end(), use->ranks().begin(), use->ranks().end());
  return numbers;
}

inline void reserve(Name group, std::int64_t bytes) {
  if (bytes < 0) {
    throw UsageError(fmt::format("reserve: expected at least 0 bytes, got {}", bytes));
  }
  const GroupUse<> use(group);
  use->reserve(static_cast<std::size_t>(bytes));
}

/// Shape is batch, heads, latent, rope, value.
inline void reserve_for(Name group, Sizes shape, at::ScalarType dtype,
                        std::optional<at::ScalarType> query_dtype,
                        std::optional<at::ScalarType> rope_dtype) {
  const DcpUse use(group);
  DecodeShape step{.batch = shape.at(0),
                   .heads = shape.at(1),
                   .latent = shape.at(2),
                   .rope = shape.at(3),
                   .value = shape.at(4),
                   .dtype = dtype_from_torch(dtype)};
  if (query_dtype) {
    step.query_dtype = dtype_from_torch(*query_dtype);
  }
  if (rope_dtype) {
    step.rope_dtype = dtype_from_torch(*rope_dtype);
  }
  use->reserve_for(step);
}

inline void freeze(Name group) {
  const GroupUse<> use(group);
  use->freeze();
}

/// Used, reserved, peak, live blocks, segments, frozen.
inline Sizes arena(Name group) {
  const GroupUse<> use(group);
  const ArenaStatistics now = use->arena()->statistics();
  return {static_cast<std::int64_t>(now.used),     static_cast<std::int64_t>(now.reserved),
          static_cast<std::int64_t>(now.peak),     static_cast<std::int64_t>(now.live_blocks),
          static_cast<std::int64_t>(now.segments), now.frozen ? 1 : 0};
}

/// -1 for memory that is not the arena's.
inline std::int64_t arena_offset(const at::Tensor& x, Name group) {
  const GroupUse<> use(group);
  const auto offset = use->arena()->offset_of(x.const_data_ptr());
  return offset ? static_cast<std::int64_t>(*offset) : -1;
}

inline std::string path(Name collective, const at::Tensor& x, const at::Tensor& out,
                        std::int64_t dim, Name group) {
  const GroupUse<> use(group);
  for (const auto& [name, known] :
       {std::pair{"all_gather", Collective::all_gather},
        std::pair{"reduce_scatter", Collective::reduce_scatter},
        std::pair{"all_reduce", Collective::all_reduce},
        std::pair{"all_to_all", Collective::all_to_all},
        std::pair{"broadcast", Collective::broadcast},
        std::pair{"all_reduce_rms_norm", Collective::all_reduce_rms_norm}}) {
    if (collective == name) {
      return use->path(known, const_view_of(x), view_of(out), as_int(dim));
    }
  }
  throw UsageError(fmt::format("path: no collective is called {}", collective));
}

inline Names last_merge(Name group) {
  const DcpUse use(group);
  const MergeChoice choice = use->last_merge_choice();
  return {std::string(to_string(choice.plan)), choice.reason};
}

inline void barrier(Name group) {
  const GroupUse<> use(group);
  use->barrier(use.stream());
}

// Symmetric memory.

/// Whether the group has windows.
inline bool has_symmetric_memory(Name group) {
  const GroupUse<> use(group);
  return ScopeTarget(*use).arena != nullptr;
}

inline void enter_symmetric(Name group, bool disabled) {
  const GroupUse<> use(group);
  auto engine = Engines::of_process().group(group).engine;
  ScopeTarget target = *use;
  if (disabled) {
    target.arena = nullptr;
  }
  SymmetricScopes::of_thread().open.push_back({std::move(engine), target});
}

inline void leave_symmetric() {
  auto& open = SymmetricScopes::of_thread().open;
  if (open.empty()) {
    throw UsageError("use_symmetric_memory: left on another thread than it was entered on");
  }
  open.pop_back();
}

/// From the group's arena, whatever the policy says of its windows.
inline at::Tensor empty(Sizes size, at::ScalarType dtype, Name group) {
  const GroupUse<> use(group);
  return to_torch(use->arena()->empty(Dims(size), dtype_from_torch(dtype), use.stream()),
                  use.engine().backend);
}

/// From the scope that is open on this thread; torch's own under a null scope.
inline at::Tensor empty_in_scope(Sizes size, at::ScalarType dtype) {
  const auto& open = SymmetricScopes::of_thread().open;
  if (open.empty()) {
    throw UsageError("cohort.empty: no use_symmetric_memory is open on this thread");
  }
  Use use(open.back().engine, "cohort.empty");
  use.enter_capture();
  return use.result(size, dtype);
}

/// What torch's pools over the group's arena allocate with and give back to, as addresses; none
/// where the group has no windows or torch has no pools.
inline Sizes enter_pools(Name group) {
  const GroupUse<> use(group);
  if (ScopeTarget(*use).arena == nullptr ||
      use.engine().backend->device().kind == DeviceKind::host) {
    return {};
  }
  const auto allocate = TorchPools::of_process().enter(group);
  return {static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(allocate)),
          static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(&TorchPools::free))};
}

/// The number of the capture that the current stream is in, 0 for none.
inline std::int64_t capture(Name group) {
  const GroupUse<> use(group);
  return use.stream().valid() ? static_cast<std::int64_t>(use.stream().capture_id()) : 0;
}

}  // namespace cohort::python
