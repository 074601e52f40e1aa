// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

#include "cohort/dtype.hpp"
#include "cohort/flight_ring.hpp"
#include "cohort/stream.hpp"
#include "cohort/tensor.hpp"

/// \file
/// What a call's record says of it, and what is known of a call while it is under way.

namespace cohort {

/// What a transport has done so far, as the recorder asks before and behind each call.
struct TransportStand {
  std::uint64_t steps = 0;            ///< Enqueued or captured, in all inboxes.
  std::uint8_t inbox = 0;             ///< Before a call: that counts the steps of it.
  CallPath path = CallPath::unknown;  ///< Of the last call.
};

/// A call under way.
struct TraceEntry {
  std::uint64_t sequence = 0;  ///< 0 where nothing is recorded.
  std::uint64_t before = 0;    ///< What was open.
  std::uint64_t steps = 0;     ///< Of the transport, when it began.
  std::uint64_t waits = 0;     ///< Of the thread, when it began.
  std::size_t bytes = 0;       ///< Of the tensor that it was called with.
  CaptureId capture = 0;       ///< Whose list it is of; 0 for none.
  std::uint8_t inbox = 0;      ///< That counts its steps.
};

namespace detail {

/// Ends the signature of a call that is not plain: ranks bring unequal shares, of which along `dim`
/// the own one differs, or the shape does not go into a record.
[[nodiscard, gnu::cold, gnu::noinline]] inline std::uint32_t mix_unusual(
    TraceSignature signature, const Dims& shape, int dim, std::span<const std::int64_t> sizes,
    bool uneven) noexcept {
  for (int d = 0; d < shape.size(); ++d) {
    signature.mix(uneven && d == dim ? 0 : shape[d]);
  }
  if (uneven) {
    signature.mix(sizes);
  }
  return signature.word();
}

/// The most that a record has room for, of an extent that is larger.
[[nodiscard]] constexpr std::uint32_t saturated(std::uint64_t extent) noexcept {
  return static_cast<std::uint32_t>(
      std::min<std::uint64_t>(extent, std::numeric_limits<std::uint32_t>::max()));
}

}  // namespace detail

/// The record of a call with a tensor: what has to be equal on all ranks goes into its signature.
/// In registers, where the caller puts it together with what else is known and writes it: it is
/// made in each call.
/// @param dim    Along it extents differ between the ranks where there are `sizes`, all ranks' own.
/// @param variant  The op, root, peer or base.
[[nodiscard, gnu::always_inline]] inline TraceRecord trace_record(
    TraceCall call, const Dims& shape, DType dtype, int dim, std::span<const std::int64_t> sizes,
    int variant) noexcept {
  TraceSignature signature;
  signature.mix(static_cast<std::int64_t>(static_cast<std::uint64_t>(call) << 56) +
                static_cast<std::int64_t>(variant) * 0x1000000 + dim * 0x10000 +
                shape.size() * 0x100 + static_cast<int>(dtype));
  // Equal shares follow from the shape, and are the same whichever call was made with them.
  std::int64_t uneven = 0;
  for (const std::int64_t size : sizes) {
    uneven |= size ^ sizes.front();
  }
  // Without a branch for each dimension: calls of different shapes alternate.
  static_assert(TraceRecord::kExtents == 5 && TraceRecord::kExtents <= kMaxDims);
  const auto extent = [&shape](int d) { return static_cast<std::uint64_t>(shape[d]); };
  const bool fits = ((extent(0) | extent(1) | extent(2) | extent(3) | extent(4)) >> 32) == 0 &&
                    shape.size() <= TraceRecord::kExtents;
  TraceRecord record{.call = call,
                     .dtype = dtype,
                     .ndim = static_cast<std::uint8_t>(shape.size()),
                     .variant = variant};
  if (uneven == 0 && fits) [[likely]] {
    // In pairs, as they lie in the record.
    const auto pair = [&extent](int d) {
      return static_cast<std::int64_t>(extent(d) | extent(d + 1) << 32);
    };
    record.signature = signature.mix(shape[0]).mix(pair(1)).mix(pair(3)).word();
    const auto whole = [&extent](int d) { return static_cast<std::uint32_t>(extent(d)); };
    record.extents = {whole(0), whole(1), whole(2), whole(3), whole(4)};
    return record;
  }
  record.signature = detail::mix_unusual(signature, shape, dim, sizes, uneven != 0);
  record.extents = {detail::saturated(extent(0)), detail::saturated(extent(1)),
                    detail::saturated(extent(2)), detail::saturated(extent(3)),
                    detail::saturated(extent(4))};
  return record;
}

}  // namespace cohort
