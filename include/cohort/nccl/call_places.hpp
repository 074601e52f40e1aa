// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cohort/hash.hpp"
#include "cohort/nccl/known_faults.hpp"
#include "cohort/nccl/visibility_guard.hpp"
#include "cohort/tensor.hpp"
#include "cohort/transport.hpp"

/// \file
/// Whether the ranks compare where the buffers of a call over NCCL lie, how, and what they compare.
/// Pure.
///
/// NCCL's symmetric kernels reach a peer at the offset that the buffer here has in its window, and
/// a rank cannot see where a peer's lies; nor whether it lies in a window at all, without which the
/// peer takes another path. Versions that are content with one window take other kernels, and where
/// their cost model says so the ordinary path, when the buffer that no peer touches lies in none. A
/// call that is captured is compared once, over the control plane,
/// before it is enqueued. For an eager call such an exchange, of tens of microseconds, is too slow:
/// the ranks meet in a kernel of their own before NCCL's, which takes the place of the guard, and a
/// difference fails the group. What NCCL's kernel does after that stays within the windows, which
/// have one size on all ranks. With debug checks eager calls are compared as captured ones.

namespace cohort {

enum class PlaceCheck : std::uint8_t {
  none,        ///< Places do not matter, or only debug checks would compare them.
  agreement,   ///< Over the control plane.
  own_kernel,  ///< In a kernel before the call.
};

/// What the decision rests on: all of it is equal on all ranks.
struct PlaceFacts {
  int nccl_runtime_version = 0;
  bool symmetric_kernel = false;  ///< NCCL has one for operation and type.
  bool registered = false;        ///< The group has registered windows.
  bool captured = false;          ///< The call is being captured.
  bool debug_checks = false;      ///< Time does not matter.
  bool own_kernels = false;       ///< The ranks have mapped each other's inboxes.
};

[[nodiscard]] constexpr PlaceCheck place_check(const PlaceFacts& facts) noexcept {
  if (!facts.registered || !facts.symmetric_kernel ||
      !has_trait(NcclTrait::own_offset_for_all, facts.nccl_runtime_version)) {
    return PlaceCheck::none;
  }
  if (facts.captured || facts.debug_checks) {
    return PlaceCheck::agreement;
  }
  return facts.own_kernels ? PlaceCheck::own_kernel : PlaceCheck::none;
}

/// Where the buffers of one rank's call lie: window and offset as a number, 0 outside of windows.
struct CallPlaces {
  std::uint64_t in = 0;
  std::uint64_t out = 0;
};

/// What has to be equal on all ranks: whether NCCL may take its symmetric path and, if so, the
/// places of what peers touch there: the output of an all-gather, the input of a reduce-scatter,
/// both of an all-reduce. What else decides which path and kernel it takes counts as well: which
/// buffers lie in windows at all, and in some versions how two that do lie to each other. 0 for the
/// ordinary path, which addresses no peer by an offset.
[[nodiscard]] constexpr std::uint64_t place_token(int nccl_runtime_version, Collective collective,
                                                  SymmetricPath path, CallPlaces places) noexcept {
  if (path == SymmetricPath::never) {
    return 0;
  }
  std::uint64_t token = detail::mix(detail::kHashSeed, static_cast<std::uint64_t>(path));
  token = detail::mix(token, (places.in != 0 ? 1U : 0U) + (places.out != 0 ? 2U : 0U));
  if (path == SymmetricPath::certain &&
      has_trait(NcclTrait::bulk_by_alignment, nccl_runtime_version)) {
    token = detail::mix(token, (places.in - places.out) % 16);
  }
  if (collective != Collective::all_gather) {
    token = detail::mix(token, places.in);
  }
  if (collective != Collective::reduce_scatter) {
    token = detail::mix(token, places.out);
  }
  return token;
}

/// Where the sum of rows that are then normed goes, as the path of the call depends on it: into the
/// output, or, where that is of another type, into memory of the arena, which lies in a window
/// where `x` does.
[[nodiscard]] inline TensorView sum_before_norm(const ConstTensorView& x, const TensorView& out) {
  return out.dtype() == x.dtype() ? out
                                  : TensorView(const_cast<void*>(x.data()), x.dtype(), x.shape(),
                                               x.strides(), x.device());
}

}  // namespace cohort
