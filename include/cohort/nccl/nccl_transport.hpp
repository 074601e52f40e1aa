// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>
#include <fmt/format.h>
#include <nccl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cohort/agreement.hpp"
#include "cohort/control_plane.hpp"
#include "cohort/cuda/block_budget.hpp"
#include "cohort/cuda/cuda_ops.hpp"
#include "cohort/cuda/cuda_peer_kernels.hpp"
#include "cohort/cuda/cuda_stream.hpp"
#include "cohort/cuda/device_drain.hpp"
#include "cohort/cuda/handles.hpp"
#include "cohort/cuda/process_liveness.hpp"
#include "cohort/cuda/support_kernels.hpp"
#include "cohort/cuda/workspace.hpp"
#include "cohort/error.hpp"
#include "cohort/joined.hpp"
#include "cohort/nccl/call_places.hpp"
#include "cohort/nccl/communicator.hpp"
#include "cohort/nccl/machine_probe.hpp"
#include "cohort/nccl/nccl_check.hpp"
#include "cohort/nccl/nccl_window.hpp"
#include "cohort/nccl/visibility_guard.hpp"
#include "cohort/poll_pause.hpp"
#include "cohort/runtime_env.hpp"
#include "cohort/tensor.hpp"
#include "cohort/transport.hpp"

/// \file
/// The transport of one group over NCCL, with the library's own kernels for small collectives where
/// the ranks can map each other's memory.
///
/// **Which path a call takes** follows from sizes, types and the group alone, so all ranks take the
/// same. How a rank's tensors lie decides only whether that rank packs them into scratch memory
/// first. `path` tells both. In groups with windows what peers touch must lie alike on all ranks:
/// see call_places.hpp.

namespace cohort {

/// Total bytes up to which the own kernels take a collective that an inbox has room for, where no
/// option says otherwise. Between two cards over NVLink they beat NCCL, registered buffers or not,
/// at every size: bench/results/nvidia-h100-80gb-hbm3-2ranks.json. They hold more multiprocessors
/// than NCCL does, so calls that take tens of microseconds are left to it. For more ranks, each of
/// which sends to all others, nothing is measured beyond what two need. Without flag lines, as over
/// PCIe, every payload travels in flag words, at twice its bytes: until that is measured, only
/// calls whose time is all latency.
[[nodiscard]] constexpr std::size_t default_own_max_bytes(Collective collective, int ranks,
                                                          bool whole_lines) noexcept {
  constexpr std::size_t kKiB = 1024;
  switch (collective) {
    case Collective::all_gather:
    case Collective::reduce_scatter:
      return (!whole_lines ? 64 : ranks == 2 ? 4096 : 256) * kKiB;
    case Collective::all_reduce:
      return (!whole_lines ? 64 : ranks == 2 ? 512 : 256) * kKiB;
    case Collective::all_to_all:
    case Collective::broadcast:
      return 0;
  }
  return 0;
}

/// How a transport is set up. Equal on all ranks.
struct NcclTransportOptions {
  bool peer_mapping = true;                        ///< Whether to map peers' memory at all.
  std::chrono::milliseconds kernel_limit{60'000};  ///< Of a wait in an own kernel.
  int kernels_at_once = 2;                         ///< Own ones of this rank; see block_budget.hpp.
  int ranks_per_card = 1;                          ///< At least so many; may differ by rank.
  std::optional<std::int64_t> own_max_bytes;       ///< Instead of `default_own_max_bytes`; 0: none.
  bool visibility_guard = true;                    ///< `false` is for the guard's own test.
};

class NcclTransport final : public Transport, private RankWaits {
 public:
  /// Collective over `group`, which outlives the transport. Throws `ConfigError` on every rank
  /// where NCCL would refuse the group, `SymmetryError`, `TimeoutError` and `TransportError`.
  NcclTransport(ControlPlane& group, CudaStreamDriver& streams, int device,
                const NcclTransportOptions& options)
      : group_(group),
        streams_(streams),
        device_(device),
        options_(options),
        rank_(group.rank()),
        size_(group.size()) {
    workspaces_.emplace_back(device);
    agree_on_options();
    GroupProbe probe = probe_group(group_, device_);
    capabilities_ = probe.capabilities;
    ranks_per_card_ = std::max(options_.ranks_per_card, probe.ranks_per_device);
    for (const MachineFacts& facts : probe.ranks) {
      processes_.push_back(facts.process);
    }
    nccl_version_ = capabilities_.nccl_runtime_version;
    whole_lines_ = probe.whole_lines;
    if (size_ == 1) {
      capabilities_.peer_import = true;
      return;
    }
    communicator_ = Communicator::create(group_, device_);
    barrier_word_ = make_memory(device_, sizeof(float));
    if (options_.peer_mapping && capabilities_.machines == 1 && capabilities_.peer_access) {
      connect_peers(probe);
    } else if (!options_.peer_mapping) {
      capabilities_.obstacle = "CudaOptions::peer_mapping is false";
    }
    streams_.add(*this);
  }

  // The members' order is the order of teardown in reverse: inboxes and scratch memory go before
  // the communicator. Windows hold the communicator themselves.
  ~NcclTransport() override {
    if (size_ > 1) {
      settle(kDrainLimit);
      streams_.remove(*this);
      abandon_what_runs();
    }
  }
  NcclTransport(const NcclTransport&) = delete;
  NcclTransport& operator=(const NcclTransport&) = delete;

  [[nodiscard]] std::string_view name() const noexcept override { return "nccl"; }
  [[nodiscard]] const SymmetricCapabilities& capabilities() const noexcept override {
    return capabilities_;
  }
  [[nodiscard]] PeerKernels* peer_kernels() noexcept override { return peers_.get(); }
  /// Null in a group of one.
  [[nodiscard]] Communicator* communicator() noexcept { return communicator_.get(); }

  /// Symmetric kernels compute a peer's address from the own offset.
  [[nodiscard]] bool needs_equal_offsets() const noexcept override { return true; }

  /// The most ranks that share a card, as far as is known.
  [[nodiscard]] int ranks_per_card() const noexcept { return ranks_per_card_; }

  void reserve_scratch(std::size_t bytes) override {
    for (Workspace& workspace : workspaces_) {
      workspace.reserve(bytes + 2 * kAlignment);
    }
  }

  [[nodiscard]] std::unique_ptr<Window> register_segment(Segment& segment) override {
    if (size_ == 1) {
      return std::make_unique<LocalWindow>(segment);
    }
    auto* const own = dynamic_cast<NcclSegment*>(&segment);
    if (own == nullptr) {
      throw UsageError("segment: expected one of the CUDA backend");
    }
    return NcclWindow::create(communicator_, *own, group_.limit());
  }

  void all_gather(const ConstTensorView& in, const TensorView& out, int dim,
                  std::span<const std::int64_t> sizes, StreamRef stream) override {
    if (out.numel() == 0) {
      return;
    }
    const Call call(*this, stream);
    if (size_ == 1) {
      detail::copy_view(in, out, call.stream);
    } else if (!all_equal(sizes)) {
      gather_unequal(call, in, out, dim, sizes);
    } else if (own(Collective::all_gather, in, out, ReduceOp::sum)) {
      const auto dims = detail::along_dim(in, out, dim);
      if (dims) {
        peers_->all_gather(*dims, in.data(), out.data(), call.stream);
      } else {
        gather_packed(call, in, out, dim);
      }
    } else if (fits(in, out, dim)) {
      nccl_all_gather(in, in.data(), out.data(), call.stream);
    } else {
      gather_packed(call, in, out, dim);
    }
  }

  void reduce_scatter(const ConstTensorView& in, const TensorView& out, int dim,
                      std::span<const std::int64_t> sizes, ReduceOp op, StreamRef stream) override {
    if (in.numel() == 0) {
      return;
    }
    const Call call(*this, stream);
    if (size_ == 1) {
      detail::copy_view(in, out, call.stream);
    } else if (!all_equal(sizes)) {
      scatter_unequal(call, in, out, dim, sizes, op);
    } else if (own(Collective::reduce_scatter, in, out, op)) {
      const auto dims = detail::along_dim(out, in, dim);
      if (dims) {
        peers_->reduce_scatter(*dims, in.dtype(), in.data(), out.data(), call.stream);
      } else {
        scatter_packed(call, in, out, dim, op);
      }
    } else if (fits(out, in, dim)) {
      nccl_reduce_scatter(out, in.data(), out.data(), op, call.stream);
    } else {
      scatter_packed(call, in, out, dim, op);
    }
  }

  void all_reduce(const ConstTensorView& in, const TensorView& out, ReduceOp op,
                  StreamRef stream) override {
    if (in.numel() == 0) {
      return;
    }
    const Call call(*this, stream);
    if (size_ == 1) {
      copy_unless_same(in, out, call.stream);
      return;
    }
    const Packed packed(*this, call, in, out);
    if (own(Collective::all_reduce, in, out, op)) {
      peers_->all_reduce(in.numel(), in.dtype(), packed.in, packed.out, call.stream);
    } else {
      prepare(Collective::all_reduce, packed.in, in.bytes(), packed.out, out.bytes(), in.dtype(),
              op, call.stream);
      nccl(ncclAllReduce(packed.in, packed.out, count(in), nccl_type(in.dtype()), nccl_op(op),
                         communicator_->get(), call.stream),
           "ncclAllReduce");
    }
    packed.unpack(out, call.stream);
  }

  void broadcast(const TensorView& tensor, int root, StreamRef stream) override {
    if (tensor.numel() == 0 || size_ == 1) {
      return;
    }
    const Call call(*this, stream);
    if (tensor.is_contiguous()) {
      nccl(ncclBroadcast(tensor.data(), tensor.data(), count(tensor), nccl_type(tensor.dtype()),
                         root, communicator_->get(), call.stream),
           "ncclBroadcast");
      return;
    }
    const TensorView scratch = scratch_like(call, tensor, 0);
    if (rank_ == root) {
      detail::copy_view(tensor, scratch, call.stream);
    }
    nccl(ncclBroadcast(scratch.data(), scratch.data(), count(tensor), nccl_type(tensor.dtype()),
                       root, communicator_->get(), call.stream),
         "ncclBroadcast");
    if (rank_ != root) {
      detail::copy_view(scratch, tensor, call.stream);
    }
  }

  void all_to_all(const ConstTensorView& in, const TensorView& out, StreamRef stream) override {
    if (in.numel() == 0) {
      return;
    }
    const Call call(*this, stream);
    if (size_ == 1) {
      copy_unless_same(in, out, call.stream);
      return;
    }
    const Packed packed(*this, call, in, out);
    const std::size_t part = count(in) / static_cast<std::size_t>(size_);
    const std::size_t part_bytes = part * size_of(in.dtype());
    const auto* const from = static_cast<const std::byte*>(packed.in);
    auto* const to = static_cast<std::byte*>(packed.out);
    const auto offset = [&](int r) { return static_cast<std::size_t>(r) * part_bytes; };
    cuda_check(cudaMemcpyAsync(to + offset(rank_), from + offset(rank_), part_bytes,
                               cudaMemcpyDeviceToDevice, call.stream),
               "cudaMemcpyAsync");
    const ncclDataType_t type = nccl_type(in.dtype());
    in_nccl_group([&] {
      for (int step = 1; step < size_; ++step) {
        const int to_rank = (rank_ + step) % size_;
        const int from_rank = (rank_ - step + size_) % size_;
        nccl(ncclSend(from + offset(to_rank), part, type, to_rank, communicator_->get(),
                      call.stream),
             "ncclSend");
        nccl(ncclRecv(to + offset(from_rank), part, type, from_rank, communicator_->get(),
                      call.stream),
             "ncclRecv");
      }
    });
    packed.unpack(out, call.stream);
  }

  void send(const ConstTensorView& tensor, int to, StreamRef stream) override {
    require_peer("send to", to);
    if (tensor.numel() == 0) {
      return;
    }
    const Call call(*this, stream);
    const void* data = tensor.data();
    if (!tensor.is_contiguous()) {
      const TensorView scratch = scratch_like(call, tensor, 0);
      detail::copy_view(tensor, scratch, call.stream);
      data = scratch.data();
    }
    nccl(ncclSend(data, count(tensor), nccl_type(tensor.dtype()), to, communicator_->get(),
                  call.stream),
         "ncclSend");
  }

  void recv(const TensorView& tensor, int from, StreamRef stream) override {
    require_peer("recv from", from);
    if (tensor.numel() == 0) {
      return;
    }
    const Call call(*this, stream);
    const bool direct = tensor.is_contiguous();
    const TensorView target = direct ? tensor : scratch_like(call, tensor, 0);
    nccl(ncclRecv(target.data(), count(tensor), nccl_type(tensor.dtype()), from,
                  communicator_->get(), call.stream),
         "ncclRecv");
    if (!direct) {
      detail::copy_view(target, tensor, call.stream);
    }
  }

  void barrier(StreamRef stream) override {
    if (size_ == 1) {
      return;
    }
    const Call call(*this, stream);
    if (peers_ != nullptr) {
      peers_->barrier(call.stream);
      return;
    }
    nccl(ncclAllReduce(barrier_word_.get(), barrier_word_.get(), 1, ncclFloat32, ncclMax,
                       communicator_->get(), call.stream),
         "ncclAllReduce");
  }

  /// "own", "nccl symmetric", "nccl" or, where NCCL's cost model decides, "nccl, maybe symmetric";
  /// with ", packed" where this rank's tensors do not lie as the path needs them; "copy" in a group
  /// of one, "none" where there is nothing to move. Reductions are taken to be sums.
  [[nodiscard]] std::string path(Collective collective, const ConstTensorView& in,
                                 const TensorView& out, int dim) const override {
    if (in.numel() == 0 && out.numel() == 0) {
      return "none";
    }
    if (size_ == 1) {
      return "copy";
    }
    const bool gather = collective == Collective::all_gather;
    const bool along = gather || collective == Collective::reduce_scatter;
    const ConstTensorView full = gather ? ConstTensorView(out) : in;
    const ConstTensorView share = gather ? in : ConstTensorView(out);
    const bool equal = !along || share.size(dim) * size_ == full.size(dim);
    const bool is_own = equal && own(collective, in, out, ReduceOp::sum);
    const bool direct = !along   ? in.is_contiguous() && out.is_contiguous()
                        : is_own ? detail::along_dim(share, full, dim).has_value()
                                 : fits(share, full, dim);
    return std::string(is_own  ? "own"
                       : equal ? nccl_path(collective, in, out, direct)
                               : "nccl") +
           (direct ? "" : ", packed");
  }

  void synchronize(StreamRef stream, std::chrono::milliseconds limit) override {
    const auto deadline = std::chrono::steady_clock::now() + limit;
    detail::PollPause pause;
    while (!streams_.idle(stream.native())) {
      if (own_failed()) {
        static_cast<void>(drain(stream));
        throw_failure();
      }
      check_asynchronous();
      if (std::chrono::steady_clock::now() >= deadline) {
        const bool drained = drain(stream);
        if (own_failed()) {
          throw_failure();
        }
        throw_time_out(limit, drained);
      }
      pause();
    }
    if (own_failed()) {
      throw_failure();
    }
    check_asynchronous();
  }

  [[nodiscard]] bool failed() const noexcept override {
    return own_failed() || (communicator_ != nullptr && communicator_->broken());
  }

  void settle(std::chrono::milliseconds patience) noexcept override {
    if (size_ == 1 || std::exchange(settled_, true)) {
      return;
    }
    if (!device_idle_within(device_, failed() ? std::min(patience, kDrainLimit) : patience)) {
      end_waits();
    } else if (own_failed()) {
      communicator_->mark_broken();  // peers have failed too: nobody waits for them
    }
  }

  void reserve_lanes(int lanes) override {
    while (workspaces_.size() < static_cast<std::size_t>(lanes)) {
      workspaces_.emplace_back(device_);
    }
    if (peers_ != nullptr) {
      peers_->reserve_lanes(lanes);
    }
  }
  void select_lane(int lane) noexcept override {
    lane_ = static_cast<std::size_t>(lane);
    if (peers_ != nullptr) {
      peers_->select_lane(lane);
    }
  }
  void limit_blocks(int blocks) noexcept override {
    if (peers_ != nullptr) {
      peers_->limit_blocks(blocks);
    }
  }

 private:
  static constexpr std::size_t kAlignment = 256;
  /// How long waits that were told to end may take.
  static constexpr std::chrono::milliseconds kDrainLimit{1'000};

  /// What every call begins with: the device made current. The caller's may be another, and may
  /// change between calls.
  struct Call {
    Call(const NcclTransport& transport, StreamRef reference)
        : guard(transport.device_), stream(detail::native(reference)) {
      if (transport.failed()) {
        throw TransportError(
            {.call = "a collective", .rank = transport.rank_, .group = transport.group_.name()},
            "an earlier call of this group failed; form the group anew");
      }
    }

    DeviceGuard guard;
    cudaStream_t stream;
  };

  /// Input and output of an elementwise call without gaps: the caller's own where they are so.
  struct Packed {
    Packed(NcclTransport& transport, const Call& call, const ConstTensorView& from,
           const TensorView& to)
        : in(from.data()), out(to.data()) {
      const std::size_t in_bytes = from.is_contiguous() ? 0 : align(from.bytes());
      const std::size_t out_bytes = to.is_contiguous() ? 0 : align(to.bytes());
      if (in_bytes + out_bytes == 0) {
        return;
      }
      std::byte* const scratch = transport.scratch_at_least(call, in_bytes + out_bytes);
      if (in_bytes > 0) {
        const TensorView packed(scratch, from.dtype(), from.shape(), from.device());
        detail::copy_view(from, packed, call.stream);
        in = packed.data();
      }
      if (out_bytes > 0) {
        out = scratch + in_bytes;
        unpack_ = true;
      }
    }

    void unpack(const TensorView& to, cudaStream_t stream) const {
      if (unpack_) {
        detail::copy_view(TensorView(out, to.dtype(), to.shape(), to.device()), to, stream);
      }
    }

    const void* in;
    void* out;

   private:
    bool unpack_ = false;
  };

  static constexpr std::size_t align(std::size_t bytes) noexcept {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  template <class Void>
  static std::size_t count(const BasicTensorView<Void>& view) noexcept {
    return static_cast<std::size_t>(view.numel());
  }
  static bool all_equal(std::span<const std::int64_t> sizes) {
    return std::adjacent_find(sizes.begin(), sizes.end(), std::not_equal_to<>()) == sizes.end();
  }
  /// Whether the shares lie one behind the other without gaps: nothing but extents of 1 before the
  /// dimension.
  static bool fits(const ConstTensorView& share, const ConstTensorView& full, int dim) {
    std::int64_t outer = 1;
    for (int d = 0; d < dim; ++d) {
      outer *= full.shape()[d];
    }
    return outer == 1 && share.is_contiguous() && full.is_contiguous();
  }
  static void copy_unless_same(const ConstTensorView& in, const TensorView& out,
                               cudaStream_t stream) {
    if (in.data() != out.data() || !(in.strides() == out.strides())) {
      detail::copy_view(in, out, stream);
    }
  }

  void agree_on_options() {
    std::uint64_t history = detail::kHashSeed;
    for (const std::int64_t word :
         {options_.own_max_bytes.value_or(-1), std::int64_t{options_.peer_mapping},
          std::int64_t{options_.visibility_guard}}) {
      history = detail::mix(history, static_cast<std::uint64_t>(word));
    }
    agree(group_, {.place = fmt::format("connection of group {} over NCCL", group_.name()),
                   .history = history});
  }

  void connect_peers(const GroupProbe& probe) {
    const int affordable = cuda::block_budget({.multiprocessors = probe.multiprocessors,
                                               .ranks_per_card = ranks_per_card_,
                                               .kernels_at_once = options_.kernels_at_once});
    const auto budgets = detail::gather_values(group_, affordable);
    const int blocks = *std::min_element(budgets.begin(), budgets.end());
    auto outcome = CudaPeerKernels::create(
        group_, device_,
        {.max_blocks = blocks, .whole_lines = probe.whole_lines, .limit = options_.kernel_limit});
    peers_ = std::move(outcome.kernels);
    capabilities_.peer_import = peers_ != nullptr;
    capabilities_.obstacle = std::move(outcome.refusal);
    if (peers_ && rank_ == 0 && capabilities_.nvlink_reach && !probe.whole_lines) {
      warn_without_lines();
    }
  }

  /// Once a process: groups of the same cards have the same reason.
  void warn_without_lines() const {
    static std::atomic<bool> told = false;
    if (!told.exchange(true)) {
      log(LogLevel::warning,
          fmt::format("group {}: NVLink joins the cards, but flag lines are not known to arrive "
                      "whole between these (NCCL's rule for LL128): larger merges take the plan "
                      "packed, and larger collectives NCCL",
                      group_.name()));
    }
  }

  void nccl(ncclResult_t code, const char* call) { communicator_->check(code, call); }

  /// Calls within start at its end. An exception inside must still close NCCL's group.
  template <class Body>
  void in_nccl_group(const Body& body) {
    nccl(ncclGroupStart(), "ncclGroupStart");
    try {
      body();
    } catch (...) {
      static_cast<void>(ncclGroupEnd());
      throw;
    }
    nccl(ncclGroupEnd(), "ncclGroupEnd");
  }

  [[nodiscard]] bool own(Collective collective, const ConstTensorView& in, const TensorView& out,
                         ReduceOp op) const {
    if (peers_ == nullptr) {
      return false;
    }
    const std::size_t total = std::max(in.bytes(), out.bytes());
    const std::size_t limit = options_.own_max_bytes
                                  ? static_cast<std::size_t>(*options_.own_max_bytes)
                                  : default_own_max_bytes(collective, size_, whole_lines_);
    if (total > limit) {
      return false;
    }
    switch (collective) {
      case Collective::all_gather:
        return peers_->can_all_gather(in.bytes());
      case Collective::reduce_scatter:
        return peers_->can_reduce_scatter(out.bytes(), in.dtype(), op);
      case Collective::all_reduce:
        return peers_->can_all_reduce(in.bytes(), in.dtype(), op);
      case Collective::all_to_all:
      case Collective::broadcast:
        return false;
    }
    return false;
  }

  /// What NCCL does with a call of these buffers.
  [[nodiscard]] SymmetricPath symmetric(Collective collective, const void* in, std::size_t in_bytes,
                                        const void* out, std::size_t out_bytes, DType dtype,
                                        ReduceOp op) const {
    if (!has_symmetric_kernel(collective, dtype, op)) {
      return SymmetricPath::never;
    }
    return symmetric_path(nccl_version_,
                          {.in = communicator_->in_window(in, in_bytes),
                           .out = communicator_->in_window(out, out_bytes)},
                          symmetric_asked_for_);
  }

  /// Scratch memory, which packed calls go through, lies in no window.
  [[nodiscard]] const char* nccl_path(Collective collective, const ConstTensorView& in,
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

  /// Before a call of NCCL that may take its symmetric path: the ranks compare the places of its
  /// buffers (see call_places.hpp), and what it reads is made visible. Throws `SymmetryError` on
  /// every rank, before anything is enqueued, where the call is captured; an eager one fails the
  /// group.
  void prepare(Collective collective, const void* in, std::size_t in_bytes, const void* out,
               std::size_t out_bytes, DType dtype, ReduceOp op, cudaStream_t stream) {
    const SymmetricPath path = symmetric(collective, in, in_bytes, out, out_bytes, dtype, op);
    const bool registered = communicator_->has_registered();
    const PlaceCheck check =
        place_check({.nccl_runtime_version = nccl_version_,
                     .symmetric_kernel = has_symmetric_kernel(collective, dtype, op),
                     .registered = registered,
                     .captured = registered && streams_.capture_id(stream) != 0,
                     .own_kernels = peers_ != nullptr});
    if (check != PlaceCheck::none) {
      const std::uint64_t places = place_token(
          collective, path,
          {.in = communicator_->place(in, in_bytes), .out = communicator_->place(out, out_bytes)});
      if (check == PlaceCheck::own_kernel) {
        peers_->meet(
            cuda::CallSignature::make(over_nccl(collective), {static_cast<std::int64_t>(dtype),
                                                              static_cast<std::int64_t>(in_bytes),
                                                              static_cast<std::int64_t>(places)}),
            stream);
        return;  // it is a guard as well
      }
      agree(group_, {.place = fmt::format("capture of a call of group {}: the places of its "
                                          "buffers in their windows",
                                          group_.name()),
                     .history = places});
    }
    if (options_.visibility_guard && needs_visibility_guard(nccl_version_, path)) {
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

  /// Of equal shares of the type and size of `share`, without gaps.
  void nccl_all_gather(const ConstTensorView& share, const void* in, void* out,
                       cudaStream_t stream) {
    prepare(Collective::all_gather, in, share.bytes(), out, whole(share), share.dtype(),
            ReduceOp::sum, stream);
    nccl(ncclAllGather(in, out, count(share), nccl_type(share.dtype()), communicator_->get(),
                       stream),
         "ncclAllGather");
  }
  void nccl_reduce_scatter(const ConstTensorView& share, const void* in, void* out, ReduceOp op,
                           cudaStream_t stream) {
    prepare(Collective::reduce_scatter, in, whole(share), out, share.bytes(), share.dtype(), op,
            stream);
    nccl(ncclReduceScatter(in, out, count(share), nccl_type(share.dtype()), nccl_op(op),
                           communicator_->get(), stream),
         "ncclReduceScatter");
  }
  [[nodiscard]] std::size_t whole(const ConstTensorView& share) const noexcept {
    return share.bytes() * static_cast<std::size_t>(size_);
  }

  /// The group orders its calls, so one has the scratch memory to itself. Whether the stream is
  /// being captured matters only where the memory has to grow.
  [[nodiscard]] std::byte* scratch_at_least(const Call& call, std::size_t bytes) {
    return workspaces_[lane_].get(bytes, [&] { return streams_.capture_id(call.stream) != 0; });
  }

  [[nodiscard]] TensorView scratch_like(const Call& call, const ConstTensorView& view,
                                        std::size_t offset) {
    return {scratch_at_least(call, offset + align(view.bytes())) + offset, view.dtype(),
            view.shape(), view.device()};
  }

  /// All-gather of equal shares through scratch memory.
  void gather_packed(const Call& call, const ConstTensorView& in, const TensorView& out, int dim) {
    const std::size_t in_bytes = in.is_contiguous() ? 0 : align(in.bytes());
    std::byte* const scratch = scratch_at_least(call, in_bytes + align(out.bytes()));
    const void* share = in.data();
    if (in_bytes > 0) {
      detail::copy_view(in, {scratch, in.dtype(), in.shape(), in.device()}, call.stream);
      share = scratch;
    }
    void* const gathered = scratch + in_bytes;
    if (own(Collective::all_gather, in, out, ReduceOp::sum)) {
      peers_->all_gather(
          cuda::AlongDim::contiguous(1, static_cast<std::int64_t>(in.bytes()), size_), share,
          gathered, call.stream);
    } else {
      nccl_all_gather(in, share, gathered, call.stream);
    }
    const auto dims = shares_of(in.shape(), in.numel(), out, dim);
    detail::copy_joined(gathered, in.dtype(), out.data(), out.dtype(), dims, call.stream);
  }

  /// Reduce-scatter of equal shares through scratch memory.
  void scatter_packed(const Call& call, const ConstTensorView& in, const TensorView& out, int dim,
                      ReduceOp op) {
    const std::size_t in_bytes = align(in.bytes());
    const bool direct = out.is_contiguous();
    std::byte* const scratch = scratch_at_least(call, in_bytes + (direct ? 0 : align(out.bytes())));
    auto dims = shares_of(out.shape(), out.numel(), in, dim);
    std::swap(dims.a, dims.b);
    detail::copy_joined(in.data(), in.dtype(), scratch, in.dtype(), dims, call.stream);
    void* const share = direct ? out.data() : scratch + in_bytes;
    if (own(Collective::reduce_scatter, in, out, op)) {
      peers_->reduce_scatter(
          cuda::AlongDim::contiguous(1, static_cast<std::int64_t>(out.bytes()), size_), in.dtype(),
          scratch, share, call.stream);
    } else {
      nccl_reduce_scatter(out, scratch, share, op, call.stream);
    }
    if (!direct) {
      detail::copy_view(TensorView(share, out.dtype(), out.shape(), out.device()), out,
                        call.stream);
    }
  }

  /// [n][share] without gaps against the ranks' shares within `full`: strides `a` and `b`.
  [[nodiscard]] detail::JoinedDims shares_of(const Dims& share, std::int64_t share_numel,
                                             const ConstTensorView& full, int dim) const {
    detail::JoinedDims dims;
    const Dims packed = contiguous_strides(share);
    dims.push(size_, share_numel, share[dim] * full.strides()[dim]);
    for (int d = 0; d < share.size(); ++d) {
      dims.push(share[d], packed[d], full.strides()[d]);
    }
    return dims;
  }

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

  /// Every rank sends its share to every other.
  void gather_unequal(const Call& call, const ConstTensorView& in, const TensorView& out, int dim,
                      std::span<const std::int64_t> sizes) {
    const auto all = shares(out, dim, sizes);
    const Share& mine = all[static_cast<std::size_t>(rank_)];
    const bool direct = fits(out, out, dim);
    const std::size_t in_bytes = in.is_contiguous() ? 0 : align(in.bytes());
    std::byte* scratch = nullptr;
    if (in_bytes > 0 || !direct) {
      scratch = scratch_at_least(call, in_bytes + (direct ? 0 : align(out.bytes())));
    }
    const void* share = in.data();
    if (in_bytes > 0) {
      detail::copy_view(in, {scratch, in.dtype(), in.shape(), in.device()}, call.stream);
      share = scratch;
    }
    auto* const to = direct ? static_cast<std::byte*>(out.data()) : scratch + in_bytes;
    const ncclDataType_t type = nccl_type(in.dtype());
    in_nccl_group([&] {
      for (int step = 1; step < size_; ++step) {
        const int to_rank = (rank_ + step) % size_;
        const int from_rank = (rank_ - step + size_) % size_;
        const Share& theirs = all[static_cast<std::size_t>(from_rank)];
        if (mine.elements > 0) {
          nccl(ncclSend(share, mine.elements, type, to_rank, communicator_->get(), call.stream),
               "ncclSend");
        }
        if (theirs.elements > 0) {
          nccl(ncclRecv(to + theirs.offset, theirs.elements, type, from_rank, communicator_->get(),
                        call.stream),
               "ncclRecv");
        }
      }
    });
    for (int r = 0; r < size_; ++r) {
      const Share& piece = all[static_cast<std::size_t>(r)];
      const TensorView slice = out.slice(dim, piece.begin, piece.extent);
      if (r == rank_) {
        copy_unless_same(in, slice, call.stream);
      } else if (!direct && piece.elements > 0) {
        detail::copy_view({to + piece.offset, out.dtype(), slice.shape(), out.device()}, slice,
                          call.stream);
      }
    }
  }

  /// One reduction for each rank's share.
  void scatter_unequal(const Call& call, const ConstTensorView& in, const TensorView& out, int dim,
                       std::span<const std::int64_t> sizes, ReduceOp op) {
    const auto all = shares(in, dim, sizes);
    const bool in_direct = fits(in, in, dim);
    const bool out_direct = out.is_contiguous();
    const std::size_t in_bytes = in_direct ? 0 : align(in.bytes());
    std::byte* scratch = nullptr;
    if (!in_direct || !out_direct) {
      scratch = scratch_at_least(call, in_bytes + (out_direct ? 0 : align(out.bytes())));
    }
    const auto* from = static_cast<const std::byte*>(in.data());
    if (!in_direct) {
      from = scratch;
      for (const Share& piece : all) {
        const ConstTensorView slice = in.slice(dim, piece.begin, piece.extent);
        detail::copy_view(slice, {scratch + piece.offset, in.dtype(), slice.shape(), in.device()},
                          call.stream);
      }
    }
    void* const share = out_direct ? out.data() : scratch + in_bytes;
    in_nccl_group([&] {
      for (int r = 0; r < size_; ++r) {
        const Share& piece = all[static_cast<std::size_t>(r)];
        if (piece.elements > 0) {
          nccl(ncclReduce(from + piece.offset, share, piece.elements, nccl_type(in.dtype()),
                          nccl_op(op), r, communicator_->get(), call.stream),
               "ncclReduce");
        }
      }
    });
    if (!out_direct) {
      detail::copy_view(TensorView(share, out.dtype(), out.shape(), out.device()), out,
                        call.stream);
    }
  }

  void require_peer(const char* what, int peer) const {
    if (peer == rank_ || peer < 0 || peer >= size_) {
      throw UsageError(
          fmt::format("{}: expected another rank of 0 to {}, got {}", what, size_ - 1, peer));
    }
  }

  void check_asynchronous() {
    if (communicator_ != nullptr) {
      communicator_->check_asynchronous();
    }
  }

  [[nodiscard]] bool own_failed() const noexcept { return peers_ != nullptr && peers_->failed(); }

  // RankWaits
  void end_waits() noexcept override {
    if (peers_ != nullptr) {
      peers_->give_up();
    }
    if (communicator_ != nullptr) {
      try {
        communicator_->abort();
      } catch (const std::exception& error) {
        log(LogLevel::error, error.what());
      }
    }
  }
  [[nodiscard]] std::string failure() const override {
    if (!own_failed()) {
      return "";
    }
    const cuda::InboxError error = peers_->error();
    if (error.theirs != cuda::PeerCall::none) {
      return fmt::format(
          "group {}: at call {} of the group's own kernels rank {} made {} {}, and "
          "this rank {}{}",
          group_.name(), error.epoch, error.missing_rank,
          error.theirs == error.mine ? "another" : "a", to_string(error.theirs),
          to_string(error.mine),
          error.theirs == error.mine && is_over_nccl(error.mine)
              ? ": its buffers lie at other offsets of their windows, or on one rank in none, or "
                "its sizes or types differ"
              : "");
    }
    const auto missing = peers_->missing();
    return fmt::format("group {}: rank{} {} did not come to call {} of the group's own kernels, {}",
                       group_.name(), missing.size() > 1 ? "s" : "", detail::joined(missing, ", "),
                       error.epoch, to_string(error.mine));
  }

  /// Has the stream drain: own waits of this group first, so that they can say who was missing,
  /// then whatever else waits for ranks. False where it stays busy.
  [[nodiscard]] bool drain(StreamRef stream) {
    if (peers_ != nullptr) {
      peers_->give_up();
      if (streams_.idle_within(stream.native(), kDrainLimit)) {
        return true;
      }
    }
    end_waits();
    if (streams_.idle_within(stream.native(), kDrainLimit)) {
      return true;
    }
    streams_.end_all_waits();
    return streams_.idle_within(stream.native(), kDrainLimit);
  }

  [[noreturn]] void throw_failure() {
    if (communicator_ != nullptr) {
      communicator_->mark_broken();  // teardown must not wait for peers from here on
    }
    const cuda::InboxError error = peers_->error();
    const std::string text =
        failure() + "; outputs since then are undefined, and the group must be formed anew";
    if (error.theirs != cuda::PeerCall::none) {
      throw SymmetryError(text, {error.missing_rank});
    }
    throw TimeoutError(text, peers_->missing());
  }

  /// Of a wait for which no own kernel of this group is to blame.
  [[noreturn]] void throw_time_out(std::chrono::milliseconds limit, bool drained) {
    if (communicator_ != nullptr) {
      communicator_->mark_broken();
    }
    std::vector<int> gone;
    for (std::size_t r = 0; r < processes_.size(); ++r) {
      if (process_is_gone(processes_[static_cast<std::size_t>(rank_)], processes_[r])) {
        gone.push_back(static_cast<int>(r));
      }
    }
    const std::string others = streams_.failures(*this);
    throw TimeoutError(
        fmt::format(
            "synchronize in group {} on rank {}: the stream was still busy after {} ms{}{}; "
            "{}, and the group must be formed anew",
            group_.name(), rank_, limit.count(),
            gone.empty()
                ? ""
                : fmt::format("; the process of rank {} is gone", detail::joined(gone, ", ")),
            others.empty() ? "" : "; " + others,
            drained ? "its waits were ended" : "a kernel on it could not be ended"),
        std::move(gone));
  }

  /// Leaks what kernels may use that do not end.
  void abandon_what_runs() noexcept {
    if (device_idle_within(device_, kDrainLimit)) {
      return;
    }
    log(LogLevel::error,
        fmt::format("teardown of group {} on rank {}: cuda:{} did not become idle; what its "
                    "kernels may use stays mapped",
                    group_.name(), rank_, device_));
    for (Workspace& workspace : workspaces_) {
      workspace.abandon();
    }
    static_cast<void>(barrier_word_.release());
    if (peers_ != nullptr) {
      peers_->abandon();
    }
    if (communicator_ != nullptr) {
      communicator_->mark_broken();
    }
  }

  ControlPlane& group_;
  CudaStreamDriver& streams_;
  int device_;
  NcclTransportOptions options_;
  int rank_;
  int size_;
  int nccl_version_ = 0;
  bool symmetric_asked_for_ = read_nccl_env().symmetric_asked_for;
  bool whole_lines_ = false;
  SymmetricCapabilities capabilities_;
  std::shared_ptr<Communicator> communicator_;
  UniqueMemory barrier_word_;
  std::vector<Workspace> workspaces_;  // by lane
  std::size_t lane_ = 0;
  std::unique_ptr<CudaPeerKernels> peers_;
  std::vector<ProcessIdentity> processes_;  // by rank
  int ranks_per_card_ = 1;
  bool settled_ = false;
};

}  // namespace cohort
