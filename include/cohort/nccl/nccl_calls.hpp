// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>
#include <fmt/format.h>
#include <nccl.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "cohort/agreement.hpp"
#include "cohort/cuda/call_signature.hpp"
#include "cohort/cuda/handles.hpp"
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

  /// Collective, before a call in which every rank sends to every other.
  void connect_pairs() {
    if (connects_first_ && !std::exchange(pairs_connected_, true)) {
      rehearse({.name = "ncclSend to and ncclRecv from all ranks"},
               [size = group_.size, rank = group_.rank](const Rehearsal& it) {
                 ncclResult_t code = ncclSuccess;
                 for (int r = 0; r < size; ++r) {
                   if (r != rank && code == ncclSuccess) {
                     code = ncclSend(it.in, 1, ncclUint8, r, it.all, it.stream);
                   }
                   if (r != rank && code == ncclSuccess) {
                     code = ncclRecv(it.out, 1, ncclUint8, r, it.all, it.stream);
                   }
                 }
                 return code;
               });
    }
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

  /// Of equal shares of the type and size of `share`, without gaps. `dim`: which one of the shares
  /// they are joined along, so that ranks which mean different ones are told.
  void all_gather(const ConstTensorView& share, int dim, const void* in, void* out,
                  cudaStream_t stream) {
    prepare(Collective::all_gather, in, share.bytes(), out, whole(share), share.dtype(),
            ReduceOp::sum, extents_before(share.shape(), dim), stream);
    nccl(ncclAllGather(in, out, element_count(share), nccl_type(share.dtype()), handle(), stream),
         "ncclAllGather");
  }
  void reduce_scatter(const ConstTensorView& share, int dim, const void* in, void* out, ReduceOp op,
                      cudaStream_t stream) {
    prepare(Collective::reduce_scatter, in, whole(share), out, share.bytes(), share.dtype(), op,
            extents_before(share.shape(), dim), stream);
    nccl(ncclReduceScatter(in, out, element_count(share), nccl_type(share.dtype()), nccl_op(op),
                           handle(), stream),
         "ncclReduceScatter");
  }

  /// Of elements of the type and number of `like`'s, as below.
  void all_reduce(const ConstTensorView& like, const void* in, void* out, ReduceOp op,
                  cudaStream_t stream) {
    prepare(Collective::all_reduce, in, like.bytes(), out, like.bytes(), like.dtype(), op, 1,
            stream);
    nccl(ncclAllReduce(in, out, element_count(like), nccl_type(like.dtype()), nccl_op(op), handle(),
                       stream),
         "ncclAllReduce");
  }
  void broadcast(const ConstTensorView& like, void* data, int root, cudaStream_t stream) {
    connect_for(Way::broadcast, like.bytes());
    nccl(ncclBroadcast(data, data, element_count(like), nccl_type(like.dtype()), root, handle(),
                       stream),
         "ncclBroadcast");
  }
  void barrier(cudaStream_t stream) {
    connect_for(Way::all_reduce, sizeof(float));
    void* const word = group_.barrier_word.get();
    nccl(ncclAllReduce(word, word, 1, ncclFloat32, ncclMax, handle(), stream), "ncclAllReduce");
  }

  /// Within `together`, before which comes `connect_for_reduce` with the bytes of each.
  void reduce(const void* in, void* out, std::size_t elements, DType dtype, ReduceOp op, int root,
              cudaStream_t stream) {
    nccl(ncclReduce(in, out, elements, nccl_type(dtype), nccl_op(op), root, handle(), stream),
         "ncclReduce");
  }
  void connect_for_reduce(std::size_t bytes) { connect_for(Way::reduce, bytes); }

  void send(const void* data, std::size_t elements, DType dtype, int to, cudaStream_t stream) {
    nccl(ncclSend(data, elements, nccl_type(dtype), to, handle(), stream), "ncclSend");
  }
  void recv(void* data, std::size_t elements, DType dtype, int from, cudaStream_t stream) {
    nccl(ncclRecv(data, elements, nccl_type(dtype), from, handle(), stream), "ncclRecv");
  }
  /// Before a message that is not part of a collective call.
  void connect_to(int rank) {
    connect_with(sent_to_, rank, "ncclSend to a rank", [rank](const Rehearsal& it) {
      return ncclSend(it.in, 1, ncclUint8, rank, it.all, it.stream);
    });
  }
  void connect_from(int rank) {
    connect_with(received_from_, rank, "ncclRecv from a rank", [rank](const Rehearsal& it) {
      return ncclRecv(it.out, 1, ncclUint8, rank, it.all, it.stream);
    });
  }

 private:
  /// Ranks connect in the first call that takes a way between them, for which NCCL waits on the
  /// host: for a rank that does not come without limit, and for one that is gone a minute. So each
  /// way is first taken by a call that nobody needs, with memory and a stream of its own, on a
  /// thread that may be left to itself. (Connecting all of them while a group is formed, as
  /// NCCL_RUNTIME_CONNECT=0 does, takes 540 MiB of each of two H200s for every communicator, used
  /// or not.)
  enum class Way : std::uint8_t { all_gather, reduce_scatter, all_reduce, broadcast, reduce };
  static constexpr std::size_t kWays = 5;

  /// Symmetric kernels need no connection beside the windows.
  void connect_for(SymmetricPath path, Collective collective, std::size_t in_bytes,
                   std::size_t out_bytes) {
    if (path != SymmetricPath::certain) {
      connect_for(collective == Collective::all_gather       ? Way::all_gather
                  : collective == Collective::reduce_scatter ? Way::reduce_scatter
                                                             : Way::all_reduce,
                  std::max(in_bytes, out_bytes));
    }
  }

  /// What a call that nobody needs is made with.
  struct Rehearsal {
    ncclComm_t all = nullptr;
    const std::byte* in = nullptr;
    std::byte* out = nullptr;
    cudaStream_t stream = nullptr;
  };
  struct Room {
    const char* name = "";
    std::size_t bytes = 1;  ///< Of input, and of output.
  };

  /// Before a collective of so many bytes in all. Which way it takes follows from its kind and its
  /// size: the powers of two on both sides of that are rehearsed, each once, and beyond the largest
  /// nothing changes any more.
  void connect_for(Way way, std::size_t bytes) {
    const int floor = static_cast<int>(std::bit_width(bytes)) - 1;
    const int step = std::clamp(floor, kSmallest, kLargest) - kSmallest;
    std::uint32_t& known = known_[static_cast<std::size_t>(way)];
    const std::uint32_t both = 3U << step;
    if ((known & both) == both || !connects_first_) [[likely]] {
      return;
    }
    for (int power = step; power < step + 2; ++power) {
      if ((known >> power & 1U) == 0) {
        rehearse(way, std::size_t{1} << (power + kSmallest));
        known |= 1U << power;
      }
    }
  }
  // Of the powers: below the one, and above the next of the other, all take the same way.
  static constexpr int kSmallest = 3;
  static constexpr int kLargest = 25;

  void rehearse(Way way, std::size_t bytes) {
    const std::size_t floats = std::max(bytes / sizeof(float), std::size_t{1});
    const std::size_t ranks = static_cast<std::size_t>(group_.size);
    const std::size_t share = std::max(floats / ranks, std::size_t{1});
    const std::size_t room = std::max(floats, share * ranks) * sizeof(float);
    switch (way) {
      case Way::all_gather:
        return rehearse({"ncclAllGather", room}, [share](const Rehearsal& it) {
          return ncclAllGather(it.in, it.out, share, ncclFloat32, it.all, it.stream);
        });
      case Way::reduce_scatter:
        return rehearse({"ncclReduceScatter", room}, [share](const Rehearsal& it) {
          return ncclReduceScatter(it.in, it.out, share, ncclFloat32, ncclSum, it.all, it.stream);
        });
      case Way::all_reduce:
        return rehearse({"ncclAllReduce", room}, [floats](const Rehearsal& it) {
          return ncclAllReduce(it.in, it.out, floats, ncclFloat32, ncclSum, it.all, it.stream);
        });
      case Way::broadcast:
        return rehearse({"ncclBroadcast", room}, [floats](const Rehearsal& it) {
          return ncclBroadcast(it.in, it.out, floats, ncclFloat32, 0, it.all, it.stream);
        });
      case Way::reduce:
        return rehearse({"ncclReduce", room}, [floats](const Rehearsal& it) {
          return ncclReduce(it.in, it.out, floats, ncclFloat32, ncclSum, 0, it.all, it.stream);
        });
    }
  }

  template <class Call>
  void connect_with(std::vector<bool>& known, int rank, const char* name, const Call& call) {
    known.resize(static_cast<std::size_t>(group_.size));
    if (!pairs_connected_ && connects_first_ && !known[static_cast<std::size_t>(rank)]) {
      rehearse({.name = name}, call);
      known[static_cast<std::size_t>(rank)] = true;
    }
  }

  template <class Call>
  void rehearse(const Room& room, const Call& call) {
    require_descriptors();
    group_.communicator->run(
        room.name, group_.control,
        [communicator = group_.communicator, room, call] {
          const DeviceGuard guard(communicator->device());
          const RelaxedCapture relaxed;
          const auto use = communicator->usable();
          const UniqueStream stream = make_stream(communicator->device());
          void* memory = nullptr;  // in the stream's order: freeing must not wait for the device
          cuda_check(cudaMallocAsync(&memory, 2 * room.bytes, stream.get()), "cudaMallocAsync");
          auto* const in = static_cast<std::byte*>(memory);
          communicator->check(ncclGroupStart(), "ncclGroupStart");
          const ncclResult_t code = call(Rehearsal{.all = communicator->get(),
                                                   .in = in,
                                                   .out = in + room.bytes,
                                                   .stream = stream.get()});
          const ncclResult_t ended = ncclGroupEnd();
          communicator->check(code != ncclSuccess ? code : ended, room.name);
          cuda_check(cudaFreeAsync(memory, stream.get()), "cudaFreeAsync");
          cuda_check(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
        },
        [this] {
          if (group_.own_failed()) {
            group_.throw_failed();
          }
        });
  }

  /// The peers learn of it, because they may wait for this rank in NCCL.
  void require_descriptors() {
    if (const auto few = Communicator::too_few_descriptors(group_.size); !few.empty()) {
      group_.control.give_up(few);
      group_.communicator->mark_broken();
      throw TransportError(
          {.call = "a connection", .rank = group_.rank, .group = group_.control.name()}, few);
    }
  }
  /// The others learn of a failure.
  void nccl(ncclResult_t code, const char* call) {
    if (group_.path == CallPath::unknown) {
      group_.path = CallPath::nccl;
    }
    if (code == ncclSuccess) [[likely]] {
      return;
    }
    group_.control.give_up(fmt::format("{}: {}", call, nccl_error_text(code)));
    group_.communicator->check(code, call);
  }
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
  /// otherwise an eager one fails the group. `before`: the product of the extents before the
  /// dimension that the ranks' shares are parts of.
  void prepare(Collective collective, const void* in, std::size_t in_bytes, const void* out,
               std::size_t out_bytes, DType dtype, ReduceOp op, std::int64_t before,
               cudaStream_t stream) {
    const SymmetricPath path = symmetric(collective, in, in_bytes, out, out_bytes, dtype, op);
    group_.path = path == SymmetricPath::never ? CallPath::nccl : CallPath::nccl_symmetric;
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
        connect_for(path, collective, in_bytes, out_bytes);
        group_.peers->meet(
            cuda::CallSignature::make(
                over_nccl(collective),
                {static_cast<std::int64_t>(dtype), static_cast<std::int64_t>(in_bytes),
                 static_cast<std::int64_t>(places), static_cast<std::int64_t>(op), before}),
            stream);
        return;  // it is a guard as well
      }
      agree(group_.control, {.place = fmt::format(
                                 "a call over NCCL in group {}: the places of its buffers in their "
                                 "windows, and its dimension",
                                 group_.control.name()),
                             .history = mix(places, static_cast<std::uint64_t>(before))});
    }
    connect_for(path, collective, in_bytes, out_bytes);
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
  bool pairs_connected_ = false;
  /// Where graphs are promised to be alone, no call of the library's own may run beside them.
  bool connects_first_ = process_env("NCCL_GRAPH_MIXING_SUPPORT").value_or("1") != "0";
  std::array<std::uint32_t, kWays> known_{};  // by power of two
  std::vector<bool> sent_to_;                 // by rank
  std::vector<bool> received_from_;
};

}  // namespace cohort::detail
