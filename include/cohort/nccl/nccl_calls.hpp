// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>
#include <fmt/format.h>
#include <nccl.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <unordered_set>
#include <utility>
#include <vector>

#include "cohort/agreement.hpp"
#include "cohort/cuda/call_signature.hpp"
#include "cohort/cuda/handles.hpp"
#include "cohort/cuda/support_kernels.hpp"
#include "cohort/hash.hpp"
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

  /// Part of a call that is made of several: a message, or one rank's part of a reduction.
  struct Piece {
    enum class Kind : std::uint8_t { send, recv, reduce };
    Kind kind = Kind::send;
    const void* in = nullptr;
    void* out = nullptr;
    std::size_t elements = 0;
    DType dtype = DType::u8;
    int peer = 0;  ///< Or the root.
    ReduceOp op = ReduceOp::sum;
  };
  [[nodiscard]] static Piece send(const void* data, std::size_t elements, DType dtype, int to) {
    return {
        .kind = Piece::Kind::send, .in = data, .elements = elements, .dtype = dtype, .peer = to};
  }
  [[nodiscard]] static Piece recv(void* data, std::size_t elements, DType dtype, int from) {
    return {
        .kind = Piece::Kind::recv, .out = data, .elements = elements, .dtype = dtype, .peer = from};
  }
  [[nodiscard]] static Piece reduce(const void* in, void* out, std::size_t elements, DType dtype,
                                    ReduceOp op, int root) {
    return {.kind = Piece::Kind::reduce,
            .in = in,
            .out = out,
            .elements = elements,
            .dtype = dtype,
            .peer = root,
            .op = op};
  }

  /// Makes the pieces as one call, in which none waits for another.
  void together(std::vector<Piece> pieces, cudaStream_t stream) {
    std::uint64_t way = pieces.size();
    for (const Piece& piece : pieces) {
      way = mix(way, static_cast<std::uint64_t>(piece.kind) << 32 |
                         static_cast<std::uint64_t>(piece.peer));
      if (piece.kind == Piece::Kind::reduce) {
        way = mix(way, way_of(Way::reduce, piece.dtype, piece.op, SymmetricPath::never,
                              piece.elements * size_of(piece.dtype)));
      }
    }
    make("ncclGroupEnd", way, stream, [pieces = std::move(pieces), stream](ncclComm_t comm) {
      ncclResult_t code = ncclGroupStart();
      for (auto piece = pieces.begin(); piece != pieces.end() && code == ncclSuccess; ++piece) {
        code = begin(*piece, comm, stream);
      }
      const ncclResult_t ended = ncclGroupEnd();  // also where a piece was refused
      return code != ncclSuccess ? code : ended;
    });
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

  /// Whether a peer may be reached by the place of `view`, which need not be the same on all ranks:
  /// then the call takes scratch memory instead. True on all ranks or on none.
  template <class Void>
  [[nodiscard, gnu::always_inline]] bool loose(Collective collective,
                                               const BasicTensorView<Void>& view,
                                               ReduceOp op) const {
    return group_.communicator->has_registered() &&
           has_symmetric_kernel(collective, view.dtype(), op) &&
           group_.communicator->loose(view.data(), view.bytes());
  }

  /// Of equal shares of the type and size of `share`, without gaps. `dim`: which one of the shares
  /// they are joined along, so that ranks which mean different ones are told.
  void all_gather(const ConstTensorView& share, int dim, const void* in, void* out,
                  cudaStream_t stream) {
    const SymmetricPath path = prepare(Collective::all_gather, in, share.bytes(), out, whole(share),
                                       share.dtype(), ReduceOp::sum, &share.shape(), dim, stream);
    make("ncclAllGather",
         way_of(Way::all_gather, share.dtype(), ReduceOp::sum, path, share.bytes()), stream,
         [=, elements = element_count(share), type = nccl_type(share.dtype())](ncclComm_t comm) {
           return ncclAllGather(in, out, elements, type, comm, stream);
         });
  }
  void reduce_scatter(const ConstTensorView& share, int dim, const void* in, void* out, ReduceOp op,
                      cudaStream_t stream) {
    const SymmetricPath path =
        prepare(Collective::reduce_scatter, in, whole(share), out, share.bytes(), share.dtype(), op,
                &share.shape(), dim, stream);
    make("ncclReduceScatter", way_of(Way::reduce_scatter, share.dtype(), op, path, share.bytes()),
         stream,
         [=, elements = element_count(share), type = nccl_type(share.dtype())](ncclComm_t comm) {
           return ncclReduceScatter(in, out, elements, type, nccl_op(op), comm, stream);
         });
  }

  /// Of elements of the type and number of `like`'s, as below.
  void all_reduce(const ConstTensorView& like, const void* in, void* out, ReduceOp op,
                  cudaStream_t stream) {
    const SymmetricPath path = prepare(Collective::all_reduce, in, like.bytes(), out, like.bytes(),
                                       like.dtype(), op, nullptr, 0, stream);
    make("ncclAllReduce", way_of(Way::all_reduce, like.dtype(), op, path, like.bytes()), stream,
         [=, elements = element_count(like), type = nccl_type(like.dtype())](ncclComm_t comm) {
           return ncclAllReduce(in, out, elements, type, nccl_op(op), comm, stream);
         });
  }
  void broadcast(const ConstTensorView& like, void* data, int root, cudaStream_t stream) {
    make("ncclBroadcast",
         way_of(Way::broadcast, like.dtype(), ReduceOp::sum, SymmetricPath::never, like.bytes()),
         stream,
         [=, elements = element_count(like), type = nccl_type(like.dtype())](ncclComm_t comm) {
           return ncclBroadcast(data, data, elements, type, root, comm, stream);
         });
  }
  void barrier(cudaStream_t stream) {
    void* const word = group_.barrier_word.get();
    make("ncclAllReduce",
         way_of(Way::all_reduce, DType::f32, ReduceOp::max, SymmetricPath::never, sizeof(float)),
         stream, [=](ncclComm_t comm) {
           return ncclAllReduce(word, word, 1, ncclFloat32, ncclMax, comm, stream);
         });
  }

 private:
  enum class Way : std::uint8_t { all_gather, reduce_scatter, all_reduce, broadcast, reduce };

  /// What NCCL chooses an algorithm by.
  [[nodiscard]] static std::uint64_t way_of(Way way, DType dtype, ReduceOp op, SymmetricPath path,
                                            std::size_t bytes) noexcept {
    const auto what = static_cast<std::uint64_t>(way) << 24 |
                      static_cast<std::uint64_t>(dtype) << 16 |
                      static_cast<std::uint64_t>(op) << 8 | static_cast<std::uint64_t>(path);
    return mix(what, bytes);
  }

  [[nodiscard]] static ncclResult_t begin(const Piece& piece, ncclComm_t comm,
                                          cudaStream_t stream) {
    const ncclDataType_t type = nccl_type(piece.dtype);
    switch (piece.kind) {
      case Piece::Kind::send:
        return ncclSend(piece.in, piece.elements, type, piece.peer, comm, stream);
      case Piece::Kind::recv:
        return ncclRecv(piece.out, piece.elements, type, piece.peer, comm, stream);
      case Piece::Kind::reduce:
        return ncclReduce(piece.in, piece.out, piece.elements, type, nccl_op(piece.op), piece.peer,
                          comm, stream);
    }
    return ncclInternalError;
  }

  /// Makes a call. Ranks connect in the first one that takes a way between them, and NCCL waits for
  /// that on the host: for a rank that does not come without limit, and for one that is gone a
  /// minute. In captures it may wait each time, to register buffers. Such a call is made on a
  /// thread that may be left to itself, so `work` holds all that it uses.
  ///
  /// @param way  Equal for calls whose ranks are connected once those of one of them are.
  template <class Work>
  [[gnu::always_inline]] void make(const char* name, std::uint64_t way, cudaStream_t stream,
                                   Work work) {
    const bool known = is_known(way);
    if (known && !group_.is_captured(stream)) [[likely]] {
      nccl(work(group_.communicator->get()), name);
      return;
    }
    make_bounded(name, way, known, std::move(work));
  }
  template <class Work>
  [[gnu::noinline]] void make_bounded(const char* name, std::uint64_t way, bool known, Work work) {
    if (!known) {
      require_descriptors();
    }
    try {
      group_.communicator->run(
          name, group_.control,
          [communicator = group_.communicator, name, work = std::move(work)] {
            const DeviceGuard guard(communicator->device());
            const RelaxedCapture relaxed;
            const auto use = communicator->usable();
            communicator->check(work(communicator->get()), name);
          },
          [this] {
            if (group_.own_found_failure()) {
              std::rethrow_exception(group_.own_failure());
            }
            if (group_.control.poisoned()) {  // another thread has heard it
              group_.check_peers();
            }
          });
    } catch (...) {
      group_.communicator->abort();  // once the thread is back: what it began must come to an end
      throw;
    }
    known_.insert(way);
  }

  /// Whether a call has been made that way.
  [[nodiscard]] bool is_known(std::uint64_t way) {
    return recent_[way % recent_.size()] == way || is_known_of_old(way);
  }
  [[nodiscard, gnu::noinline]] bool is_known_of_old(std::uint64_t way) {
    if (!known_.contains(way)) {
      return false;
    }
    recent_[way % recent_.size()] = way;
    return true;
  }

  /// The peers learn of it, because they may wait for this rank in NCCL.
  void require_descriptors() {
    if (const auto few = Communicator::too_few_descriptors(group_.size); !few.empty()) {
      group_.fail(std::make_exception_ptr(TransportError(
          {.call = "a connection", .rank = group_.rank, .group = group_.control.name()}, few)));
    }
  }
  /// The others learn of a failure.
  void nccl(ncclResult_t code, const char* call) {
    if (group_.path == CallPath::unknown) {
      group_.path = CallPath::nccl;
    }
    if (code != ncclSuccess) [[unlikely]] {
      fail(code, call);
    }
  }
  [[gnu::cold, gnu::noinline]] void fail(ncclResult_t code, const char* call) {
    try {
      group_.communicator->check(code, call);
    } catch (const TransportError&) {
      group_.fail(std::current_exception());
    }
  }
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
  /// otherwise an eager one fails the group. -> the path. `before`: the product of the extents
  /// before the dimension that the ranks' shares are parts of.
  [[gnu::always_inline]] SymmetricPath prepare(Collective collective, const void* in,
                                               std::size_t in_bytes, const void* out,
                                               std::size_t out_bytes, DType dtype, ReduceOp op,
                                               const Dims* shape, int dim, cudaStream_t stream) {
    if (!group_.communicator->has_registered() && !symmetric_asked_for_) {  // whatever the version
      group_.path = CallPath::nccl;
      return SymmetricPath::never;
    }
    return prepare_symmetric(collective, in, in_bytes, out, out_bytes, dtype, op,
                             shape != nullptr ? extents_before(*shape, dim) : 1, stream);
  }
  [[gnu::noinline]] SymmetricPath prepare_symmetric(Collective collective, const void* in,
                                                    std::size_t in_bytes, const void* out,
                                                    std::size_t out_bytes, DType dtype, ReduceOp op,
                                                    std::int64_t before, cudaStream_t stream) {
    const bool registered = group_.communicator->has_registered();
    const SymmetricPath path = symmetric(collective, in, in_bytes, out, out_bytes, dtype, op);
    group_.path = path == SymmetricPath::never ? CallPath::nccl : CallPath::nccl_symmetric;
    const PlaceCheck check =
        place_check({.nccl_runtime_version = group_.nccl_version,
                     .symmetric_kernel = has_symmetric_kernel(collective, dtype, op),
                     .registered = registered,
                     .captured = registered && group_.is_captured(stream),
                     .debug_checks = group_.debug_checks,
                     .own_kernels = group_.peers != nullptr});
    if (check != PlaceCheck::none) {
      const std::uint64_t places = place_token(group_.nccl_version, collective, path,
                                               {.in = group_.communicator->place(in, in_bytes),
                                                .out = group_.communicator->place(out, out_bytes)});
      if (check == PlaceCheck::own_kernel) {
        group_.peers->meet(
            cuda::CallSignature::make(
                over_nccl(collective),
                {static_cast<std::int64_t>(dtype), static_cast<std::int64_t>(in_bytes),
                 static_cast<std::int64_t>(places), static_cast<std::int64_t>(op), before,
                 group_.form}),
            stream);
        return path;  // it is a guard as well
      }
      const std::uint64_t also =
          mix(static_cast<std::uint64_t>(before), static_cast<std::uint64_t>(group_.form));
      agree(group_.control, {.place = fmt::format(
                                 "a call over NCCL in group {}: the places of its buffers in their "
                                 "windows, its dimension, and what becomes of its result",
                                 group_.control.name()),
                             .history = mix(places, also)});
    }
    if (group_.options.visibility_guard && needs_visibility_guard(group_.nccl_version, path)) {
      cuda::launch_visibility_guard(stream);
    }
    return path;
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
      case Collective::all_reduce_rms_norm:
        break;
    }
    return cuda::PeerCall::none;
  }

  [[nodiscard]] std::size_t whole(const ConstTensorView& share) const noexcept {
    return share.bytes() * static_cast<std::size_t>(group_.size);
  }

  NcclGroup& group_;
  bool symmetric_asked_for_ = read_nccl_env().symmetric_asked_for;
  std::unordered_set<std::uint64_t> known_;  // ways on which the ranks are connected
  std::array<std::uint64_t, 64> recent_{
      1};  // of those, by remainder; what stands there first is none
};

}  // namespace cohort::detail
