// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cohort/nccl/known_faults.hpp"

/// \file
/// Whether NCCL takes a call over its symmetric path, and what must precede it there. Pure.
///
/// NCCL launches the kernels of its symmetric path with programmatic stream serialization, and in
/// some versions does not wait for the memory of the kernel before. If that one triggers its
/// completion early, as attention kernels do, the collective reads its input before the producer
/// has written it: wrong results, and no error. An empty kernel that is launched without the
/// attribute starts when the producer has ended and its writes are visible, and itself has none.
///
/// The guard cannot be spared after a kernel that never triggers early, such as the library's own
/// that pack and correct: the end of its last block lets the collective start, and the memory
/// barrier that makes its writes visible runs after that (NVIDIA/cccl, issue 9134). What does not
/// wait for the kernel itself may read in between. The kernel in which ranks meet before a call
/// (call_places.hpp) is launched without the attribute and writes nothing that the call reads: it
/// is a guard itself.

namespace cohort {

/// Where the buffers of a call lie: whole in one window of the communicator, or not.
struct InWindows {
  bool in = false;
  bool out = false;
};

/// What is known beforehand of a call's path.
enum class SymmetricPath : std::uint8_t {
  never,     ///< NCCL's ordinary path.
  possible,  ///< NCCL's cost model decides.
  certain,
};

/// NCCL's rule for a call that it has symmetric kernels for. `asked_for`: the process has set
/// NCCL_SYM_NOWIN_ENABLE or NCCL_SYM_KERNEL, which versions that are content with one window heed
/// without any.
[[nodiscard]] constexpr SymmetricPath symmetric_path(int nccl_runtime_version, InWindows windows,
                                                     bool asked_for = false) noexcept {
  if (!has_trait(NcclTrait::windows, nccl_runtime_version)) {
    return SymmetricPath::never;
  }
  if (windows.in && windows.out) {
    return SymmetricPath::certain;
  }
  if (!has_trait(NcclTrait::one_window_suffices, nccl_runtime_version)) {
    return SymmetricPath::never;
  }
  // Kernels that pass flags with the data yield to the ordinary path where NCCL's cost model says
  // so, others never; which it would be depends on the collective and the size.
  return windows.in || windows.out || asked_for ? SymmetricPath::possible : SymmetricPath::never;
}

/// Whether a call must be preceded by the guard.
[[nodiscard]] constexpr bool needs_visibility_guard(int nccl_runtime_version,
                                                    SymmetricPath path) noexcept {
  return path != SymmetricPath::never && has_trait(NcclTrait::early_start, nccl_runtime_version);
}

}  // namespace cohort
