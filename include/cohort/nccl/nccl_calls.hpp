// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>
#include <fmt/format.h>
#include <nccl.h>

#include <cstddef>
#include <cstdint>

#include "cohort/agreement.hpp"
#include "cohort/cuda/call_signature.hpp"
#include "cohort/cuda/support_kernels.hpp"
#include "cohort/nccl/call_places.hpp"
#include "cohort/nccl/nccl_check.hpp"
#include "cohort/nccl/nccl_group.hpp"
#include "cohort/nccl/visibility_guard.hpp"
#include "cohort/runtime_env.hpp"
#include "cohort/tensor.hpp"
#include "cohort/transport.hpp"

/// \file
/// NCCL's calls, with what they need around them: places compared, reads made visible, errors
/// turned into exceptions.

namespace cohort::detail {

template <class Void>
[[nodiscard]] std::size_t element_count(const BasicTensorView<Void>& view) noexcept {
  return static_cast<std::size_t>(view.numel());
}

/// Tensors have no gaps.
class NcclCalls {
 public:
  explicit NcclCalls(NcclGroup& group) : group_(group) {}

  /// Calls within start at its end. An exception inside must still close NCCL's group.
  template <class Body>
  void together(const Body& body) {
    nccl(ncclGroupStart(), "ncclGroupStart");
    try {
      body();
    } catch (...) {
      static_cast<void>(ncclGroupEnd());
      throw;
    }
    nccl(ncclGroupEnd(), "ncclGroupEnd");
  }

  /// Scratch memory, which packed calls go through, lies in no window.
  [[nodiscard]] const char* path(Collective collective, const ConstTensorView& in,
                                 const TensorView& out, bool direct) const {
    switch (symmetric(collective, direct ? in.data() : nullptr, in.bytes(),
                      direct ? out.data() : nullptr, out.bytes(), in.dtype(), ReduceOp::sum)) {
      case SymmetricPath::never:
        break;
      case SymmetricPath::possible:
        return "nccl, maybe symmetric";
      case SymmetricPath::certain:
        return "nccl symmetric";
    }
    return "nccl";
  }

  /// Of equal shares of the type and size of `share`, without gaps.
  void all_gather(const ConstTensorView& share, const void* in, void* out, cudaStream_t stream) {
    prepare(Collective::all_gather, in, share.bytes(), out, whole(share), share.dtype(),
            ReduceOp::sum, stream);
    nccl(ncclAllGather(in, out, element_count(share), nccl_type(share.dtype()), handle(), stream),
         "ncclAllGather");
  }
  void reduce_scatter(const ConstTensorView& share, const void* in, void* out, ReduceOp op,
                      cudaStream_t stream) {
    prepare(Collective::reduce_scatter, in, whole(share), out, share.bytes(), share.dtype(), op,
            stream);
    nccl(ncclReduceScatter(in, out, element_count(share), nccl_type(share.dtype()), nccl_op(op),
                           handle(), stream),
         "ncclReduceScatter");
  }

  /// Of elements of the type and number of `like`'s, as below.
  void all_reduce(const ConstTensorView& like, const void* in, void* out, ReduceOp op,
                  cudaStream_t stream) {
    prepare(Collective::all_reduce, in, like.bytes(), out, like.bytes(), like.dtype(), op, stream);
    nccl(ncclAllReduce(in, out, element_count(like), nccl_type(like.dtype()), nccl_op(op), handle(),
                       stream),
         "ncclAllReduce");
  }
  void broadcast(const ConstTensorView& like, void* data, int root, cudaStream_t stream) {
    nccl(ncclBroadcast(data, data, element_count(like), nccl_type(like.dtype()), root, handle(),
                       stream),
         "ncclBroadcast");
  }
  void barrier(cudaStream_t stream) {
    void* const word = group_.barrier_word.get();
    nccl(ncclAllReduce(word, word, 1, ncclFloat32, ncclMax, handle(), stream), "ncclAllReduce");
  }

  void reduce(const void* in, void* out, std::size_t elements, DType dtype, ReduceOp op, int root,
              cudaStream_t stream) {
    nccl(ncclReduce(in, out, elements, nccl_type(dtype), nccl_op(op), root, handle(), stream),
         "ncclReduce");
  }
  void send(const void* data, std::size_t elements, DType dtype, int to, cudaStream_t stream) {
    nccl(ncclSend(data, elements, nccl_type(dtype), to, handle(), stream), "ncclSend");
  }
  void recv(void* data, std::size_t elements, DType dtype, int from, cudaStream_t stream) {
    nccl(ncclRecv(data, elements, nccl_type(dtype), from, handle(), stream), "ncclRecv");
  }

 private:
  void nccl(ncclResult_t code, const char* call) { group_.communicator->check(code, call); }
  [[nodiscard]] ncclComm_t handle() const { return group_.communicator->get(); }

  /// What NCCL does with a call of these buffers.
  [[nodiscard]] SymmetricPath symmetric(Collective collective, const void* in, std::size_t in_bytes,
                                        const void* out, std::size_t out_bytes, DType dtype,
                                        ReduceOp op) const {
    if (!has_symmetric_kernel(collective, dtype, op)) {
      return SymmetricPath::never;
    }
    return symmetric_path(group_.nccl_version,
                          {.in = group_.communicator->in_window(in, in_bytes),
                           .out = group_.communicator->in_window(out, out_bytes)},
                          symmetric_asked_for_);
  }

  /// Before a call of NCCL that may take its symmetric path: the ranks compare the places of its
  /// buffers (see call_places.hpp), and what it reads is made visible. Throws `SymmetryError` on
  /// every rank, before anything is enqueued, where the call is captured or debug checks are on;
  /// otherwise an eager one fails the group.
  void prepare(Collective collective, const void* in, std::size_t in_bytes, const void* out,
               std::size_t out_bytes, DType dtype, ReduceOp op, cudaStream_t stream) {
    const SymmetricPath path = symmetric(collective, in, in_bytes, out, out_bytes, dtype, op);
    const bool registered = group_.communicator->has_registered();
    const PlaceCheck check =
        place_check({.nccl_runtime_version = group_.nccl_version,
                     .symmetric_kernel = has_symmetric_kernel(collective, dtype, op),
                     .registered = registered,
                     .captured = registered && group_.streams.capture_id(stream) != 0,
                     .debug_checks = group_.debug_checks,
                     .own_kernels = group_.peers != nullptr});
    if (check != PlaceCheck::none) {
      const std::uint64_t places = place_token(group_.nccl_version, collective, path,
                                               {.in = group_.communicator->place(in, in_bytes),
                                                .out = group_.communicator->place(out, out_bytes)});
      if (check == PlaceCheck::own_kernel) {
        group_.peers->meet(
            cuda::CallSignature::make(over_nccl(collective), {static_cast<std::int64_t>(dtype),
                                                              static_cast<std::int64_t>(in_bytes),
                                                              static_cast<std::int64_t>(places)}),
            stream);
        return;  // it is a guard as well
      }
      agree(group_.control, {.place = fmt::format(
                                 "a call over NCCL in group {}: the places of its buffers in their "
                                 "windows",
                                 group_.control.name()),
                             .history = places});
    }
    if (group_.options.visibility_guard && needs_visibility_guard(group_.nccl_version, path)) {
      cuda::launch_visibility_guard(stream);
    }
  }

  [[nodiscard]] static constexpr cuda::PeerCall over_nccl(Collective collective) noexcept {
    switch (collective) {
      case Collective::all_gather:
        return cuda::PeerCall::nccl_all_gather;
      case Collective::reduce_scatter:
        return cuda::PeerCall::nccl_reduce_scatter;
      case Collective::all_reduce:
        return cuda::PeerCall::nccl_all_reduce;
      case Collective::all_to_all:
      case Collective::broadcast:
        break;
    }
    return cuda::PeerCall::none;
  }

  [[nodiscard]] std::size_t whole(const ConstTensorView& share) const noexcept {
    return share.bytes() * static_cast<std::size_t>(group_.size);
  }

  NcclGroup& group_;
  bool symmetric_asked_for_ = read_nccl_env().symmetric_asked_for;
};

}  // namespace cohort::detail
