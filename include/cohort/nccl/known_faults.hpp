// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "cohort/symmetric_policy.hpp"

/// \file
/// What each NCCL version does that a caller would not expect, as data with its source. Pure. The
/// guard, the choice of a path and the messages ask here; nothing else compares versions.
///
/// NCCL's files are cited by tag. "Measured" means on two H200s or H100s over NVLink.

namespace cohort {

/// What a caller would not expect of some versions.
enum class NcclTrait : std::uint8_t {
  windows,              ///< Windows and kernels that use them exist.
  early_start,          ///< Symmetric kernels may read before the producer's writes are visible.
  one_window_suffices,  ///< One registered buffer is enough for a symmetric kernel.
  bulk_by_alignment,    ///< How buffers lie to each other decides which symmetric kernel runs.
  own_offset_for_all,   ///< Symmetric kernels reach peers at the offset that the own buffer has.
  unabortable,          ///< A symmetric kernel whose peer is missing cannot be aborted.
  sizes_not_compared,   ///< Registrations of different sizes succeed, and mean nothing good.
  capture_lost,         ///< A registration inside a capture fails and invalidates the capture.
  destroy_waits,        ///< ncclCommDestroy waits for the peers of the host.
};

/// One trait, and the versions that have it: from `begin` up to, but not including, `end`, as
/// `ncclGetVersion` gives them.
struct NcclFact {
  NcclTrait trait;          ///< What holds.
  int begin;                ///< The first version, as NCCL_VERSION_CODE.
  int end;                  ///< The first version again without it.
  std::string_view effect;  ///< What a caller sees.
  std::string_view source;  ///< How it is known.

  /// Whether a version has the trait.
  [[nodiscard]] constexpr bool holds(int version) const noexcept {
    return version >= begin && version < end;
  }
};

/// Beyond every version.
inline constexpr int kNoNccl = 1'000'000;

/// All that is known.
inline constexpr NcclFact kNcclFacts[] = {
    {NcclTrait::windows, kMinNcclForWindows, kNoNccl, "has symmetric windows",
     "NCCL's release notes of 2.27.3-1"},
    {NcclTrait::early_start, 22800, 23007,
     "starts symmetric collectives before their input is visible",
     "v2.29.7-1: src/enqueue.cc launches every symmetric collective with programmatic stream "
     "serialization, and its kernels do not wait; v2.30.7-1: src/device/symmetric/generate.py has "
     "them wait. Measured: up to 100,352 wrong elements with 2.28.3, 2,128,256 with 2.29.7, none "
     "with 2.32.3"},
    {NcclTrait::one_window_suffices, 22900, kNoNccl,
     "takes symmetric kernels also where one buffer alone is registered",
     "v2.29.7-1: src/sym_kernels.cc keeps all kernels of an all-gather whose output is registered "
     "and of a reduce-scatter whose input is, and otherwise those that pass flags with the data; "
     "src/scheduler/symmetric_sched.cc takes the latter where its cost model would have taken "
     "NCCL's LL protocol. v2.28.3-1: the same file asks for both windows"},
    {NcclTrait::bulk_by_alignment, 23100, kNoNccl,
     "takes kernels that copy in bulk only where input and output lie alike in 16 bytes",
     "src/sym_kernels.cc drops its TMA kernels on Blackwell elsewhere"},
    {NcclTrait::own_offset_for_all, kMinNcclForWindows, kNoNccl,
     "needs buffers at one offset of their windows on all ranks",
     "NCCL's user guide, NCCL_WIN_COLL_SYMMETRIC: \"users need to guarantee the offset to the "
     "buffer head address from all ranks must be equal\"; src/device/symmetric/all_gather.cuh "
     "stores to every peer at the own output's offset"},
    {NcclTrait::unabortable, kMinNcclForWindows, 22907,
     "cannot abort a symmetric kernel whose peer is missing",
     "NCCL's release notes of 2.29.7: abort support in symmetric kernels"},
    {NcclTrait::sizes_not_compared, kMinNcclForWindows, 23007,
     "takes registrations of different sizes without an error",
     "NCCL's release notes of 2.30.7: asymmetric buffer sizes during window registration"},
    {NcclTrait::capture_lost, kMinNcclForWindows, 23007,
     "loses a capture in which a window is registered", "measured with 2.28.3 and 2.29.7"},
    {NcclTrait::destroy_waits, 23102, kNoNccl, "waits for the peers of the host in ncclCommDestroy",
     "measured: 12 s and more with 2.32.3 where the peer aborts instead, 0.5 s with 2.29.7"},
};

/// Whether any fact says so of that version.
[[nodiscard]] constexpr bool has_trait(NcclTrait trait, int version) noexcept {
  for (const NcclFact& fact : kNcclFacts) {
    if (fact.trait == trait && fact.holds(version)) {
      return true;
    }
  }
  return false;
}

/// "NCCL 2.28.3 has symmetric windows; starts symmetric collectives before ...": for logs.
[[nodiscard]] inline std::string describe_nccl(int version) {
  std::string text = "NCCL " + nccl_version_string(version);
  const char* separator = " ";
  for (const NcclFact& fact : kNcclFacts) {
    if (fact.holds(version)) {
      text.append(separator).append(fact.effect);
      separator = "; ";
    }
  }
  return text;
}

/// Why taking down a communicator may not come back: for a message. `aborted` where it was aborted
/// and not destroyed.
[[nodiscard]] inline std::string why_teardown_waits(int version, bool aborted) {
  std::string text = "a graph with its calls is still alive, or ";
  if (!aborted && has_trait(NcclTrait::destroy_waits, version)) {
    return text + "a rank of this host has not torn down its own, for which this NCCL waits";
  }
  if (aborted && has_trait(NcclTrait::unabortable, version)) {
    return text + "a symmetric kernel waits for a peer that is gone, which this NCCL cannot abort";
  }
  return text + "a kernel of it is still running";
}

}  // namespace cohort
