// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cohort/collective_arguments.hpp"
#include "cohort/group_base.hpp"
#include "cohort/norm_arguments.hpp"
#include "cohort/residual_norm.hpp"
#include "cohort/tensor.hpp"
#include "cohort/transport.hpp"

/// \file
/// The collectives of a group.

namespace cohort {

/// Collectives of one group. Every call but `send`, `recv` and the queries is collective: all ranks
/// of the group make the same sequence of calls. Calls are enqueued on `stream` and return; one
/// group's calls on different streams are ordered by the library. One thread at a time.
///
/// Tensors may have any strides and lie in any memory of the group's device; those in the group's
/// windows take the fastest path. Returned tensors come from the group's arena and own their
/// memory, in a group of one as well. Dimensions may count from the end. A result may overlap its
/// input only where the call is in place: as the rank's own part, or as the whole of an all-reduce.
/// No two elements of a result may lie in one place (a stride of 0, say).
///
/// Wrong arguments throw `UsageError` naming the argument before anything is enqueued, and the
/// group works on. After `shutdown` every call throws `UsageError`. Failures below surface as
/// `TransportError`, `SymmetryError` and `TimeoutError`, at the call or from `synchronize`.
class GroupCoordinator : public GroupBase {
 public:
  /// Groups are made by `ParallelState::create`.
  explicit GroupCoordinator(GroupParts parts)
      : GroupBase(std::move(parts)), equal_(static_cast<std::size_t>(size())) {}

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
  [[gnu::hot]] void all_reduce_into(const TensorView& out, const ConstTensorView& x,
                                    StreamRef stream = {}, ReduceOp op = ReduceOp::sum) {
    check_call("all_reduce", x);
    check_reducible("all_reduce x", x);
    check_op("all_reduce op", op);
    check_like("all_reduce out", out, x, x.shape());
    check_distinct("all_reduce out", out);
    check_in_place_or_apart("all_reduce out", out, x, [&] { return identical(out, x); });
    const Call call = begin(stream, {TraceCall::all_reduce, x, 0, {}, static_cast<int>(op)});
    issue(call, [&] {
      if (size() == 1) {
        copy_unless_same(x, out, call.stream);
      } else {
        transport()->all_reduce(x, out, op, call.stream);
      }
    });
  }

  /// All-reduces `x` [B, hidden], adds the sum to the residual and norms that, as every layer of a
  /// model does behind a row-parallel product: residual += sum of x; `out` = residual / sqrt(mean
  /// of its squares + epsilon) * weight of each row. The sum is that of `all_reduce`, rounded to
  /// the type of `x`, and so is the new residual; from there on everything is fp32 and rounded
  /// once. The same bits on every rank whose residual and weight are the same. What carries the
  /// call, one launch or an all-reduce and a norm, does not change them but where the all-reduce of
  /// NCCL's ordinary path rounds half types at every hop.
  ///
  /// `out` [B, hidden] is of the type of `x`, f32, f16 or bf16, or of f8_e4m3: then it is that
  /// times the reciprocal of `norm.scale`, in fp32, to the nearest within +-448. All are without
  /// gaps, and what is written, `out` and the residual, overlaps nothing else. With the library's
  /// kernels one launch does it where a rank had better send all its rows; elsewhere an all-reduce
  /// and a kernel behind it do. After a failure of the group the residual and `out` hold anything.
  void all_reduce_rms_norm_into(const TensorView& out, const ConstTensorView& x,
                                const ResidualNorm& norm, StreamRef stream = {}) {
    throw_if_closed();
    const NormArguments arguments{x, norm, out};
    detail::check_norm(caller(), backend().device(), arguments);
    check_normable(x, out.dtype());
    const Call call = begin(stream, made_norm(x, norm, out.dtype()));
    issue(call, [&] { issue_norm(arguments, call); });
  }
  /// The same with a tensor from the group's arena: of f8_e4m3 where there is a scale.
  [[nodiscard]] Tensor all_reduce_rms_norm(const TensorView& x, const ResidualNorm& norm,
                                           StreamRef stream = {}) {
    throw_if_closed();
    const DType dtype = norm.scale ? DType::f8_e4m3 : x.dtype();
    detail::check_residual_norm(caller(), backend().device(), x, norm, dtype);
    check_normable(x, dtype);
    const Call call = begin(stream, made_norm(x, norm, dtype));
    Tensor out = temporary(x.shape(), dtype, call);
    issue(call, [&] { issue_norm({x, norm, out}, call); });
    return out;
  }

  /// Overwrites `x` with the root's, in place. What `x` must be is the same on the root, which only
  /// reads it, so that ranks with tensors of one layout are refused together.
  void broadcast(const TensorView& x, int root, StreamRef stream = {}) {
    check_call("broadcast", x);
    check_member("broadcast root", caller(), root);
    check_distinct("broadcast x", x);
    const Call call = begin(stream, {TraceCall::broadcast, x, 0, {}, root});
    issue(call, [&] {
      if (size() > 1) {
        transport()->broadcast(x, root, call.stream);
      }
    });
  }

  /// Part r of dimension 0 of `x`, of equal extents, goes to rank r; part r of the result came from
  /// rank r.
  [[nodiscard]] Tensor all_to_all(const TensorView& x, StreamRef stream = {}) {
    check_call("all_to_all", x);
    check_divisible("all_to_all x", x, 0, size());
    const Call call = begin(stream, {TraceCall::all_to_all, x, 0, {}, 0});
    Tensor out = temporary(x.shape(), x.dtype(), call);
    issue(call, [&] { issue_all_to_all(out, x, call); });
    return out;
  }
  /// As `all_to_all`, into `out`.
  void all_to_all_into(const TensorView& out, const ConstTensorView& x, StreamRef stream = {}) {
    check_call("all_to_all", x);
    check_divisible("all_to_all x", x, 0, size());
    check_like("all_to_all out", out, x, x.shape());
    check_distinct("all_to_all out", out);
    check_apart("all_to_all out", out, x);
    const Call call = begin(stream, {TraceCall::all_to_all, x, 0, {}, 0});
    issue(call, [&] { issue_all_to_all(out, x, call); });
  }

  /// Sends to a rank of the group, which makes one `recv` of the same shape and dtype. Not
  /// collective; messages of a pair keep their order.
  void send(const ConstTensorView& x, int to, StreamRef stream = {}) {
    check_call("send", x);
    check_peer("send to", caller(), to);
    const Call call = begin(stream, {TraceCall::send, x, 0, {}, to});
    issue(call, [&] { transport()->send(x, to, call.stream); });
  }
  /// Fills `x` with what rank `from` sends by `send`, of the same shape and dtype. On the host
  /// another size or dtype is a `SymmetryError`, with debug checks another shape as well.
  void recv(const TensorView& x, int from, StreamRef stream = {}) {
    check_call("recv", x);
    check_peer("recv from", caller(), from);
    check_distinct("recv x", x);
    const Call call = begin(stream, {TraceCall::recv, x, 0, {}, from});
    issue(call, [&] { transport()->recv(x, from, call.stream); });
  }

  /// Work that `stream` gets after this runs once every rank's stream has come here.
  void barrier(StreamRef stream = {}) {
    throw_if_closed();
    const Call call = begin(stream, Made(TraceCall::barrier));
    issue(call, [&] {
      if (size() > 1) {
        transport()->barrier(call.stream);
      }
    });
  }

  /// The path that a call with these arguments takes, such as "direct" or "nccl symmetric".
  [[nodiscard]] std::string path(Collective collective, const ConstTensorView& x,
                                 const TensorView& out, int dim = 0) const {
    throw_if_closed();
    check_collective("path collective", collective);
    return size() == 1 ? "single rank" : transport()->path(collective, x, out, dim);
  }

 protected:
  // Dimensions count from the front.

  /// Enqueues a checked all-gather.
  void issue_gather(const TensorView& out, const ConstTensorView& x,
                    std::span<const std::int64_t> sizes, int dim, const Call& call) {
    if (size() == 1) {
      copy_unless_same(x, out, call.stream);
    } else {
      transport()->all_gather(x, out, dim, sizes, call.stream);
    }
  }

  /// Enqueues a checked reduce-scatter.
  void issue_scatter(const TensorView& out, const ConstTensorView& x,
                     std::span<const std::int64_t> sizes, int dim, ReduceOp op, const Call& call) {
    if (size() == 1) {
      copy_unless_same(x, out, call.stream);
    } else {
      transport()->reduce_scatter(x, out, dim, sizes, op, call.stream);
    }
  }

  /// Enqueues a checked all-to-all.
  void issue_all_to_all(const TensorView& out, const ConstTensorView& x, const Call& call) {
    if (size() == 1) {
      copy_unless_same(x, out, call.stream);
    } else {
      transport()->all_to_all(x, out, call.stream);
    }
  }

  /// One extent for each rank, valid until the next call.
  [[nodiscard]] std::span<const std::int64_t> equal(std::int64_t extent) noexcept {
    std::fill(equal_.begin(), equal_.end(), extent);
    return equal_;
  }

 private:
  /// Throws `UsageError` where the backend cannot norm such rows by any path.
  void check_normable(const ConstTensorView& x, DType out) const {
    if (const auto obstacle = backend().ops().norm_obstacle(x, out); !obstacle.empty()) {
      throw UsageError("all_reduce_rms_norm " + obstacle);
    }
  }
  [[nodiscard]] static Made made_norm(const ConstTensorView& x, const ResidualNorm& norm,
                                      DType out) {
    return {TraceCall::all_reduce_rms_norm, x, 0, {}, static_cast<int>(out), {}, norm.epsilon};
  }
  /// Enqueues a checked one.
  void issue_norm(const NormArguments& arguments, const Call& call) {
    TensorOps& ops = backend().ops();
    if (size() == 1) {
      ops.rms_norm(arguments, call.stream);
      return;
    }
    if (transport()->all_reduce_rms_norm(arguments, call.stream)) {
      return;
    }
    NormArguments summed = arguments;
    Tensor sum;
    TensorView to = arguments.out;
    if (to.dtype() != arguments.x.dtype()) {
      sum = temporary(arguments.x.shape(), arguments.x.dtype(), call);
      to = sum;
    }
    transport()->agree_also(arguments.form());
    transport()->all_reduce(arguments.x, to, ReduceOp::sum, call.stream);
    summed.x = to;
    ops.rms_norm(summed, call.stream);
  }

  // What messages call the dimensions.
  static constexpr std::string_view kGatherDim = "all_gather x dim";
  static constexpr std::string_view kScatterDim = "reduce_scatter x dim";

  template <class Void>
  std::span<const std::int64_t> divided(std::string_view argument, const BasicTensorView<Void>& x,
                                        int dim) {
    const std::int64_t share = x.shape()[dim] / size();
    if (share * size() != x.shape()[dim]) [[unlikely]] {
      check_divisible(argument, x, dim, size());
    }
    return equal(share);
  }

  Tensor gather(const TensorView& x, std::span<const std::int64_t> sizes, int dim,
                StreamRef stream) {
    check_call("all_gather x", x);
    const Dims shape = gathered_shape(x, caller(), sizes, dim);
    const Call call = begin(stream, {TraceCall::all_gather, x, dim, sizes, 0});
    Tensor out = temporary(shape, x.dtype(), call);
    issue(call, [&] { issue_gather(out, x, sizes, dim, call); });
    return out;
  }

  [[gnu::hot]] void gather_into(const TensorView& out, const ConstTensorView& x,
                                std::span<const std::int64_t> sizes, int dim, StreamRef stream) {
    check_call("all_gather x", x);
    check_like("all_gather out", out, x, gathered_shape(x, caller(), sizes, dim));
    check_distinct("all_gather out", out);
    check_in_place_or_apart("all_gather out", out, x, [&] {
      return identical(out.slice(dim, offset_of(caller(), sizes), x.shape()[dim]), x);
    });
    const Call call = begin(stream, {TraceCall::all_gather, x, dim, sizes, 0});
    issue(call, [&] { issue_gather(out, x, sizes, dim, call); });
  }

  Tensor scatter(const TensorView& x, std::span<const std::int64_t> sizes, int dim, ReduceOp op,
                 StreamRef stream) {
    check_call("reduce_scatter x", x);
    check_reducible("reduce_scatter x", x);
    check_op("reduce_scatter op", op);
    const Dims shape = scattered_shape(x, caller(), sizes, dim);
    const Call call =
        begin(stream, {TraceCall::reduce_scatter, x, dim, sizes, static_cast<int>(op)});
    // Blocks are of one size on every rank, or offsets would no longer agree.
    Dims widest = shape;
    widest[dim] = *std::max_element(sizes.begin(), sizes.end());
    Tensor out = temporary(widest, x.dtype(), call);
    out.shrink_to(shape);
    issue(call, [&] { issue_scatter(out, x, sizes, dim, op, call); });
    return out;
  }

  [[gnu::hot]] void scatter_into(const TensorView& out, const ConstTensorView& x,
                                 std::span<const std::int64_t> sizes, int dim, ReduceOp op,
                                 StreamRef stream) {
    check_call("reduce_scatter x", x);
    check_reducible("reduce_scatter x", x);
    check_op("reduce_scatter op", op);
    const Dims shape = scattered_shape(x, caller(), sizes, dim);
    check_like("reduce_scatter out", out, x, shape);
    check_distinct("reduce_scatter out", out);
    check_in_place_or_apart("reduce_scatter out", out, x, [&] {
      return identical(x.slice(dim, offset_of(caller(), sizes), shape[dim]), out);
    });
    const Call call =
        begin(stream, {TraceCall::reduce_scatter, x, dim, sizes, static_cast<int>(op)});
    issue(call, [&] { issue_scatter(out, x, sizes, dim, op, call); });
  }

  std::vector<std::int64_t> equal_;  // one extent for each rank, refilled by each call
};

}  // namespace cohort
