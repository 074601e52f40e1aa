// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "cohort/control_plane.hpp"
#include "cohort/cuda/block_budget.hpp"
#include "cohort/cuda/cuda_ops.hpp"
#include "cohort/cuda/cuda_peer_kernels.hpp"
#include "cohort/cuda/cuda_stream.hpp"
#include "cohort/cuda/workspace.hpp"
#include "cohort/error.hpp"
#include "cohort/flight_recorder.hpp"
#include "cohort/log.hpp"
#include "cohort/nccl/communicator.hpp"
#include "cohort/nccl/nccl_calls.hpp"
#include "cohort/nccl/nccl_group.hpp"
#include "cohort/nccl/nccl_packing.hpp"
#include "cohort/nccl/nccl_unequal_shares.hpp"
#include "cohort/nccl/nccl_waits.hpp"
#include "cohort/nccl/nccl_window.hpp"
#include "cohort/nccl/profiler_ranges.hpp"
#include "cohort/nccl/transport_options.hpp"
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

class NcclTransport final : public Transport {
 public:
  /// Collective over `group`, which outlives the transport. Throws `ConfigError` on every rank
  /// where NCCL would refuse the group, `SymmetryError`, `TimeoutError` and `TransportError`.
  NcclTransport(ControlPlane& group, CudaStreamDriver& streams, int device,
                const NcclTransportOptions& options)
      : group_(group, streams, device, options) {}

  NcclTransport(const NcclTransport&) = delete;
  NcclTransport& operator=(const NcclTransport&) = delete;

  [[nodiscard]] std::string_view name() const noexcept override { return "nccl"; }
  [[nodiscard]] const SymmetricCapabilities& capabilities() const noexcept override {
    return group_.capabilities;
  }
  [[nodiscard]] PeerKernels* peer_kernels() noexcept override { return group_.peers.get(); }
  /// Null in a group of one.
  [[nodiscard]] Communicator* communicator() noexcept { return group_.communicator.get(); }

  /// Symmetric kernels compute a peer's address from the own offset.
  [[nodiscard]] bool needs_equal_offsets() const noexcept override { return true; }
  void compare_places() noexcept override { group_.debug_checks = true; }
  void agree_also(std::int64_t form) noexcept override { group_.form = form; }

  /// The most ranks that share a card, as far as is known.
  [[nodiscard]] int ranks_per_card() const noexcept { return group_.ranks_per_card; }

  void reserve_scratch(std::size_t bytes) override {
    for (Workspace& workspace : group_.workspaces) {
      workspace.reserve(bytes + 2 * detail::kScratchAlignment);
    }
  }

  [[nodiscard]] std::unique_ptr<Window> register_segment(Segment& segment) override {
    if (group_.size == 1) {
      return std::make_unique<LocalWindow>(segment);
    }
    if (!segment.registers_with(BackendKind::cuda)) {
      throw UsageError("segment: expected one of the CUDA backend");
    }
    return NcclWindow::create(group_.communicator, static_cast<NcclSegment&>(segment),
                              group_.control);
  }

  [[gnu::hot]] void all_gather(const ConstTensorView& in, const TensorView& out, int dim,
                               std::span<const std::int64_t> sizes, StreamRef stream) override {
    if (out.numel() == 0) {
      return;
    }
    const detail::NcclCall call(group_, stream);
    if (group_.size == 1) {
      detail::copy_view(in, out, call.stream);
    } else if (!detail::all_equal(sizes)) {
      unequal_.gather(call, in, out, dim, sizes);
    } else if (group_.own(Collective::all_gather, in, out, ReduceOp::sum)) {
      auto dims = detail::along_dim(in, out, dim);
      if (dims) {
        dims->form = group_.form;
        group_.peers->all_gather(*dims, in.data(), out.data(), call.stream);
      } else {
        packing_.gather(call, in, out, dim);
      }
    } else if (detail::fits(in, out, dim) &&
               !calls_.loose(Collective::all_gather, out, ReduceOp::sum)) {
      calls_.all_gather(in, dim, in.data(), out.data(), call.stream);
    } else {
      packing_.gather(call, in, out, dim);
    }
  }

  [[gnu::hot]] void reduce_scatter(const ConstTensorView& in, const TensorView& out, int dim,
                                   std::span<const std::int64_t> sizes, ReduceOp op,
                                   StreamRef stream) override {
    if (in.numel() == 0) {
      return;
    }
    const detail::NcclCall call(group_, stream);
    if (group_.size == 1) {
      detail::copy_view(in, out, call.stream);
    } else if (!detail::all_equal(sizes)) {
      unequal_.reduce_scatter(call, in, out, dim, sizes, op);
    } else if (group_.own(Collective::reduce_scatter, in, out, op)) {
      const auto dims = detail::along_dim(out, in, dim);
      if (dims) {
        group_.peers->reduce_scatter(*dims, in.dtype(), in.data(), out.data(), call.stream);
      } else {
        packing_.reduce_scatter(call, in, out, dim, op);
      }
    } else if (detail::fits(out, in, dim) && !calls_.loose(Collective::reduce_scatter, in, op)) {
      calls_.reduce_scatter(out, dim, in.data(), out.data(), op, call.stream);
    } else {
      packing_.reduce_scatter(call, in, out, dim, op);
    }
  }

  [[gnu::hot]] void all_reduce(const ConstTensorView& in, const TensorView& out, ReduceOp op,
                               StreamRef stream) override {
    if (in.numel() == 0) {
      return;
    }
    const detail::NcclCall call(group_, stream);
    if (group_.size == 1) {
      detail::copy_unless_same(in, out, call.stream);
      return;
    }
    const bool own = group_.own(Collective::all_reduce, in, out, op);
    const detail::Packed packed(group_, call, in, out,
                                {.in = !own && calls_.loose(Collective::all_reduce, in, op),
                                 .out = !own && calls_.loose(Collective::all_reduce, out, op)});
    if (own) {
      group_.peers->all_reduce(in.numel(), in.dtype(), group_.form, packed.in, packed.out,
                               call.stream);
    } else {
      calls_.all_reduce(in, packed.in, packed.out, op, call.stream);
    }
    packed.unpack(out, call.stream);
  }

  [[nodiscard]] bool all_reduce_rms_norm(const NormArguments& arguments,
                                         StreamRef stream) override {
    const cuda::Norm norm = detail::norm_of(arguments);
    if (!group_.own_norm(norm.shape)) {
      return false;
    }
    const detail::NcclCall call(group_, stream);
    group_.peers->all_reduce_rms_norm(norm, call.stream);
    return true;
  }

  void broadcast(const TensorView& tensor, int root, StreamRef stream) override {
    if (tensor.numel() == 0 || group_.size == 1) {
      return;
    }
    const detail::NcclCall call(group_, stream);
    if (tensor.is_contiguous()) {
      calls_.broadcast(tensor, tensor.data(), root, call.stream);
      return;
    }
    const TensorView scratch = detail::scratch_like(group_, call, tensor);
    if (group_.rank == root) {
      detail::copy_view(tensor, scratch, call.stream);
    }
    calls_.broadcast(tensor, scratch.data(), root, call.stream);
    if (group_.rank != root) {
      detail::copy_view(scratch, tensor, call.stream);
    }
  }

  void all_to_all(const ConstTensorView& in, const TensorView& out, StreamRef stream) override {
    if (in.numel() == 0) {
      return;
    }
    const detail::NcclCall call(group_, stream);
    if (group_.size == 1) {
      detail::copy_unless_same(in, out, call.stream);
      return;
    }
    const detail::Packed packed(group_, call, in, out);
    const std::size_t part = detail::element_count(in) / static_cast<std::size_t>(group_.size);
    const std::size_t part_bytes = part * size_of(in.dtype());
    const auto* const from = static_cast<const std::byte*>(packed.in);
    auto* const to = static_cast<std::byte*>(packed.out);
    const auto offset = [&](int r) { return static_cast<std::size_t>(r) * part_bytes; };
    cuda_check(cudaMemcpyAsync(to + offset(group_.rank), from + offset(group_.rank), part_bytes,
                               cudaMemcpyDeviceToDevice, call.stream),
               "cudaMemcpyAsync");
    std::vector<detail::NcclCalls::Piece> messages;
    for (int step = 1; step < group_.size; ++step) {
      const int to_rank = (group_.rank + step) % group_.size;
      const int from_rank = (group_.rank - step + group_.size) % group_.size;
      messages.push_back(calls_.send(from + offset(to_rank), part, in.dtype(), to_rank));
      messages.push_back(calls_.recv(to + offset(from_rank), part, in.dtype(), from_rank));
    }
    calls_.together(std::move(messages), call.stream);
    packed.unpack(out, call.stream);
  }

  void send(const ConstTensorView& tensor, int to, StreamRef stream) override {
    require_peer("send to", to);
    if (tensor.numel() == 0) {
      return;
    }
    const detail::NcclCall call(group_, stream);
    const void* data = tensor.data();
    if (!tensor.is_contiguous()) {
      const TensorView scratch = detail::scratch_like(group_, call, tensor);
      detail::copy_view(tensor, scratch, call.stream);
      data = scratch.data();
    }
    calls_.together({calls_.send(data, detail::element_count(tensor), tensor.dtype(), to)},
                    call.stream);
  }

  void recv(const TensorView& tensor, int from, StreamRef stream) override {
    require_peer("recv from", from);
    if (tensor.numel() == 0) {
      return;
    }
    const detail::NcclCall call(group_, stream);
    const bool direct = tensor.is_contiguous();
    const TensorView target = direct ? tensor : detail::scratch_like(group_, call, tensor);
    calls_.together(
        {calls_.recv(target.data(), detail::element_count(tensor), tensor.dtype(), from)},
        call.stream);
    if (!direct) {
      detail::copy_view(target, tensor, call.stream);
    }
  }

  void barrier(StreamRef stream) override {
    if (group_.size == 1) {
      return;
    }
    const detail::NcclCall call(group_, stream);
    if (group_.peers != nullptr) {
      group_.peers->barrier(call.stream);
      return;
    }
    calls_.barrier(call.stream);
  }

  /// "own", "nccl symmetric", "nccl" or, where NCCL's cost model decides, "nccl, maybe symmetric";
  /// with ", packed" where this rank's tensors do not lie as the path needs them; "copy" in a group
  /// of one, "none" where there is nothing to move. Reductions are taken to be sums. An all-reduce
  /// with a norm that is no launch of its own has the path of an all-reduce, with ", then a norm".
  [[nodiscard]] std::string path(Collective collective, const ConstTensorView& in,
                                 const TensorView& out, int dim) const override {
    if (in.numel() == 0 && out.numel() == 0) {
      return "none";
    }
    if (group_.size == 1) {
      return "copy";
    }
    if (collective == Collective::all_reduce_rms_norm) {
      if (in.ndim() == 2 && group_.own_norm(detail::norm_shape_of(in, out.dtype()))) {
        return "own";
      }
      return path(Collective::all_reduce, in, sum_before_norm(in, out), dim) + ", then a norm";
    }
    const bool gather = collective == Collective::all_gather;
    const bool along = gather || collective == Collective::reduce_scatter;
    const ConstTensorView full = gather ? ConstTensorView(out) : in;
    const ConstTensorView share = gather ? in : ConstTensorView(out);
    const bool equal = !along || share.size(dim) * group_.size == full.size(dim);
    const bool is_own = equal && group_.own(collective, in, out, ReduceOp::sum);
    const bool lies_well = !along   ? in.is_contiguous() && out.is_contiguous()
                           : is_own ? detail::along_dim(share, full, dim).has_value()
                                    : detail::fits(share, full, dim);
    const bool loose = !is_own && (collective == Collective::all_reduce
                                       ? calls_.loose(collective, in, ReduceOp::sum) ||
                                             calls_.loose(collective, out, ReduceOp::sum)
                                       : along && calls_.loose(collective, full, ReduceOp::sum));
    const bool direct = lies_well && !loose;
    return std::string(is_own  ? "own"
                       : equal ? calls_.path(collective, in, out, direct)
                               : "nccl") +
           (direct ? "" : ", packed");
  }

  void synchronize(StreamRef stream, std::chrono::milliseconds limit) override {
    waits_.synchronize(stream, limit);
  }
  void check(StreamRef stream, PeerLook look) override {
    if (group_.came_on(detail::native(stream))) {
      waits_.check(look);
    }
  }
  [[nodiscard]] std::size_t slot_bytes(Collective collective, std::size_t bytes,
                                       std::size_t row_bytes) const noexcept override {
    if (group_.peers == nullptr || bytes > group_.own_limit(collective)) {
      return 0;
    }
    if (collective == Collective::all_reduce_rms_norm && row_bytes > 0) {
      const cuda::NormShape shape{.rows = static_cast<std::int64_t>(bytes / row_bytes),
                                  .hidden = static_cast<std::int64_t>(row_bytes),
                                  .dtype = DType::u8};
      constexpr std::int64_t kPlenty = std::numeric_limits<std::int64_t>::max() / 2;
      if (cuda::norm_plan(group_.size, shape, 0, kPlenty).fits) {
        return static_cast<std::size_t>(cuda::norm_slot_bytes(group_.size, shape));
      }
      collective = Collective::all_reduce;
    }
    return collective == Collective::all_reduce
               ? static_cast<std::size_t>(
                     cuda::all_reduce_slot_bytes(group_.size, static_cast<std::int64_t>(bytes)))
               : bytes;
  }
  void before_launch(StreamRef stream) override {
    if (group_.size > 1) {
      group_.enter(detail::native(stream));
    }
  }
  [[nodiscard]] bool failed() const noexcept override { return group_.failed(); }

  [[nodiscard]] TraceRings trace_rings() override { return std::move(group_.trace_rings); }
  [[nodiscard, gnu::hot]] TransportStand call_begins(TraceCall call, StreamRef stream,
                                                     CaptureId capture) noexcept override {
    ranges_.begin(call);
    group_.path = CallPath::unknown;
    group_.form = 0;
    if (stream.valid()) {
      group_.capture = capture;
    }
    steps_before_ = steps();
    return {.steps = steps_before_,
            .inbox = group_.peers != nullptr ? group_.peers->inbox() : std::uint8_t{0}};
  }
  [[nodiscard, gnu::hot]] TransportStand call_ends() noexcept override {
    group_.capture.reset();
    ranges_.end();
    TransportStand stand{.steps = steps(), .path = group_.path};
    if (stand.path == CallPath::unknown) {
      stand.path = stand.steps != steps_before_ ? CallPath::own : CallPath::local;
    }
    return stand;
  }
  /// A card counts a call when it begins it. Whether the last has ended is known where the card is
  /// idle and nothing was ended before its time, where a wait of the host came back (`settled`),
  /// and where this rank gave the call up; not where the card is busy, perhaps with other work.
  void look_at_device(TraceRing& ring) override {
    if (group_.peers == nullptr) {
      return;
    }
    const bool cut_short = group_.own_failed() || group_.communicator->broken();
    constexpr std::chrono::milliseconds kPatience{10};  // the card's answer takes a thread
    const bool over = !cut_short && device_idle_within(group_.device, kPatience);
    look_at_epochs(ring, group_.peers->epochs(), over, group_.peers->error(), group_.rank);
  }
  void settle(std::chrono::milliseconds patience) noexcept override { waits_.settle(patience); }
  void forsake_peers(const cohort::detail::GiveUp& /*why*/) noexcept override {
    if (group_.communicator != nullptr) {
      group_.communicator->mark_broken();
    }
  }
  void refused(const std::exception_ptr& error) noexcept override {
    if (group_.size > 1 && !group_.failed()) {
      group_.communicator->mark_broken();
      group_.control.give_up_because(error);
    }
  }

  void reserve_lanes(int lanes) override {
    while (group_.workspaces.size() < static_cast<std::size_t>(lanes)) {
      group_.workspaces.emplace_back(group_.device);
    }
    if (group_.peers != nullptr) {
      warn_of_lanes(lanes);
      group_.peers->reserve_lanes(lanes);
    }
  }
  void select_lane(int lane) noexcept override {
    group_.lane = static_cast<std::size_t>(lane);
    if (group_.peers != nullptr) {
      group_.peers->select_lane(lane);
    }
  }
  void limit_blocks(int blocks) noexcept override {
    if (group_.peers != nullptr) {
      group_.peers->limit_blocks(blocks);
    }
  }

 private:
  [[nodiscard]] std::uint64_t steps() const noexcept {
    return group_.peers != nullptr ? group_.peers->steps() : 0;
  }
  /// Once a group.
  void warn_of_lanes(int lanes) {
    const std::string text = cuda::lanes_warning(lanes, group_.options.kernels_at_once);
    if (!text.empty() && group_.rank == 0 && !std::exchange(warned_of_lanes_, true)) {
      log(LogLevel::warning, "group {}: {}", group_.control.name(), text);
    }
  }
  void require_peer(const char* what, int peer) const {
    if (peer == group_.rank || peer < 0 || peer >= group_.size) {
      throw UsageError(
          fmt::format("{}: expected another rank of 0 to {}, got {}", what, group_.size - 1, peer));
    }
  }

  // In the order of their beginnings; the waits end before what they wait for goes.
  detail::NcclGroup group_;
  detail::NcclCalls calls_{group_};
  detail::NcclPacking packing_{group_, calls_};
  detail::NcclUnequalShares unequal_{group_, calls_};
  detail::NcclWaits waits_{group_};
  ProfilerRanges ranges_{group_.control.name()};
  std::uint64_t steps_before_ = 0;  // the call under way
  bool warned_of_lanes_ = false;
};

}  // namespace cohort
