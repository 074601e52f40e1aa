// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <exception>
#include <string>

#include "cohort/cuda/call_signature.hpp"
#include "cohort/cuda/cuda_peer_kernels.hpp"
#include "cohort/cuda/inbox.hpp"
#include "cohort/error.hpp"
#include "cohort/joined.hpp"

/// \file
/// What the own kernels of a group say where they have failed.

namespace cohort::detail {

/// Who did not come, as `rank` sees it, or two ranks whose calls differ, the first that it heard
/// of. Passed on to others, so it names this rank as any other.
[[nodiscard]] inline std::string own_failure_text(const CudaPeerKernels& peers,
                                                  const std::string& group, int rank) {
  const cuda::InboxError error = peers.error();
  if (error.theirs != cuda::PeerCall::none) {
    const bool same = error.theirs == error.mine;
    const bool missed_first = error.missing_rank < error.waiting_rank;
    const auto [first, second] = std::minmax(error.missing_rank, error.waiting_rank);
    return fmt::format(
        "group {}: at call {} of the group's own kernels rank {} made {}, and rank {} {}{}", group,
        error.epoch, first, to_string(missed_first ? error.theirs : error.mine), second,
        same ? "another" : to_string(missed_first ? error.mine : error.theirs),
        same && is_over_nccl(error.mine)
            ? ": its buffers lie at other offsets of their windows, or on one rank in none, or "
              "its sizes or types differ"
            : "");
  }
  if (error.missing_rank == rank) {
    return fmt::format(
        "group {}: rank {} did not come to call {} of the group's own kernels, {}, while rank {} "
        "waited for it",
        group, rank, error.epoch, to_string(error.mine), error.waiting_rank);
  }
  const auto missing = peers.missing();
  return fmt::format("group {}: rank{} {} did not come to call {} of the group's own kernels, {}",
                     group, missing.size() > 1 ? "s" : "", joined(missing, ", "), error.epoch,
                     to_string(error.mine));
}

/// The same as the error that the rank throws. Of calls that differ both ranks are named: nobody
/// knows which of them is wrong.
[[nodiscard]] inline std::exception_ptr own_failure(const CudaPeerKernels& peers,
                                                    const std::string& group, int rank) {
  const std::string text = own_failure_text(peers, group, rank) +
                           "; outputs since then are undefined, and the group must be formed anew";
  const cuda::InboxError error = peers.error();
  if (error.theirs == cuda::PeerCall::none) {
    return std::make_exception_ptr(TimeoutError(text, peers.missing()));
  }
  const auto [first, second] = std::minmax(error.missing_rank, error.waiting_rank);
  return std::make_exception_ptr(SymmetryError(text, {first, second}));
}

}  // namespace cohort::detail
