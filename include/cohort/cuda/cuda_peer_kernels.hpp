// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cohort/agreement.hpp"
#include "cohort/control_plane.hpp"
#include "cohort/cuda/block_budget.hpp"
#include "cohort/cuda/cuda_ops.hpp"
#include "cohort/cuda/handles.hpp"
#include "cohort/cuda/host_words.hpp"
#include "cohort/cuda/inbox.hpp"
#include "cohort/cuda/kernels.hpp"
#include "cohort/cuda/peer_mapping.hpp"
#include "cohort/cuda/shapes.hpp"
#include "cohort/error.hpp"
#include "cohort/tensor.hpp"
#include "cohort/transport.hpp"

/// \file
/// The library's own collective kernels for one group: its inboxes, mapped on every rank, and the
/// calls that go through them.

namespace cohort {

namespace detail {

/// The product of the extents before a dimension.
[[nodiscard]] inline std::int64_t extents_before(const Dims& shape, int dim) noexcept {
  std::int64_t product = 1;
  for (int d = 0; d < dim; ++d) {
    product *= shape[d];
  }
  return product;
}

/// A collective along a dimension as the kernels want it, or nothing where the views' layout does
/// not allow it: within one share everything is one run of bytes, and the dimensions before can be
/// walked with one stride.
[[nodiscard]] inline std::optional<cuda::AlongDim> along_dim(const ConstTensorView& share,
                                                             const ConstTensorView& full, int dim) {
  JoinedDims outer;
  JoinedDims inner;
  for (int d = 0; d < share.ndim(); ++d) {
    (d < dim ? outer : inner).push(share.shape()[d], share.strides()[d], full.strides()[d]);
  }
  const bool one_run = inner.size == 0 || (inner.size == 1 && inner.a[0] == 1 && inner.b[0] == 1);
  if (!one_run || outer.size > 1) {
    return std::nullopt;
  }
  const auto bytes = static_cast<std::int64_t>(size_of(share.dtype()));
  return cuda::AlongDim{.outer = outer.size == 0 ? 1 : outer.shape[0],
                        .inner_bytes = (inner.size == 0 ? 1 : inner.shape[0]) * bytes,
                        .share_outer_stride = outer.size == 0 ? 0 : outer.a[0] * bytes,
                        .full_outer_stride = outer.size == 0 ? 0 : outer.b[0] * bytes,
                        .full_rank_stride = share.shape()[dim] * full.strides()[dim] * bytes,
                        .before = extents_before(share.shape(), dim)};
}

[[nodiscard]] constexpr bool is_kernel_sum(DType dtype, ReduceOp op) noexcept {
  return op == ReduceOp::sum && is_attention_dtype(dtype);
}

}  // namespace detail

/// The peer kernels of one group on CUDA devices of one machine.
class CudaPeerKernels final : public PeerKernels {
 public:
  struct Options {
    int max_blocks = 1;                       ///< See block_budget.hpp; equal on all ranks.
    cuda::ClusterRoom max_clusters = {};      ///< The same.
    bool whole_lines = false;                 ///< See `cuda::PeerPath::flag_line`; equal likewise.
    std::chrono::milliseconds limit{60'000};  ///< Of a wait in a kernel.
    std::uint64_t after_epoch = 0;            ///< For tests; equal on all ranks.
    DescriptorRoute route = DescriptorRoute::automatic;
  };

  /// Bytes of flag lines to a peer before anything is reserved: as many as flag words carry.
  static constexpr std::int64_t kFirstLineBytes = cuda::InboxOptions{}.flag_word_bytes;

  /// The kernels, or why the ranks' memory cannot be mapped; equal on all ranks.
  struct Outcome {
    std::unique_ptr<CudaPeerKernels> kernels;
    std::string refusal;
  };

  /// Collective. Throws what the control plane throws, and `TransportError`.
  [[nodiscard]] static Outcome create(ControlPlane& group, int device, const Options& options) {
    if (group.size() > cuda::kMaxPeers) {
      return {nullptr, fmt::format("{} ranks are more than the {} that an inbox has room for",
                                   group.size(), cuda::kMaxPeers)};
    }
    {
      // Loading a kernel may wait for the card, so none is left to be loaded while others wait.
      const DeviceGuard guard(device);
      const RelaxedCapture relaxed;
      cuda::load_kernels(group.size());
    }
    std::unique_ptr<CudaPeerKernels> kernels(new CudaPeerKernels(group, device, options));
    if (auto refusal = kernels->build(0, options.whole_lines ? kFirstLineBytes : 0);
        !refusal.empty()) {
      return {nullptr, std::move(refusal)};
    }
    return {std::move(kernels), {}};
  }

  CudaPeerKernels(const CudaPeerKernels&) = delete;
  CudaPeerKernels& operator=(const CudaPeerKernels&) = delete;

  /// Inboxes only grow. Those that a larger one replaces stay until the end, because graphs that
  /// captured calls go on using them; each at least doubles the one before, up to the largest.
  /// A slot holds one lane for every rank. Flag words do not grow: their use is small payloads.
  void reserve(std::size_t slot_bytes) override {
    const auto ranks = static_cast<std::int64_t>(group_.size());
    const std::int64_t share = (static_cast<std::int64_t>(slot_bytes) + ranks - 1) / ranks;
    agree_to_grow(slot_bytes);
    const std::int64_t there = table().layout.flag_line_capacity();
    if (!options_.whole_lines || share <= there) {
      return;
    }
    for (std::size_t lane = 0; lane < lanes_.size(); ++lane) {
      require_built(build(lane, cuda::grown_lane_bytes(share, there)));
    }
  }

  /// Collective. At least so many inboxes that need no order among each other: calls on one lane
  /// are ordered, those of different ones are not. Throws as `reserve`.
  void reserve_lanes(int lanes) {
    agree_to_grow(static_cast<std::size_t>(lanes));
    while (lanes_.size() < static_cast<std::size_t>(lanes)) {
      require_built(build(lanes_.size(), table().layout.flag_line_capacity()));
    }
  }
  [[nodiscard]] int lanes() const noexcept { return static_cast<int>(lanes_.size()); }
  /// The lane of the calls that follow, one of those reserved.
  void select_lane(int lane) noexcept { lane_ = static_cast<std::size_t>(lane); }

  /// Most thread blocks of the calls that follow; 0 for the budget. Equal on all ranks.
  void limit_blocks(int blocks) noexcept {
    block_limit_ = blocks;
    for (auto& lane : lanes_) {
      lane.back().table.block_limit = blocks;
    }
  }

  [[nodiscard]] std::string merge_obstacle(const MergeArguments& arguments) const override {
    const auto shape = detail::merge_shape_of(arguments);
    if (auto text = cuda::merge_obstacle(shape, group_.size()); !text.empty()) {
      return text;
    }
    if (auto text = cuda::peer_merge_obstacle(shape); !text.empty()) {
      return text;
    }
    return obstacle([&] { static_cast<void>(cuda::choose_merge_path(table().layout, shape)); });
  }

  /// With two ranks the bytes on the way are the same, and one flight is less than two. With more,
  /// each rank sends n-1 partials instead of two: worth as long as that takes less than a flight.
  [[nodiscard]] std::int64_t most_replicated_bytes() const noexcept override {
    constexpr std::int64_t kBytesOfFlight = std::int64_t{1} << 20;  // 3 us of a 350 GB/s link
    const std::int64_t n = group_.size();
    return n == 2 ? cuda::kTooManyBytes : kBytesOfFlight * n / ((n - 1) * (n - 2));
  }
  void merge_attention(const MergeArguments& arguments, StreamRef stream) override {
    const DeviceGuard guard(device_);
    check_usable("merge_attention");
    if (arguments.partials.out.numel() == 0) {
      return;  // on every rank
    }
    cuda::peer_merge(table(), detail::merge_shape_of(arguments),
                     detail::partial_of(arguments.partials), detail::merged_of(arguments),
                     detail::native(stream));
    ++steps_;
  }

  [[nodiscard]] std::string gather_obstacle(const ConstTensorView& q_nope,
                                            const ConstTensorView& q_pe) const override {
    if (auto text = cuda::query_obstacle(detail::query_of(q_nope, q_pe)); !text.empty()) {
      return text;
    }
    return obstacle([&] {
      static_cast<void>(cuda::choose_query_path(table().layout, detail::query_of(q_nope, q_pe)));
    });
  }

  void gather_query(const ConstTensorView& q_nope, const ConstTensorView& q_pe, const TensorView& q,
                    QueryTypes types, StreamRef stream) override {
    const DeviceGuard guard(device_);
    check_usable("gather_query");
    if (q.numel() == 0) {
      return;
    }
    cuda::Query query = detail::query_of(q_nope, q_pe);
    query.types = types.number();
    query.successor_waits = attention_waits_;
    cuda::peer_gather_query(table(), query, q.data(), q.strides()[0], q.strides()[1],
                            detail::native(stream));
    ++steps_;
  }

  void attention_waits(bool waits) noexcept override { attention_waits_ = waits; }

  // The small collectives, for the group's transport. Whether they take a call depends on sizes and
  // types alone, which are equal on all ranks, and never on a rank's strides.

  [[nodiscard]] bool can_all_gather(std::size_t share_bytes) const {
    return static_cast<std::int64_t>(share_bytes) <= cuda::max_share_bytes(table().layout);
  }
  void all_gather(const cuda::AlongDim& dims, const void* in, void* out, cudaStream_t stream) {
    cuda::peer_all_gather(table(), dims, in, out, stream);
    ++steps_;
  }

  [[nodiscard]] bool can_reduce_scatter(std::size_t share_bytes, DType dtype, ReduceOp op) const {
    return detail::is_kernel_sum(dtype, op) &&
           static_cast<std::int64_t>(share_bytes) <= cuda::max_share_bytes(table().layout);
  }
  void reduce_scatter(const cuda::AlongDim& dims, DType dtype, const void* in, void* out,
                      cudaStream_t stream) {
    cuda::peer_reduce_scatter(table(), dims, dtype, in, out, stream);
    ++steps_;
  }

  [[nodiscard]] bool can_all_reduce(std::size_t bytes, DType dtype, ReduceOp op) const {
    return detail::is_kernel_sum(dtype, op) &&
           cuda::choose_all_reduce_plan(table().layout, static_cast<std::int64_t>(bytes)).fits;
  }
  /// `form`: what the ranks have to agree on besides.
  void all_reduce(std::int64_t count, DType dtype, std::int64_t form, const void* in, void* out,
                  cudaStream_t stream) {
    cuda::peer_all_reduce(table(), count, dtype, in, out, stream, cuda::PeerPath::automatic, form);
    ++steps_;
  }

  /// Whether one launch takes such rows.
  [[nodiscard]] bool can_all_reduce_rms_norm(const cuda::NormShape& shape) const {
    return cuda::choose_norm_plan(table().layout, shape).fits;
  }
  void all_reduce_rms_norm(const cuda::Norm& norm, cudaStream_t stream) {
    cuda::peer_all_reduce_rms_norm(table(), norm, stream);
    ++steps_;
  }

  void barrier(cudaStream_t stream) {
    cuda::peer_barrier(table(), stream);
    ++steps_;
  }

  /// Before a call over NCCL on which the ranks must agree; see `cuda::peer_meet`.
  void meet(cuda::CallSignature call, cudaStream_t stream) {
    cuda::peer_meet(table(), call, stream);
    ++steps_;
  }

  /// Whether a wait of the group's kernels has failed, here or elsewhere: one load.
  [[nodiscard]] bool failed() const noexcept { return words_.failed(); }
  /// The first wait that failed, and the ranks that this rank missed then.
  [[nodiscard]] cuda::InboxError error() const noexcept { return words_.failure(); }
  [[nodiscard]] std::vector<int> missing() const { return words_.missing(); }

  /// Ends all waits of the group's kernels, those under way and those to come: each fails at its
  /// next look and says which ranks it missed. Local; returns at once.
  void give_up() noexcept { words_.give_up(); }

  /// Kernels that were enqueued or captured, in all inboxes.
  [[nodiscard]] std::uint64_t steps() const noexcept { return steps_; }
  /// Which inbox counts the next one, by the order in which they were made.
  [[nodiscard]] std::uint8_t inbox() const noexcept {
    return static_cast<std::uint8_t>(lanes_[lane_].back().number);
  }
  /// Asks the card for the last call of each inbox that it has begun, by that order. Any thread,
  /// while kernels run. Throws `TransportError`, also where the card gives no answer at once.
  [[nodiscard]] std::vector<std::uint64_t> epochs() const { return words_.epochs(group_.rank()); }

  /// Whether any kernel was enqueued.
  [[nodiscard]] bool used() const noexcept { return steps_ > 0; }

  /// Leaves all memory mapped for good: for kernels that never end.
  void abandon() noexcept {
    for (auto& lane : lanes_) {
      for (Inbox& inbox : lane) {
        inbox.mapping->abandon();
      }
    }
    words_.abandon();
  }

  /// Throws `TransportError` after a failure: the group has to be formed anew.
  void check_usable(const char* call) const {
    if (failed()) {
      throw TransportError({.call = call, .rank = group_.rank(), .group = group_.name()},
                           "an earlier call of this group failed; form the group anew");
    }
  }

  /// What the kernels get.
  [[nodiscard]] const cuda::PeerTable& table() const noexcept { return lanes_[lane_].back().table; }

 private:
  struct Inbox {
    std::unique_ptr<PeerMapping> mapping;
    cuda::PeerTable table;
    std::size_t number = 0;  ///< Among all inboxes of the group.
  };

  CudaPeerKernels(ControlPlane& group, int device, const Options& options)
      : group_(group),
        device_(device),
        options_(options),
        stream_(make_stream(device)),
        words_(device) {}

  void agree_to_grow(std::size_t bytes) {
    Intent intent{.place = fmt::format("growth of the inboxes of {}", group_.name()),
                  .sequence = inboxes_,
                  .bytes = bytes};
    if (failed()) {
      intent.failure = "an earlier call of the group failed";
    }
    agree(group_, std::move(intent));
  }
  void require_built(const std::string& refusal) const {
    if (!refusal.empty()) {
      throw TransportError(
          {.call = "PeerMapping::create", .rank = group_.rank(), .group = group_.name()}, refusal);
    }
  }

  /// A further inbox of a lane, or of a new one; why there cannot be one, or "". Collective.
  [[nodiscard]] std::string build(std::size_t lane, std::int64_t flag_line_bytes) {
    if (inboxes_ >= cuda::kMaxInboxes) {
      return fmt::format("a group has room for {} inboxes", cuda::kMaxInboxes);
    }
    Inbox inbox;
    auto& table = inbox.table;
    table.layout = cuda::InboxLayout::make({.ranks = group_.size(),
                                            .flag_line_bytes = flag_line_bytes,
                                            .max_blocks = options_.max_blocks});
    auto outcome = PeerMapping::create(
        group_, device_, static_cast<std::size_t>(table.layout.bytes), options_.route);
    if (!outcome.mapping) {
      return outcome.refusal;
    }
    inbox.mapping = std::move(outcome.mapping);
    for (int r = 0; r < group_.size(); ++r) {
      table.peers[r] = static_cast<std::byte*>(inbox.mapping->peers()[static_cast<std::size_t>(r)]);
    }
    table.rank = group_.rank();
    table.size = group_.size();
    table.block_limit = block_limit_;
    table.max_clusters = options_.max_clusters;
    {
      const DeviceGuard guard(device_);
      const RelaxedCapture relaxed;
      cuda::initialize_inbox(table, stream_.get(), options_.limit, options_.after_epoch,
                             words_.on_card());
      cuda_check(cudaStreamSynchronize(stream_.get()), "cudaStreamSynchronize");
    }
    group_.barrier();  // no rank stores into an inbox that is not ready
    words_.add(inbox.mapping->peers());
    inbox.number = inboxes_++;
    if (lane == lanes_.size()) {
      lanes_.emplace_back();
    }
    lanes_[lane].push_back(std::move(inbox));
    return {};
  }

  template <class Check>
  [[nodiscard]] static std::string obstacle(const Check& check) {
    try {
      check();
      return {};
    } catch (const UsageError& error) {
      return error.what();
    }
  }

  ControlPlane& group_;
  int device_;
  Options options_;
  UniqueStream stream_;
  GroupWords words_;                       // kernels in the inboxes use it
  std::vector<std::vector<Inbox>> lanes_;  // each with the inboxes that a larger one replaced
  std::size_t lane_ = 0;
  std::size_t inboxes_ = 0;  // of all lanes
  int block_limit_ = 0;
  bool attention_waits_ = false;
  std::uint64_t steps_ = 0;  // enqueued or captured
};

}  // namespace cohort
