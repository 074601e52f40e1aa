// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "cohort/dcp/lse_merge.hpp"
#include "cohort/dcp/packed_piece.hpp"
#include "cohort/group_coordinator.hpp"
#include "cohort/kv_step.hpp"
#include "cohort/merge_plan.hpp"

/// \file
/// The decode-context-parallel group: its ranks share out the tokens of the KV cache. A decode step
/// gathers the query heads, attends to the local tokens, and merges the partial attentions.

namespace cohort {

/// The largest decode step that a group must have room for. H = heads of all DCP ranks.
struct DecodeShape {
  std::int64_t batch = 0;     ///< B: queries of a step
  std::int64_t heads = 0;     ///< H
  std::int64_t latent = 0;    ///< elements of q_nope for each head
  std::int64_t rope = 0;      ///< elements of q_pe for each head
  std::int64_t value = 0;     ///< D: elements of the attention's output for each head
  DType dtype = DType::bf16;  ///< Of partial outputs, and of queries where nothing else is said.
  std::optional<DType> query_dtype = {};  ///< Of q_nope, and of q_pe where nothing else is said.
  std::optional<DType> rope_dtype = {};   ///< Of q_pe.
};

/// In which precision the staged plan corrects and reduces.
enum class StagedPrecision : std::uint8_t {
  f32,      ///< Corrected partials in fp32: the reduction adds fp32 and rounds once.
  partial,  ///< Corrected partials in their own type: half the bytes, rounded before the sum.
};

/// Which plan a merge takes, and why.
struct MergeChoice {
  MergePlan plan = MergePlan::packed;  ///< The plan that was taken.
  std::string reason;                  ///< Why.
};

/// How a group merges.
struct MergeOptions {
  MergePlan plan = MergePlan::automatic;                    ///< Which plan merges take.
  StagedPrecision staged_precision = StagedPrecision::f32;  ///< What `staged` adds up in.
};

/// The ranks that share a KV cache: gathers query heads and merges partial attentions.
class DecodeContextParallelGroup : public GroupCoordinator {
 public:
  /// Throws `ConfigError` where the plan is forced and the group can never run it.
  DecodeContextParallelGroup(GroupParts parts, MergeOptions options)
      : GroupCoordinator(std::move(parts)), merge_(options) {
    if (merge_.plan == MergePlan::one_kernel && size() > 1 && peer_kernels() == nullptr) {
      throw ConfigError(fmt::format("merge plan one_kernel: group {} has no peer mapping ({})",
                                    name(), explain(decision().peer_mapping)));
    }
  }

  /// How this group merges.
  [[nodiscard]] const MergeOptions& merge_options() const noexcept { return merge_; }

  /// Collective. Makes room for decode steps of up to this shape, so that nothing grows or fails
  /// while serving, in a frozen arena as well: steps of `gather_query` and `merge_attention`
  /// eagerly, in the plans that the group can take, and in one graph, or the graphs of one pool,
  /// besides; and the library's inboxes and scratch. What an eager step returned is released before
  /// the next eager step begins, what a captured one returned before the next capture; both live on
  /// through steps of the other kind. Results that live longer, also of `x = group.call(...)` until
  /// the new one is there, need the `_into` forms, with tensors that were allocated before this
  /// call: reservations do not add up, as `GroupCoordinator::reserve` says. Throws `UsageError` for
  /// a shape that cannot be, and as `GroupCoordinator::reserve`.
  void reserve_for(const DecodeShape& shape) {
    throw_if_closed();
    const std::int64_t least =
        std::min({shape.batch, shape.heads, shape.latent, shape.rope, shape.value});
    if (least < 0 || shape.heads % size() != 0 || !is_attention_dtype(shape.dtype)) {
      throw UsageError(fmt::format(
          "reserve_for: expected sizes >= 0, heads that {} ranks divide and f32, f16 or bf16; got "
          "batch {}, heads {}, latent {}, rope {}, value {}, {}",
          size(), shape.batch, shape.heads, shape.latent, shape.rope, shape.value,
          to_string(shape.dtype)));
    }
    for (const auto extent : {shape.latent, shape.rope, shape.value}) {
      static_cast<void>(numel({size(), shape.batch, shape.heads, extent}));  // throws on overflow
    }
    const detail::CallTime time;
    static_cast<void>(numel({shape.batch, shape.heads, query_row_bytes(shape)}));
    reserve_room(room_of_step(shape));
    if (PeerKernels* kernels = peer_kernels()) {
      kernels->reserve(std::max(query_bytes(shape), pieces_bytes(shape)));
    }
  }

  /// Local, in the order of `stream` alone: nothing is sent, and other ranks need not call. Fills
  /// what this rank has of a decode step, its counts and slots, from the sequences' lengths on the
  /// device: one kernel, so that a captured step follows the lengths that each replay finds. With
  /// counts of 0 the attention has nothing to read; see dcp/kv_placement.hpp. Throws `UsageError`
  /// before anything is enqueued for views other than `KvStep` says, results that overlap, and a
  /// placement for another number of ranks.
  void place_step(const dcp::KvShard& shard, const KvStep& step, StreamRef stream = {}) {
    throw_if_closed();
    check_step(caller(), backend().device(), shard, step);
    backend().ops().place_step(step.rows(shard.placement(), rank()), stream);
  }

  /// The queries of all heads on every rank: q [B, H, Dn + Dr] from this rank's q_nope [B, H/n, Dn]
  /// and q_pe [B, H/n, Dr], of any type. Heads come in rank order. Inputs may lie in any memory and
  /// have any strides with the last dimension without gaps. On cards each part's row has a multiple
  /// of 16 bytes, and a rank's parts less than 2 GiB; anything else is a `UsageError`.
  ///
  /// Parts of different types, such as 8-bit floats and their scales, give rows of bytes: q is u8,
  /// and each row holds the bytes of q_nope's and then those of q_pe's. As tensors again, without a
  /// copy: `q.view().slice(2, 0, 576).reinterpret(DType::f8_e4m3)` and
  /// `q.view().slice(2, 576, 16).reinterpret(DType::f32)`.
  [[nodiscard]] Tensor gather_query(const ConstTensorView& q_nope, const ConstTensorView& q_pe,
                                    StreamRef stream = {}) {
    if (q_nope.dtype() != q_pe.dtype()) {
      const QueryBytes bytes(q_nope, q_pe);
      return gather_query(bytes.nope, bytes.pe, stream);
    }
    check_call("gather_query q_nope", q_nope);
    const Dims shape = check_query(q_nope, q_pe);
    const Call call = begin(stream, made_query(q_nope, q_pe));
    Tensor q = temporary(shape, q_nope.dtype(), call);
    issue_query(q, q_nope, q_pe, call);
    finish(call);
    return q;
  }
  /// The same into `q`, of any strides with the last dimension without gaps. Where ranks cannot
  /// address each other, a `q` whose heads come first in memory, [H, B, Dn + Dr] transposed, saves
  /// a copy: what a rank sends then lies in one piece in it.
  void gather_query_into(const TensorView& q, const ConstTensorView& q_nope,
                         const ConstTensorView& q_pe, StreamRef stream = {}) {
    if (q_nope.dtype() != q_pe.dtype()) {
      const QueryBytes bytes(q_nope, q_pe);
      gather_query_into(q, bytes.nope, bytes.pe, stream);
      return;
    }
    check_call("gather_query q_nope", q_nope);
    check_like("gather_query q", q, q_nope, check_query(q_nope, q_pe));
    check_rows("gather_query q", q);
    check_distinct("gather_query q", q);
    check_apart("gather_query q", q, q_nope);
    check_apart("gather_query q", q, q_pe);
    const Call call = begin(stream, made_query(q_nope, q_pe));
    issue_query(q, q_nope, q_pe, call);
    finish(call);
  }

  /// Merges the ranks' partial attentions exactly and scatters the heads: [B, H/n, D] from this
  /// rank's `out` [B, H, D] and `lse` [B, H] in f32, of any strides with D without gaps. Ranks
  /// without tokens have lse = -inf; their `out` is never read. See dcp/lse_merge.hpp. On cards D
  /// is a multiple of 8, at most 1024, and `out` has less than 2 GiB; anything else is a
  /// `UsageError`, on every plan.
  [[nodiscard]] Tensor merge_attention(const ConstTensorView& out, const ConstTensorView& lse,
                                       LseBase base = LseBase::e, StreamRef stream = {}) {
    check_call("merge_attention out", out);
    check_partial(out, lse);
    const Call call = begin(stream, made_merge(out, base));
    Tensor merged = temporary(merged_shape(out), out.dtype(), call);
    issue_merge({out, lse, merged, nullptr, base}, call);
    finish(call);
    return merged;
  }
  /// The same into `merged` [B, H/n, D], of any strides with D without gaps, and, where given,
  /// `merged_lse` [B, H/n] in f32, in the same base. `staged` in the partial's own type writes a
  /// `merged` whose heads come first in memory without a copy. Throws `ConfigError` where the plan
  /// is forced and cannot run with these arguments.
  void merge_attention_into(const TensorView& merged, const ConstTensorView& out,
                            const ConstTensorView& lse, LseBase base = LseBase::e,
                            StreamRef stream = {}, const TensorView* merged_lse = nullptr) {
    check_call("merge_attention out", out);
    check_partial(out, lse);
    check_merged(merged, out, lse, merged_lse);
    const Call call = begin(stream, made_merge(out, base));
    issue_merge({out, lse, merged, merged_lse, base}, call);
    finish(call);
  }

  /// The plan that the last merge took. `automatic` takes the one-kernel merge where the ranks can
  /// address each other, otherwise `packed`, which sends fewer bytes than `staged`.
  [[nodiscard]] MergeChoice last_merge_choice() const { return {last_.plan, reason(last_)}; }

 private:
  [[nodiscard]] static std::int64_t query_row_bytes(const DecodeShape& shape) {
    const DType nope = shape.query_dtype.value_or(shape.dtype);
    return shape.latent * static_cast<std::int64_t>(size_of(nope)) +
           shape.rope * static_cast<std::int64_t>(size_of(shape.rope_dtype.value_or(nope)));
  }
  [[nodiscard]] static std::size_t query_bytes(const DecodeShape& shape) {
    return static_cast<std::size_t>(shape.batch * shape.heads) *
           static_cast<std::size_t>(query_row_bytes(shape));
  }
  /// Bytes of one piece for each rank.
  [[nodiscard]] std::size_t pieces_bytes(const DecodeShape& shape) const {
    return static_cast<std::size_t>(size()) *
           dcp::packed_piece(shape.batch, shape.heads / size(), shape.value, size_of(shape.dtype))
               .bytes;
  }

  /// The blocks of a step, as the calls below allocate them.
  [[nodiscard]] StepRoom room_of_step(const DecodeShape& shape) const {
    const std::int64_t own = shape.heads / size();
    const std::int64_t query = query_row_bytes(shape);
    StepRoom room;
    room.add_block({shape.batch, shape.heads, query}, DType::u8);
    room.add_block({shape.batch, own, shape.value}, shape.dtype);
    if (size() > 1) {
      room.add_block({own, shape.batch, query}, DType::u8);
    }
    const Dims lses{size(), shape.batch, shape.heads};
    if (merge_.plan == MergePlan::staged && size() > 1) {
      const DType dtype = staged_dtype(shape.dtype);
      room.add_block(lses, DType::f32);
      room.add_block({shape.heads, shape.batch, shape.value}, dtype);
      room.add_block({own, shape.batch, shape.value}, dtype);
    } else {
      room.blocks.insert(room.blocks.end(), size() > 1 ? 2 : 1, pieces_bytes(shape));
    }
    const auto packed = [&](std::size_t bytes) {
      return bytes + bytes / static_cast<std::size_t>(size());
    };
    room.scratch = std::max(packed(query_bytes(shape)),
                            packed(static_cast<std::size_t>(numel(lses)) * sizeof(float)));
    return room;
  }

  [[nodiscard]] DType staged_dtype(DType partial) const noexcept {
    return merge_.staged_precision == StagedPrecision::f32 ? DType::f32 : partial;
  }

  [[nodiscard]] PeerKernels* peer_kernels() const noexcept {
    return transport() != nullptr && decision().peer_mapping.on ? transport()->peer_kernels()
                                                                : nullptr;
  }

  /// The plan of a merge, and why. The text is made where someone asks for it, not in each merge.
  struct Chosen {
    enum class Why : std::uint8_t {
      nothing_merged,
      single_rank,
      by_user,
      in_reach,
      no_map,
      obstacle
    };

    MergePlan plan = MergePlan::packed;
    Why why = Why::nothing_merged;
    std::string obstacle;  ///< The kernels' own words, for `obstacle`.
  };

  [[nodiscard]] std::string reason(const Chosen& chosen) const {
    switch (chosen.why) {
      case Chosen::Why::nothing_merged:
        return {};
      case Chosen::Why::single_rank:
        return "single rank: a local copy";
      case Chosen::Why::by_user:
        return "chosen by the user";
      case Chosen::Why::in_reach:
        return "every rank can address every other";
      case Chosen::Why::no_map:
        return fmt::format("no peer mapping: {}", to_string(decision().peer_mapping.reason));
      case Chosen::Why::obstacle:
        return chosen.obstacle;
    }
    return {};
  }

  /// Checks the query's parts, of one type; the shape of the whole.
  [[nodiscard]] Dims check_query(const ConstTensorView& q_nope, const ConstTensorView& q_pe) const {
    check_part("gather_query q_nope", "[B, H/n, Dn]", q_nope);
    check_part("gather_query q_pe", "[B, H/n, Dr]", q_pe);
    check_like("gather_query q_pe", q_pe, q_nope, {q_nope.size(0), q_nope.size(1), q_pe.size(2)});
    refuse("gather_query", backend().ops().query_obstacle(q_nope, q_pe));
    return {q_nope.size(0), q_nope.size(1) * size(), q_nope.size(2) + q_pe.size(2)};
  }
  static void check_part(std::string_view argument, std::string_view shape,
                         const ConstTensorView& part) {
    if (part.ndim() != 3) {
      throw UsageError(
          fmt::format("{}: expected {}, got {}", argument, shape, to_string(part.shape())));
    }
    check_rows(argument, part);
  }
  /// Parts whose types differ, as bytes.
  struct QueryBytes {
    ConstTensorView nope, pe;

    QueryBytes(const ConstTensorView& q_nope, const ConstTensorView& q_pe) {
      check_part("gather_query q_nope", "[B, H/n, Dn]", q_nope);
      check_part("gather_query q_pe", "[B, H/n, Dr]", q_pe);
      check_aligned("gather_query q_nope", q_nope);
      check_aligned("gather_query q_pe", q_pe);
      nope = q_nope.reinterpret(DType::u8);
      pe = q_pe.reinterpret(DType::u8);
    }
  };

  [[nodiscard]] Dims merged_shape(const ConstTensorView& out) const {
    if (out.ndim() != 3 || out.size(1) % size() != 0) {
      throw UsageError(fmt::format(
          "merge_attention out: expected [B, H, D] with heads that {} ranks divide, got "
          "{}",
          size(), to_string(out.shape())));
    }
    return {out.size(0), out.size(1) / size(), out.size(2)};
  }

  template <class Void>
  static void check_rows(std::string_view argument, const BasicTensorView<Void>& x) {
    if (x.size(2) > 1 && x.strides()[2] != 1 && x.numel() > 0) {
      throw UsageError(fmt::format("{}: expected a last dimension without gaps, got strides {}",
                                   argument, to_string(x.strides())));
    }
  }

  void check_lse(std::string_view argument, const ConstTensorView& lse, const Dims& shape) const {
    check_device(argument, lse);
    if (lse.dtype() != DType::f32 || lse.shape() != shape) {
      throw UsageError(fmt::format("{}: expected f32{}, got {}{}", argument, to_string(shape),
                                   to_string(lse.dtype()), to_string(lse.shape())));
    }
  }

  void check_partial(const ConstTensorView& out, const ConstTensorView& lse) const {
    static_cast<void>(merged_shape(out));
    if (!is_attention_dtype(out.dtype())) {
      throw UsageError(fmt::format("merge_attention out: expected f32, f16 or bf16, got {}",
                                   to_string(out.dtype())));
    }
    check_rows("merge_attention out", out);
    check_lse("merge_attention lse", lse, {out.size(0), out.size(1)});
    refuse("merge_attention", backend().ops().merge_obstacle(out, size()));
  }

  /// Throws `UsageError` where the backend cannot take a shape by any plan.
  static void refuse(std::string_view call, const std::string& obstacle) {
    if (!obstacle.empty()) {
      throw UsageError(fmt::format("{} {}", call, obstacle));
    }
  }

  void check_merged(const TensorView& merged, const ConstTensorView& out,
                    const ConstTensorView& lse, const TensorView* merged_lse) const {
    const Dims shape = merged_shape(out);
    check_like("merge_attention merged", merged, out, shape);
    check_rows("merge_attention merged", merged);
    check_distinct("merge_attention merged", merged);
    check_apart("merge_attention merged", merged, out);
    check_apart("merge_attention merged", merged, lse);
    if (merged_lse != nullptr) {
      check_lse("merge_attention merged_lse", *merged_lse, {shape[0], shape[1]});
      check_distinct("merge_attention merged_lse", *merged_lse);
      check_apart("merge_attention merged_lse", *merged_lse, out);
      check_apart("merge_attention merged_lse", *merged_lse, lse);
      check_apart("merge_attention merged_lse", *merged_lse, merged);
    }
  }

  // What ranks compare says nothing of plans and paths, whose messages would not meet either.

  [[nodiscard]] static Made made_query(const ConstTensorView& q_nope, const ConstTensorView& q_pe) {
    return {TraceCall::gather_query, q_nope, 0, {}, static_cast<int>(q_pe.size(2))};
  }
  [[nodiscard]] static Made made_merge(const ConstTensorView& out, LseBase base) {
    return {TraceCall::merge_attention, out, 0, {}, static_cast<int>(base)};
  }

  // From here on the call has begun and its arguments are right.

  void issue_query(const TensorView& q, const ConstTensorView& q_nope, const ConstTensorView& q_pe,
                   const Call& call) {
    if (size() == 1) {
      backend().ops().pack_query(q_nope, q_pe, q, call.stream);
      return;
    }
    if (PeerKernels* kernels = peer_kernels();
        kernels != nullptr && kernels->gather_obstacle(q_nope, q_pe).empty()) {
      kernels->gather_query(q_nope, q_pe, q, call.stream);
      return;
    }
    // Heads first whatever the strides of `q`, which may differ between the ranks: what arrives is
    // then in place where they are heads first as well, and has the same order on every rank.
    const std::int64_t own = q_nope.size(1);
    const Tensor packed = temporary({own, q.size(0), q.size(2)}, q.dtype(), call);
    backend().ops().pack_query(q_nope, q_pe, packed.view().transpose(0, 1), call.stream);
    issue_gather(q.transpose(0, 1), packed, equal(own), 0, call);
  }

  void issue_merge(const MergeArguments& arguments, const Call& call) {
    last_ = choose(arguments);
    switch (last_.plan) {
      case MergePlan::one_kernel:
        peer_kernels()->merge_attention(arguments, call.stream);
        return;
      case MergePlan::staged:
        merge_staged(arguments, call);
        return;
      case MergePlan::packed:
      case MergePlan::automatic:
        merge_packed(arguments, call);
        return;
    }
  }

  [[nodiscard]] Chosen choose(const MergeArguments& arguments) const {
    using Why = Chosen::Why;
    if (size() == 1) {
      return {MergePlan::packed, Why::single_rank, {}};
    }
    if (merge_.plan == MergePlan::staged || merge_.plan == MergePlan::packed) {
      return {merge_.plan, Why::by_user, {}};
    }
    Chosen refused{MergePlan::packed, Why::no_map, {}};
    if (PeerKernels* kernels = peer_kernels()) {
      refused = {MergePlan::packed, Why::obstacle, kernels->merge_obstacle(arguments)};
    }
    const bool can_run = refused.why == Why::obstacle && refused.obstacle.empty();
    if (merge_.plan == MergePlan::one_kernel) {
      if (!can_run) {
        throw ConfigError(fmt::format("merge plan one_kernel: {}", reason(refused)));
      }
      return {MergePlan::one_kernel, Why::by_user, {}};
    }
    return can_run ? Chosen{MergePlan::one_kernel, Why::in_reach, {}} : refused;
  }

  void merge_packed(const MergeArguments& arguments, const Call& call) {
    const auto& out = arguments.out;
    const auto piece =
        dcp::packed_piece(out.size(0), out.size(1) / size(), out.size(2), size_of(out.dtype()));
    const Dims shape{size(), static_cast<std::int64_t>(piece.bytes)};
    const Tensor mine = temporary(shape, DType::u8, call);
    backend().ops().pack_partial(out, arguments.lse, mine, call.stream);
    Tensor theirs;
    if (size() > 1) {
      theirs = temporary(shape, DType::u8, call);
      issue_all_to_all(theirs, mine, call);
    }
    backend().ops().merge_pieces(size() > 1 ? theirs : mine, arguments.base, arguments.merged,
                                 arguments.merged_lse, call.stream);
  }

  void merge_staged(const MergeArguments& arguments, const Call& call) {
    const auto& out = arguments.out;
    const std::int64_t batch = out.size(0);
    const std::int64_t heads = out.size(1);
    const std::int64_t own = heads / size();
    const Tensor lses = temporary({size(), batch, heads}, DType::f32, call);
    const ConstTensorView lse(arguments.lse.data(), DType::f32, {1, batch, heads},
                              {0, arguments.lse.strides()[0], arguments.lse.strides()[1]},
                              arguments.lse.device());
    issue_gather(lses, lse, equal(1), 0, call);
    if (arguments.merged_lse != nullptr) {
      backend().ops().merge_lse(lses.view().slice(2, rank() * own, own), arguments.base,
                                *arguments.merged_lse, call.stream);
    }
    const DType dtype = staged_dtype(out.dtype());
    // Heads first: what a rank gets is then contiguous, and a reduce-scatter in windows needs no
    // packing.
    const Tensor corrected = temporary({heads, batch, out.size(2)}, dtype, call);
    backend().ops().correct_partial(out, lses, rank(), arguments.base,
                                    corrected.view().transpose(0, 1), call.stream);
    const TensorView merged = arguments.merged.transpose(0, 1);
    // Allocated whatever this rank's strides are, so that all ranks' arenas stay alike.
    const Tensor sums = temporary(merged.shape(), dtype, call);
    const bool direct = dtype == merged.dtype() && merged.is_contiguous();
    issue_scatter(direct ? merged : sums.view(), corrected, equal(own), 0, ReduceOp::sum, call);
    if (!direct) {
      backend().ops().copy(sums, merged, call.stream);
    }
  }

  MergeOptions merge_;
  Chosen last_;
};

}  // namespace cohort
