// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "cohort/cuda/cuda_ops.hpp"
#include "cohort/cuda/cuda_peer_kernels.hpp"
#include "cohort/nccl/nccl_calls.hpp"
#include "cohort/nccl/nccl_group.hpp"
#include "cohort/tensor.hpp"
#include "cohort/transport.hpp"

/// \file
/// Packing around NCCL and the own kernels: scratch memory for tensors that do not lie as a path
/// needs them.

namespace cohort::detail {

inline constexpr std::size_t kScratchAlignment = 256;

[[nodiscard]] constexpr std::size_t aligned(std::size_t bytes) noexcept {
  return (bytes + kScratchAlignment - 1) / kScratchAlignment * kScratchAlignment;
}
/// Whether the shares lie one behind the other without gaps: nothing but extents of 1 before the
/// dimension.
[[nodiscard]] inline bool fits(const ConstTensorView& share, const ConstTensorView& full, int dim) {
  return extents_before(full.shape(), dim) == 1 && share.is_contiguous() && full.is_contiguous();
}
inline void copy_unless_same(const ConstTensorView& in, const TensorView& out,
                             cudaStream_t stream) {
  if (in.data() != out.data() || !(in.strides() == out.strides())) {
    copy_view(in, out, stream);
  }
}

/// The group orders its calls, so one has the scratch memory to itself. Whether the stream is
/// being captured matters only where the memory has to grow.
[[nodiscard]] inline std::byte* scratch_at_least(NcclGroup& group, const NcclCall& call,
                                                 std::size_t bytes) {
  return group.workspaces[group.lane].get(bytes, [&] { return group.is_captured(call.stream); });
}

[[nodiscard]] inline TensorView scratch_like(NcclGroup& group, const NcclCall& call,
                                             const ConstTensorView& view) {
  return {scratch_at_least(group, call, aligned(view.bytes())), view.dtype(), view.shape(),
          view.device()};
}

/// Which of a call's tensors are packed whether they have gaps or not.
struct AlwaysPacked {
  bool in = false;
  bool out = false;
};

/// Input and output of an elementwise call without gaps: the caller's own where they are so.
struct Packed {
  [[gnu::always_inline]] Packed(NcclGroup& group, const NcclCall& call, const ConstTensorView& from,
                                const TensorView& to, AlwaysPacked always = {})
      : in(from.data()), out(to.data()) {
    if (!from.is_contiguous() || !to.is_contiguous() || always.in || always.out) [[unlikely]] {
      pack(group, call, from, to, always);
    }
  }

  void unpack(const TensorView& to, cudaStream_t stream) const {
    if (unpack_) [[unlikely]] {
      copy_view(TensorView(out, to.dtype(), to.shape(), to.device()), to, stream);
    }
  }

  const void* in;
  void* out;

 private:
  [[gnu::noinline]] void pack(NcclGroup& group, const NcclCall& call, const ConstTensorView& from,
                              const TensorView& to, AlwaysPacked always) {
    const std::size_t in_bytes = from.is_contiguous() && !always.in ? 0 : aligned(from.bytes());
    const std::size_t out_bytes = to.is_contiguous() && !always.out ? 0 : aligned(to.bytes());
    std::byte* const scratch = scratch_at_least(group, call, in_bytes + out_bytes);
    if (in_bytes > 0) {
      const TensorView packed(scratch, from.dtype(), from.shape(), from.device());
      copy_view(from, packed, call.stream);
      in = packed.data();
    }
    if (out_bytes > 0) {
      out = scratch + in_bytes;
      unpack_ = true;
    }
  }

  bool unpack_ = false;
};

/// Collectives of equal shares through scratch memory.
class NcclPacking {
 public:
  NcclPacking(NcclGroup& group, NcclCalls& calls) : group_(group), calls_(calls) {}

  /// All-gather of equal shares through scratch memory.
  void gather(const NcclCall& call, const ConstTensorView& in, const TensorView& out, int dim) {
    const std::size_t in_bytes = in.is_contiguous() ? 0 : aligned(in.bytes());
    std::byte* const scratch = scratch_at_least(group_, call, in_bytes + aligned(out.bytes()));
    const void* share = in.data();
    if (in_bytes > 0) {
      copy_view(in, {scratch, in.dtype(), in.shape(), in.device()}, call.stream);
      share = scratch;
    }
    void* const gathered = scratch + in_bytes;
    if (group_.own(Collective::all_gather, in, out, ReduceOp::sum)) {
      auto dims = cuda::AlongDim::packed(static_cast<std::int64_t>(in.bytes()), group_.size,
                                         extents_before(in.shape(), dim));
      dims.form = group_.form;
      group_.peers->all_gather(dims, share, gathered, call.stream);
    } else {
      calls_.all_gather(in, dim, share, gathered, call.stream);
    }
    const auto dims = shares_of(in.shape(), in.numel(), out, dim);
    copy_joined(gathered, in.dtype(), out.data(), out.dtype(), dims, call.stream);
  }

  /// Reduce-scatter of equal shares through scratch memory.
  void reduce_scatter(const NcclCall& call, const ConstTensorView& in, const TensorView& out,
                      int dim, ReduceOp op) {
    const std::size_t in_bytes = aligned(in.bytes());
    const bool direct = out.is_contiguous();
    std::byte* const scratch =
        scratch_at_least(group_, call, in_bytes + (direct ? 0 : aligned(out.bytes())));
    auto dims = shares_of(out.shape(), out.numel(), in, dim);
    std::swap(dims.a, dims.b);
    copy_joined(in.data(), in.dtype(), scratch, in.dtype(), dims, call.stream);
    void* const share = direct ? out.data() : scratch + in_bytes;
    if (group_.own(Collective::reduce_scatter, in, out, op)) {
      group_.peers->reduce_scatter(
          cuda::AlongDim::packed(static_cast<std::int64_t>(out.bytes()), group_.size,
                                 extents_before(out.shape(), dim)),
          in.dtype(), scratch, share, call.stream);
    } else {
      calls_.reduce_scatter(out, dim, scratch, share, op, call.stream);
    }
    if (!direct) {
      copy_view(TensorView(share, out.dtype(), out.shape(), out.device()), out, call.stream);
    }
  }

 private:
  /// [n][share] without gaps against the ranks' shares within `full`: strides `a` and `b`.
  [[nodiscard]] JoinedDims shares_of(const Dims& share, std::int64_t share_numel,
                                     const ConstTensorView& full, int dim) const {
    JoinedDims dims;
    const Dims packed = contiguous_strides(share);
    dims.push(group_.size, share_numel, share[dim] * full.strides()[dim]);
    for (int d = 0; d < share.size(); ++d) {
      dims.push(share[d], packed[d], full.strides()[d]);
    }
    return dims;
  }

  NcclGroup& group_;
  NcclCalls& calls_;
};

}  // namespace cohort::detail
