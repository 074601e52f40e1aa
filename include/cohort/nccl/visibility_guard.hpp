#pragma once

/// \file
/// Whether a collective needs a kernel between it and its producer. Pure.
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
/// wait for the kernel itself may read in between.
///
/// The range was found on the released versions: 2.28.3 shows wrong elements, and 2.30.7 is the
/// first whose symmetric kernels wait.

namespace cohort {

/// First version with the fault, and first without, as `ncclGetVersion` gives them.
inline constexpr int kVisibilityFaultBegin = 22800;
inline constexpr int kVisibilityFaultEnd = 23007;

/// Whether the NCCL that was loaded has the fault.
[[nodiscard]] constexpr bool has_visibility_fault(int nccl_runtime_version) noexcept {
  return nccl_runtime_version >= kVisibilityFaultBegin &&
         nccl_runtime_version < kVisibilityFaultEnd;
}

/// Whether a collective must be preceded by the guard: only the symmetric path has the fault, and
/// it is taken only where input and output both lie in windows of the communicator.
[[nodiscard]] constexpr bool needs_visibility_guard(int nccl_runtime_version, bool in_in_window,
                                                    bool out_in_window) noexcept {
  return in_in_window && out_in_window && has_visibility_fault(nccl_runtime_version);
}

}  // namespace cohort
