// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cohort/agreement.hpp"
#include "cohort/collective_arguments.hpp"
#include "cohort/control_plane.hpp"
#include "cohort/error.hpp"
#include "cohort/joined.hpp"
#include "cohort/stream_order.hpp"
#include "cohort/symmetric_arena.hpp"
#include "cohort/symmetric_policy.hpp"
#include "cohort/symmetric_scope.hpp"
#include "cohort/tensor.hpp"
#include "cohort/topology.hpp"
#include "cohort/transport.hpp"

/// \file
/// A group of ranks with its control plane, transport, symmetric memory and collectives.

namespace cohort {

/// What a group is made of. `ParallelState` fills it.
struct GroupParts {
  GroupKind kind = GroupKind::world;      ///< What the group is for.
  std::string name;                       ///< Such as "dcp[1]".
  std::vector<int> ranks;                 ///< World ranks, by rank in the group.
  std::unique_ptr<ControlPlane> control;  ///< Of this group.
  std::shared_ptr<Backend> backend;       ///< Shared by all groups.
  std::unique_ptr<Transport> transport;   ///< Null in a group of one.
  SymmetricDecision decision;             ///< Whether it has windows and peer mappings, and why.
  bool debug_checks = false;              ///< Compare each call's arguments across the ranks.
  /// Of the group's own arena.
  ArenaOptions arena = {};
};

/// Collectives of one group. Every call but `send`, `recv` and the queries is collective: all ranks
/// of the group make the same sequence of calls. Calls are enqueued on `stream` and return; one
/// group's calls on different streams are ordered by the library. One thread at a time.
///
/// Tensors may have any strides and lie in any memory of the group's device; those in the group's
/// windows take the fastest path. Returned tensors come from the group's arena and own their
/// memory, in a group of one as well. Dimensions may count from the end. A result may overlap its
/// input only where the call is in place: as the rank's own part, or as the whole of an all-reduce.
///
/// Wrong arguments throw `UsageError` naming the argument before anything is enqueued, and the
/// group works on. After `shutdown` every call throws `UsageError`. Failures below surface as
/// `TransportError`, `SymmetryError` and `TimeoutError`, at the call or from `synchronize`.
class GroupCoordinator {
 public:
  /// Groups are made by `ParallelState::create`.
  explicit GroupCoordinator(GroupParts parts)
      : parts_(std::move(parts)),
        rank_(parts_.control->rank()),
        size_(parts_.control->size()),
        equal_(static_cast<std::size_t>(size_)),
        lifeline_(std::make_shared<Lifeline>("group " + parts_.name)) {
    lanes_.emplace_back("group " + parts_.name);
    arena_ = SymmetricArena::create(*parts_.backend, parts_.name, audience(), parts_.arena);
  }
  GroupCoordinator(const GroupCoordinator&) = delete;
  GroupCoordinator& operator=(const GroupCoordinator&) = delete;
  virtual ~GroupCoordinator() { close(); }

  /// What the group is for.
  [[nodiscard]] GroupKind kind() const noexcept { return parts_.kind; }
  /// Such as "dcp[0]".
  [[nodiscard]] const std::string& name() const noexcept { return parts_.name; }
  /// This rank in the group.
  [[nodiscard]] int rank() const noexcept { return rank_; }
  /// Ranks of the group.
  [[nodiscard]] int size() const noexcept { return size_; }
  /// World ranks, by rank in the group.
  [[nodiscard]] const std::vector<int>& ranks() const noexcept { return parts_.ranks; }
  /// What the policy decided for the group, and why.
  [[nodiscard]] const SymmetricDecision& decision() const noexcept { return parts_.decision; }
  /// The group's control plane.
  [[nodiscard]] ControlPlane& control() const noexcept { return *parts_.control; }
  /// Where its tensors lie.
  [[nodiscard]] Backend& backend() const noexcept { return *parts_.backend; }
  /// Where returned tensors and temporaries come from; without windows where the policy says no.
  [[nodiscard]] const std::shared_ptr<SymmetricArena>& arena() const noexcept { return arena_; }
  /// How scopes see the group: its arena, or ordinary memory where it has no windows.
  operator ScopeTarget() const noexcept {  // NOLINT(google-explicit-constructor)
    return {parts_.decision.nccl_windows.on ? arena_.get() : nullptr, parts_.backend.get()};
  }
  /// The group alone; nobody where it has no windows.
  [[nodiscard]] Audience audience() const {
    throw_if_closed();
    return parts_.decision.nccl_windows.on
               ? Audience{parts_.control.get(), {parts_.transport.get()}}
               : Audience{};
  }

  /// Collective. Makes room for a block of `bytes` in the group's arena.
  void reserve(std::size_t bytes) {
    throw_if_closed();
    arena_->reserve(bytes);
  }
  /// Collective. Makes room for these calls, so that none of them grows or fails in a frozen arena:
  /// results that live at once, eagerly and in one graph or the graphs of one pool besides, and the
  /// scratch of layouts that have to be packed. What a pass over the list returned is released
  /// before the next. Throws `UsageError` for a shape that cannot be, and as `reserve`.
  void reserve_for_calls(std::span<const CollectiveShape> calls) {
    throw_if_closed();
    reserve_room(room_of(calls, size_));
  }
  /// Local, by every rank at the same point: the arena never grows again.
  void freeze() {
    throw_if_closed();
    arena_->freeze();
  }

  /// Concatenates every rank's `x` along `dim`, in rank order.
  [[nodiscard]] Tensor all_gather(const TensorView& x, int dim, StreamRef stream = {}) {
    const int d = normalize_dim(dim, x.ndim(), kGatherDim);
    return gather(x, equal(x.shape()[d]), d, stream);
  }
  /// `out` has the shape of `x` with the extent of `dim` times the group's size.
  void all_gather_into(const TensorView& out, const ConstTensorView& x, int dim,
                       StreamRef stream = {}) {
    const int d = normalize_dim(dim, x.ndim(), kGatherDim);
    gather_into(out, x, equal(x.shape()[d]), d, stream);
  }
  /// Like `all_gather` with `sizes[r]` extents from rank r; `x` has this rank's.
  [[nodiscard]] Tensor all_gatherv(const TensorView& x, std::span<const std::int64_t> sizes,
                                   int dim, StreamRef stream = {}) {
    return gather(x, sizes, normalize_dim(dim, x.ndim(), kGatherDim), stream);
  }
  /// As `all_gatherv`, into `out`.
  void all_gatherv_into(const TensorView& out, const ConstTensorView& x,
                        std::span<const std::int64_t> sizes, int dim, StreamRef stream = {}) {
    gather_into(out, x, sizes, normalize_dim(dim, x.ndim(), kGatherDim), stream);
  }

  /// Reduces over the ranks and gives this rank its part of dimension `dim`, whose extent the
  /// group's size must divide.
  [[nodiscard]] Tensor reduce_scatter_along_dim(const TensorView& x, int dim, StreamRef stream = {},
                                                ReduceOp op = ReduceOp::sum) {
    const int d = normalize_dim(dim, x.ndim(), kScatterDim);
    return scatter(x, divided("reduce_scatter x", x, d), d, op, stream);
  }
  /// As `reduce_scatter_along_dim`, into `out`.
  void reduce_scatter_into(const TensorView& out, const ConstTensorView& x, int dim,
                           StreamRef stream = {}, ReduceOp op = ReduceOp::sum) {
    const int d = normalize_dim(dim, x.ndim(), kScatterDim);
    scatter_into(out, x, divided("reduce_scatter x", x, d), d, op, stream);
  }
  /// Like `reduce_scatter_along_dim` with `sizes[r]` extents for rank r.
  [[nodiscard]] Tensor reduce_scatterv(const TensorView& x, std::span<const std::int64_t> sizes,
                                       int dim, StreamRef stream = {},
                                       ReduceOp op = ReduceOp::sum) {
    return scatter(x, sizes, normalize_dim(dim, x.ndim(), kScatterDim), op, stream);
  }
  /// As `reduce_scatterv`, into `out`.
  void reduce_scatterv_into(const TensorView& out, const ConstTensorView& x,
                            std::span<const std::int64_t> sizes, int dim, StreamRef stream = {},
                            ReduceOp op = ReduceOp::sum) {
    scatter_into(out, x, sizes, normalize_dim(dim, x.ndim(), kScatterDim), op, stream);
  }

  /// Reduces `x` over the ranks, in place; the same bits on every rank.
  void all_reduce(const TensorView& x, StreamRef stream = {}, ReduceOp op = ReduceOp::sum) {
    all_reduce_into(x, x, stream, op);
  }
  /// `out` has the shape of `x` and may be `x`.
  void all_reduce_into(const TensorView& out, const ConstTensorView& x, StreamRef stream = {},
                       ReduceOp op = ReduceOp::sum) {
    check_call("all_reduce", x);
    check_reducible("all_reduce x", x);
    check_like("all_reduce out", out, x, x.shape());
    check_in_place_or_apart("all_reduce out", out, x, ConstTensorView(out), x);
    const Call call = begin(stream);
    debug_compare("all_reduce", x, 0, {}, static_cast<int>(op), &out);
    if (size_ == 1) {
      copy_unless_same(x, out, call.stream);
    } else {
      parts_.transport->all_reduce(x, out, op, call.stream);
    }
    finish(call);
  }

  /// Overwrites `x` with the root's, in place.
  void broadcast(const TensorView& x, int root, StreamRef stream = {}) {
    check_call("broadcast", x);
    check_rank("broadcast root", root);
    const Call call = begin(stream);
    debug_compare("broadcast", x, 0, {}, root, &x);
    if (size_ > 1) {
      parts_.transport->broadcast(x, root, call.stream);
    }
    finish(call);
  }

  /// Part r of dimension 0 of `x`, of equal extents, goes to rank r; part r of the result came from
  /// rank r.
  [[nodiscard]] Tensor all_to_all(const TensorView& x, StreamRef stream = {}) {
    check_call("all_to_all", x);
    check_divisible("all_to_all x", x, 0, size_);
    const Call call = begin(stream);
    debug_compare("all_to_all", x, 0, {}, 0, nullptr);
    Tensor out = temporary(x.shape(), x.dtype(), call);
    issue_all_to_all(out, x, call);
    finish(call);
    return out;
  }
  /// As `all_to_all`, into `out`.
  void all_to_all_into(const TensorView& out, const ConstTensorView& x, StreamRef stream = {}) {
    check_call("all_to_all", x);
    check_divisible("all_to_all x", x, 0, size_);
    check_like("all_to_all out", out, x, x.shape());
    check_apart("all_to_all out", out, x);
    const Call call = begin(stream);
    debug_compare("all_to_all", x, 0, {}, 0, &out);
    issue_all_to_all(out, x, call);
    finish(call);
  }

  /// Sends to a rank of the group, which makes one `recv` of the same shape and dtype. Not
  /// collective; messages of a pair keep their order.
  void send(const ConstTensorView& x, int to, StreamRef stream = {}) {
    check_call("send", x);
    check_peer("send to", to);
    const Call call = begin(stream);
    parts_.transport->send(x, to, call.stream);
    finish(call);
  }
  /// Fills `x` with what rank `from` sends by `send`, of the same shape and dtype.
  void recv(const TensorView& x, int from, StreamRef stream = {}) {
    check_call("recv", x);
    check_peer("recv from", from);
    const Call call = begin(stream);
    parts_.transport->recv(x, from, call.stream);
    finish(call);
  }

  /// Work that `stream` gets after this runs once every rank's stream has come here.
  void barrier(StreamRef stream = {}) {
    throw_if_closed();
    const Call call = begin(stream);
    debug_agree("barrier");
    if (size_ > 1) {
      parts_.transport->barrier(call.stream);
    }
    finish(call);
  }

  /// Waits until the stream is idle, watching the peers as well. Throws `TimeoutError` naming the
  /// missing ranks, `TransportError` where a peer failed.
  void synchronize(StreamRef stream, std::chrono::milliseconds limit) {
    throw_if_closed();
    if (parts_.transport != nullptr) {
      parts_.transport->synchronize(stream, limit);
    } else if (stream.valid()) {
      stream.synchronize(limit);
    }
  }

  /// Whether a call of the group is known to have failed, without asking the device: one load, for
  /// engines that wait for their streams by CUDA's own means. `synchronize` says what happened.
  [[nodiscard]] bool failed() const noexcept {
    return parts_.transport != nullptr && parts_.transport->failed();
  }

  /// Collective. At least so many lanes, for work that goes on side by side, such as micro-batches:
  /// the library orders calls of one lane, and lets those of different lanes overlap where its own
  /// kernels carry them. Not within a capture.
  void reserve_lanes(int lanes) {
    throw_if_closed();
    if (lanes < 1) {
      throw UsageError(fmt::format("reserve_lanes: expected at least 1, got {}", lanes));
    }
    if (parts_.transport != nullptr) {
      parts_.transport->reserve_lanes(lanes);
    }
    while (lanes_.size() < static_cast<std::size_t>(lanes)) {
      lanes_.emplace_back("group " + parts_.name);
    }
  }
  /// The lane of the calls that follow, equal on all ranks for each of them. Lane 0 at first.
  void use_lane(int lane) {
    throw_if_closed();
    if (lane < 0 || static_cast<std::size_t>(lane) >= lanes_.size()) {
      throw UsageError(fmt::format("use_lane: expected one of the {} reserved lanes, got {}",
                                   lanes_.size(), lane));
    }
    lane_ = static_cast<std::size_t>(lane);
    if (parts_.transport != nullptr) {
      parts_.transport->select_lane(lane);
    }
  }
  /// Most thread blocks of the own kernels in the calls that follow, so that other work keeps the
  /// rest of the device; 0 for the backend's budget. Equal on all ranks for each call.
  void limit_blocks(int blocks) {
    throw_if_closed();
    if (blocks < 0) {
      throw UsageError(fmt::format("limit_blocks: expected at least 0, got {}", blocks));
    }
    if (parts_.transport != nullptr) {
      parts_.transport->limit_blocks(blocks);
    }
  }

  /// Work that `stream` gets after this runs after the group's calls so far, and the group's later
  /// calls after what `stream` gets before them or before `launched`. Every call does it by itself;
  /// an engine does it before it launches a graph with calls of the group. Calls of one capture are
  /// ordered among themselves: their place among eager calls is where the graph is launched.
  void order(StreamRef stream) {
    throw_if_closed();
    for (StreamOrder& lane : lanes_) {  // a graph may hold calls of any
      static_cast<void>(lane.before(stream));
    }
    arena_->order_launch(stream);
  }
  /// Right behind a launch that `order` preceded, so that later calls on other streams wait for it
  /// and for nothing that `stream` gets afterwards.
  void launched(StreamRef stream) {
    throw_if_closed();
    if (stream.valid()) {
      for (StreamOrder& lane : lanes_) {
        lane.after({stream, stream.capture_id()});
      }
    }
  }

  /// The path that a call with these arguments takes, such as "direct" or "nccl symmetric".
  [[nodiscard]] std::string path(Collective collective, const ConstTensorView& x,
                                 const TensorView& out, int dim = 0) const {
    throw_if_closed();
    return size_ == 1 ? "single rank" : parts_.transport->path(collective, x, out, dim);
  }

  /// How long teardown waits for calls that may still come to their end.
  static constexpr std::chrono::milliseconds kTeardownPatience{5'000};

  /// Local, before teardown: waits so long for the group's calls to come to their end, and then
  /// tells those that wait for ranks to end. No call may follow.
  void settle(std::chrono::milliseconds patience) noexcept {
    if (parts_.transport != nullptr) {
      parts_.transport->settle(patience);
    }
  }

  /// Collective. Deregisters the windows and disconnects; tensors of the group stay readable. Every
  /// later call throws `UsageError`, but a second shutdown does nothing. What the wait for the
  /// other ranks throws comes after all is closed. `ParallelState` does it for all its groups at
  /// once.
  void shutdown() {
    if (closed_) {
      return;
    }
    try {
      parts_.control->barrier();  // no rank may still be reading what goes away
    } catch (...) {
      close();
      throw;
    }
    close();
  }

  /// Local: `shutdown` once the ranks have waited for each other, or where they no longer can.
  void close() noexcept {
    closed_ = true;
    lifeline_->end();
    settle(kTeardownPatience);  // before memory goes away that its calls may use
    if (arena_ != nullptr) {
      arena_->close();
    }
    parts_.transport.reset();
  }

 protected:
  /// Null in a group of one.
  [[nodiscard]] Transport* transport() const noexcept { return parts_.transport.get(); }

  /// Throws `UsageError` after `shutdown`.
  void throw_if_closed() const {
    if (closed_) {
      throw UsageError(fmt::format("group {}: used after shutdown", parts_.name));
    }
  }

  /// Makes room for steps like this one.
  void reserve_room(const StepRoom& room) {
    reserve(room.bytes());
    if (parts_.transport != nullptr) {
      parts_.transport->reserve_scratch(room.scratch);
    }
  }

  // The steps of each call: check the arguments, `begin`, compare them across the ranks, allocate,
  // issue, `finish`.

  /// A call's place in the order of the group's calls.
  using Call = StreamOrder::Call;

  /// The group is up, and `x` lies on its device.
  template <class Void>
  void check_call(std::string_view call, const BasicTensorView<Void>& x) const {
    throw_if_closed();
    check_device(call, x);
  }

  /// The group's earlier calls come first. Whatever was wrong with the arguments has been found.
  [[nodiscard]] Call begin(StreamRef stream) {
    const Call call = lanes_[lane_].before(stream);
    if (call.capture != 0) {
      // Not each piece of work: local arithmetic belongs to the backend, which outlives the group.
      call.stream.check_at_launch(lifeline_);
    }
    return call;
  }
  /// All of the call has been enqueued.
  void finish(const Call& call) { lanes_[lane_].after(call); }

  /// For errors of arguments.
  [[nodiscard]] Caller caller() const noexcept { return {parts_.name, rank_, size_}; }

  /// Memory of a call, from the group's arena.
  [[nodiscard]] Tensor temporary(const Dims& shape, DType dtype, const Call& call) {
    return arena_->empty(shape, dtype, call.stream, call.capture);
  }

  // Dimensions count from the front.

  /// Enqueues a checked all-gather.
  void issue_gather(const TensorView& out, const ConstTensorView& x,
                    std::span<const std::int64_t> sizes, int dim, const Call& call) {
    if (size_ == 1) {
      copy_unless_same(x, out, call.stream);
    } else {
      parts_.transport->all_gather(x, out, dim, sizes, call.stream);
    }
  }

  /// Enqueues a checked reduce-scatter.
  void issue_scatter(const TensorView& out, const ConstTensorView& x,
                     std::span<const std::int64_t> sizes, int dim, ReduceOp op, const Call& call) {
    if (size_ == 1) {
      copy_unless_same(x, out, call.stream);
    } else {
      parts_.transport->reduce_scatter(x, out, dim, sizes, op, call.stream);
    }
  }

  /// Enqueues a checked all-to-all.
  void issue_all_to_all(const TensorView& out, const ConstTensorView& x, const Call& call) {
    if (size_ == 1) {
      copy_unless_same(x, out, call.stream);
    } else {
      parts_.transport->all_to_all(x, out, call.stream);
    }
  }

  /// One extent for each rank, valid until the next call.
  [[nodiscard]] std::span<const std::int64_t> equal(std::int64_t extent) noexcept {
    std::fill(equal_.begin(), equal_.end(), extent);
    return equal_;
  }

  /// Throws `UsageError` for a tensor of another device.
  template <class Void>
  void check_device(std::string_view argument, const BasicTensorView<Void>& x) const {
    if (x.device() != parts_.backend->device()) {
      throw UsageError(fmt::format("{}: group {} works on {}, got a tensor on {}", argument,
                                   parts_.name, to_string(parts_.backend->device()),
                                   to_string(x.device())));
    }
  }

  /// Throws `UsageError` unless it is a rank of the group.
  void check_rank(std::string_view argument, int rank) const {
    if (rank < 0 || rank >= size_) {
      throw UsageError(fmt::format("{}: expected a rank in [0, {}) of group {}, got {}", argument,
                                   size_, parts_.name, rank));
    }
  }

  /// Throws unless `x` has the dtype and device of `like` and the given shape.
  template <class A, class B>
  void check_like(std::string_view argument, const BasicTensorView<A>& x,
                  const BasicTensorView<B>& like, const Dims& shape) const {
    check_device(argument, x);
    if (x.dtype() != like.dtype() || x.shape() != shape) {
      throw UsageError(fmt::format("{}: expected {}{}, got {}{}", argument, to_string(like.dtype()),
                                   to_string(shape), to_string(x.dtype()), to_string(x.shape())));
    }
  }

  /// Copies, unless both are the same memory.
  void copy_unless_same(const ConstTensorView& from, const TensorView& to, StreamRef stream) {
    if (from.data() != to.data() || from.strides() != to.strides()) {
      parts_.backend->ops().copy(from, to, stream);
    }
  }

  /// The opt-in comparison of a call's arguments across the ranks, before anything is allocated for
  /// it. `extra` is the op, root or base; `out` is null where it will be allocated.
  void debug_compare(std::string_view call, const ConstTensorView& x, int dim,
                     std::span<const std::int64_t> sizes, int extra, const TensorView* out) {
    if (!parts_.debug_checks || size_ == 1) {
      return;
    }
    // Extents along `dim` differ between ranks in the v-variants; their list does not.
    Dims shape = x.shape();
    if (!sizes.empty()) {
      shape[dim] = 0;
    }
    debug_agree(fmt::format("{} of {}{} dim {} sizes [{}] variant {}{}", call, to_string(x.dtype()),
                            to_string(shape), dim, detail::joined(sizes, ","), extra,
                            places(x, out)));
  }
  /// With debug checks, compares the call with those of the other ranks.
  void debug_agree(std::string_view call) {
    if (!parts_.debug_checks || size_ == 1) {
      return;
    }
    agree(*parts_.control, {.place = fmt::format("{} in group {}", call, parts_.name),
                            .sequence = debug_sequence_++,
                            .history = arena_->history_to_agree_on()});
  }

 private:
  // What messages call the dimensions.
  static constexpr std::string_view kGatherDim = "all_gather x dim";
  static constexpr std::string_view kScatterDim = "reduce_scatter x dim";

  void check_peer(std::string_view argument, int peer) const {
    check_rank(argument, peer);
    if (peer == rank_) {
      throw UsageError(fmt::format("{}: rank {} of group {} cannot be its own peer", argument, peer,
                                   parts_.name));
    }
  }

  template <class Void>
  std::span<const std::int64_t> divided(std::string_view argument, const BasicTensorView<Void>& x,
                                        int dim) {
    check_divisible(argument, x, dim, size_);
    return equal(x.shape()[dim] / size_);
  }

  Tensor gather(const TensorView& x, std::span<const std::int64_t> sizes, int dim,
                StreamRef stream) {
    check_call("all_gather x", x);
    const Dims shape = gathered_shape(x, caller(), sizes, dim);
    const Call call = begin(stream);
    debug_compare("all_gather", x, dim, sizes, 0, nullptr);
    Tensor out = temporary(shape, x.dtype(), call);
    issue_gather(out, x, sizes, dim, call);
    finish(call);
    return out;
  }

  void gather_into(const TensorView& out, const ConstTensorView& x,
                   std::span<const std::int64_t> sizes, int dim, StreamRef stream) {
    check_call("all_gather x", x);
    check_like("all_gather out", out, x, gathered_shape(x, caller(), sizes, dim));
    const ConstTensorView mine = out.slice(dim, offset_of(caller(), sizes), x.shape()[dim]);
    check_in_place_or_apart("all_gather out", out, x, mine, x);
    const Call call = begin(stream);
    debug_compare("all_gather", x, dim, sizes, 0, &out);
    issue_gather(out, x, sizes, dim, call);
    finish(call);
  }

  Tensor scatter(const TensorView& x, std::span<const std::int64_t> sizes, int dim, ReduceOp op,
                 StreamRef stream) {
    check_call("reduce_scatter x", x);
    check_reducible("reduce_scatter x", x);
    const Dims shape = scattered_shape(x, caller(), sizes, dim);
    const Call call = begin(stream);
    debug_compare("reduce_scatter", x, dim, sizes, static_cast<int>(op), nullptr);
    // Blocks are of one size on every rank, or offsets would no longer agree.
    Dims widest = shape;
    widest[dim] = *std::max_element(sizes.begin(), sizes.end());
    Tensor out = temporary(widest, x.dtype(), call);
    out.shrink_to(shape);
    issue_scatter(out, x, sizes, dim, op, call);
    finish(call);
    return out;
  }

  void scatter_into(const TensorView& out, const ConstTensorView& x,
                    std::span<const std::int64_t> sizes, int dim, ReduceOp op, StreamRef stream) {
    check_call("reduce_scatter x", x);
    check_reducible("reduce_scatter x", x);
    const Dims shape = scattered_shape(x, caller(), sizes, dim);
    check_like("reduce_scatter out", out, x, shape);
    const ConstTensorView mine = x.slice(dim, offset_of(caller(), sizes), shape[dim]);
    check_in_place_or_apart("reduce_scatter out", out, x, mine, ConstTensorView(out));
    const Call call = begin(stream);
    debug_compare("reduce_scatter", x, dim, sizes, static_cast<int>(op), &out);
    issue_scatter(out, x, sizes, dim, op, call);
    finish(call);
  }

  /// Where the tensors lie, for the comparison; nothing where ranks may differ in that.
  [[nodiscard]] std::string places(const ConstTensorView& x, const TensorView* out) const {
    if (parts_.transport == nullptr || !parts_.transport->needs_equal_offsets()) {
      return {};
    }
    std::string text = fmt::format(", input at {}", window_offset(x.data()));
    if (out != nullptr) {
      text += fmt::format(", output at {}", window_offset(out->data()));
    }
    return text;
  }

  [[nodiscard]] std::string window_offset(const void* address) const {
    const auto offset = arena_->offset_of(address);
    return offset ? fmt::format("offset {}", *offset) : "no offset";
  }

  GroupParts parts_;
  int rank_;
  int size_;
  std::vector<std::int64_t> equal_;     // one extent for each rank, refilled by each call
  std::shared_ptr<Lifeline> lifeline_;  // kept by graphs with calls of the group
  std::shared_ptr<SymmetricArena> arena_;
  std::vector<StreamOrder> lanes_;  // each with an order of its own
  std::size_t lane_ = 0;
  std::uint64_t debug_sequence_ = 0;
  bool closed_ = false;
};

}  // namespace cohort
