// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "cohort/cuda/cuda_ops.hpp"
#include "cohort/nccl/nccl_calls.hpp"
#include "cohort/nccl/nccl_group.hpp"
#include "cohort/nccl/nccl_packing.hpp"
#include "cohort/tensor.hpp"
#include "cohort/transport.hpp"

/// \file
/// Gathers and reduce-scatters whose ranks have different extents, which NCCL does not know: made
/// of its other calls.

namespace cohort::detail {

[[nodiscard]] inline bool all_equal(std::span<const std::int64_t> sizes) {
  return std::adjacent_find(sizes.begin(), sizes.end(), std::not_equal_to<>()) == sizes.end();
}

class NcclUnequalShares {
 public:
  NcclUnequalShares(NcclGroup& group, NcclCalls& calls) : group_(group), calls_(calls) {}

  /// Every rank sends its share to every other.
  void gather(const NcclCall& call, const ConstTensorView& in, const TensorView& out, int dim,
              std::span<const std::int64_t> sizes) {
    const auto all = shares(out, dim, sizes);
    const Share& mine = all[static_cast<std::size_t>(group_.rank)];
    const bool direct = fits(out, out, dim);
    const std::size_t in_bytes = in.is_contiguous() ? 0 : aligned(in.bytes());
    std::byte* scratch = nullptr;
    if (in_bytes > 0 || !direct) {
      scratch = scratch_at_least(group_, call, in_bytes + (direct ? 0 : aligned(out.bytes())));
    }
    const void* share = in.data();
    if (in_bytes > 0) {
      copy_view(in, {scratch, in.dtype(), in.shape(), in.device()}, call.stream);
      share = scratch;
    }
    auto* const to = direct ? static_cast<std::byte*>(out.data()) : scratch + in_bytes;
    std::vector<NcclCalls::Piece> messages;
    for (int step = 1; step < group_.size; ++step) {
      const int to_rank = (group_.rank + step) % group_.size;
      const int from_rank = (group_.rank - step + group_.size) % group_.size;
      const Share& theirs = all[static_cast<std::size_t>(from_rank)];
      if (mine.elements > 0) {
        messages.push_back(calls_.send(share, mine.elements, in.dtype(), to_rank));
      }
      if (theirs.elements > 0) {
        messages.push_back(calls_.recv(to + theirs.offset, theirs.elements, in.dtype(), from_rank));
      }
    }
    calls_.together(std::move(messages), call.stream);
    for (int r = 0; r < group_.size; ++r) {
      const Share& piece = all[static_cast<std::size_t>(r)];
      const TensorView slice = out.slice(dim, piece.begin, piece.extent);
      if (r == group_.rank) {
        copy_unless_same(in, slice, call.stream);
      } else if (!direct && piece.elements > 0) {
        copy_view({to + piece.offset, out.dtype(), slice.shape(), out.device()}, slice,
                  call.stream);
      }
    }
  }

  /// One reduction for each rank's share.
  void reduce_scatter(const NcclCall& call, const ConstTensorView& in, const TensorView& out,
                      int dim, std::span<const std::int64_t> sizes, ReduceOp op) {
    const auto all = shares(in, dim, sizes);
    const bool in_direct = fits(in, in, dim);
    const bool out_direct = out.is_contiguous();
    const std::size_t in_bytes = in_direct ? 0 : aligned(in.bytes());
    std::byte* scratch = nullptr;
    if (!in_direct || !out_direct) {
      scratch = scratch_at_least(group_, call, in_bytes + (out_direct ? 0 : aligned(out.bytes())));
    }
    const auto* from = static_cast<const std::byte*>(in.data());
    if (!in_direct) {
      from = scratch;
      for (const Share& piece : all) {
        const ConstTensorView slice = in.slice(dim, piece.begin, piece.extent);
        copy_view(slice, {scratch + piece.offset, in.dtype(), slice.shape(), in.device()},
                  call.stream);
      }
    }
    void* const share = out_direct ? out.data() : scratch + in_bytes;
    std::vector<NcclCalls::Piece> reductions;
    for (int r = 0; r < group_.size; ++r) {
      const Share& piece = all[static_cast<std::size_t>(r)];
      if (piece.elements > 0) {
        reductions.push_back(
            calls_.reduce(from + piece.offset, share, piece.elements, in.dtype(), op, r));
      }
    }
    calls_.together(std::move(reductions), call.stream);
    if (!out_direct) {
      copy_view(TensorView(share, out.dtype(), out.shape(), out.device()), out, call.stream);
    }
  }

 private:
  /// One rank's extents of a tensor, and where its elements lie without gaps among the others'.
  struct Share {
    std::int64_t begin = 0;
    std::int64_t extent = 0;
    std::size_t offset = 0;  ///< Bytes.
    std::size_t elements = 0;
  };
  [[nodiscard]] static std::vector<Share> shares(const ConstTensorView& full, int dim,
                                                 std::span<const std::int64_t> sizes) {
    const std::int64_t extent = full.size(dim);
    std::vector<Share> all;
    Share next;
    for (const std::int64_t size : sizes) {
      next.extent = size;
      next.elements = static_cast<std::size_t>(full.numel() / extent * size);
      all.push_back(next);
      next.begin += size;
      next.offset += next.elements * size_of(full.dtype());
    }
    return all;
  }

  NcclGroup& group_;
  NcclCalls& calls_;
};

}  // namespace cohort::detail
