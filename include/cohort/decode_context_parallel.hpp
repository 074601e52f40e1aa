// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cohort/dcp/lse_merge.hpp"
#include "cohort/dcp/packed_piece.hpp"
#include "cohort/decode_room.hpp"
#include "cohort/group_coordinator.hpp"
#include "cohort/kv_step.hpp"
#include "cohort/merge_arguments.hpp"
#include "cohort/merge_choice.hpp"
#include "cohort/merge_plan.hpp"
#include "cohort/query_arguments.hpp"

/// \file
/// The decode-context-parallel group: its ranks share out the tokens of the KV cache. A decode step
/// gathers the query heads, attends to the local tokens, and merges the partial attentions.

namespace cohort {

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
    const detail::DecodeRoom room(shape, size(), merge_);
    const detail::CallTime time;
    reserve_room(room.step());
    if (PeerKernels* kernels = peer_kernels()) {
      kernels->reserve(room.inbox_bytes(kernels->most_replicated_bytes()));
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
  /// `q.view().slice(2, 576, 16).reinterpret(DType::f32)`. Ranks whose parts differ in type or size
  /// make different calls, also where their bytes would meet.
  [[nodiscard]] Tensor gather_query(const ConstTensorView& q_nope, const ConstTensorView& q_pe,
                                    StreamRef stream = {}) {
    throw_if_closed();
    const detail::QueryParts parts(q_nope, q_pe);
    const Dims shape = parts.gathered_shape(caller(), backend().device());
    refuse("gather_query", backend().ops().query_obstacle(parts.nope, parts.pe));
    const Call call = begin(stream, made_query(parts));
    Tensor q = temporary(shape, parts.nope.dtype(), call);
    issue(call, [&] { issue_query(q, parts, call); });
    return q;
  }
  /// The same into `q`, of any strides with the last dimension without gaps. Where ranks cannot
  /// address each other, a `q` whose heads come first in memory, [H, B, Dn + Dr] transposed, saves
  /// a copy: what a rank sends then lies in one piece in it.
  void gather_query_into(const TensorView& q, const ConstTensorView& q_nope,
                         const ConstTensorView& q_pe, StreamRef stream = {}) {
    throw_if_closed();
    const detail::QueryParts parts(q_nope, q_pe);
    parts.check_into(q, caller(), backend().device());
    refuse("gather_query", backend().ops().query_obstacle(parts.nope, parts.pe));
    const Call call = begin(stream, made_query(parts));
    issue(call, [&] { issue_query(q, parts, call); });
  }

  /// Local, for the query gathers that follow and the graphs that they are captured in. Whether the
  /// kernel behind a gather waits for it by itself, as attention does that is launched with
  /// programmatic stream serialization and executes `griddepcontrol.wait` in front of its first
  /// look at the queries. The card may then launch that kernel while the gather waits for peers, so
  /// that its start takes no time of its own. Its thread blocks take their room on the card at
  /// once, and hold it until the peers have come: kernels of this rank on other streams, and other
  /// ranks on the same card, must not have to run first. Off at first; without effect where no
  /// kernel of the library's gathers, as on the host.
  void attention_waits(bool waits) {
    throw_if_closed();
    if (PeerKernels* kernels = peer_kernels()) {
      kernels->attention_waits(waits);
    }
  }

  /// Merges the ranks' partial attentions exactly and scatters the heads: [B, H/n, D] from this
  /// rank's `out` [B, H, D] and `lse` [B, H] in f32, of any strides with D without gaps. Ranks
  /// without tokens have lse = -inf; their `out` is never read. See dcp/lse_merge.hpp. On cards D
  /// is a multiple of 8, at most 1024, a split of `out` has less than 2 GiB, and there are at most
  /// 256 splits; anything else is a `UsageError`, on every plan.
  [[nodiscard]] Tensor merge_attention(const ConstTensorView& out, const ConstTensorView& lse,
                                       LseBase base = LseBase::e, StreamRef stream = {}) {
    throw_if_closed();
    MergeArguments arguments = detail::merge_of(out, lse, base);
    check_merge(arguments, MergeResult::by_head, {});
    const Call call = begin(stream, made_merge(arguments));
    Tensor merged =
        temporary(detail::merged_shape(arguments.rows, rank(), arguments.partials.out.shape()),
                  arguments.partials.out.dtype(), call);
    arguments.merged = merged;
    issue(call, [&] { issue_merge(arguments, call); });
    return merged;
  }
  /// The same into `merged` [B, H/n, D], of any strides with D without gaps.
  void merge_attention_into(const TensorView& merged, const ConstTensorView& out,
                            const ConstTensorView& lse, LseBase base = LseBase::e,
                            StreamRef stream = {}) {
    MergeArguments arguments = detail::merge_of(out, lse, base);
    arguments.merged = merged;
    merge_into(arguments, MergeResult::by_head, {}, stream);
  }

  /// Merges what `Partials` describes: several splits of each rank, an attention sink, rows that
  /// are empty because a rank has no tokens. Where the result goes is `result`'s: a rank's heads
  /// [B, H/n, D] and [B, H/n], its tokens [counts[rank], H, D] and [counts[rank], H], or all
  /// [B, H, D] and [B, H]. `counts`, by token only, has the tokens of every rank, B in all; without
  /// it they are shared out evenly, the first ranks having one more; in `packed` every rank sends
  /// every other as many bytes as the rank with most tokens needs. Replicated results are the
  /// same bits on every rank, and those of the other two.
  ///
  /// All ranks pass equal sizes, types, bases, numbers of splits, results and counts, and a sink or
  /// none. A difference is found as in any call: by every plan on the host, on cards by
  /// `one_kernel` and, as NCCL compares nothing, by the other plans under debug checks. Whether a
  /// rank gives `local_tokens` is its own affair. Arithmetic as in dcp/lse_merge.hpp: fp32, splits
  /// in their order and then ranks in theirs, so that results are repeatable bit by bit, and equal
  /// for `packed` and `one_kernel`.
  [[nodiscard]] Merged merge_attention(const Partials& partials,
                                       MergeResult result = MergeResult::by_head,
                                       StreamRef stream = {},
                                       std::span<const std::int64_t> counts = {}) {
    throw_if_closed();
    MergeArguments arguments = detail::merge_of(partials);
    check_merge(arguments, result, counts);
    const DType dtype = arguments.partials.out.dtype();
    const Dims shape = detail::merged_shape(arguments.rows, rank(), arguments.partials.out.shape());
    // Of one size on every rank, or offsets would no longer agree.
    Dims room = shape;
    if (result == MergeResult::by_token) {
      room[0] = dcp::MergeRows::widest_count(arguments.rows.counts);
    }
    arguments.lse.emplace();  // the ranks compare whether there is one
    const Call call = begin(stream, made_merge(arguments));
    Merged merged{temporary(room, dtype, call), temporary({room[0], room[1]}, DType::f32, call)};
    if (result == MergeResult::by_token) {
      merged.out.shrink_to(shape);
      merged.lse.shrink_to({shape[0], shape[1]});
    }
    arguments.merged = merged.out;
    arguments.lse = merged.lse;
    issue(call, [&] { issue_merge(arguments, call); });
    return merged;
  }
  /// The same into tensors of the caller's. The LSE is written where it is given, in the partials'
  /// base; where the result is replicated all ranks give one or none does. By head, `staged` in the
  /// partial's own type writes a `merged` whose heads come first in memory without a copy.
  ///
  /// Nothing that is written may overlap what is read, `merged` not `out` nor the LSE `lse`, nor
  /// the other thing written: `UsageError` before anything is enqueued, on every backend. Throws
  /// `ConfigError` where the plan is forced and cannot run with these arguments.
  void merge_attention_into(const MergeInto& into, const Partials& partials,
                            StreamRef stream = {}) {
    MergeArguments arguments = detail::merge_of(partials);
    arguments.merged = into.merged;
    arguments.lse = into.lse;
    merge_into(arguments, into.result, into.counts, stream);
  }

  /// The plan that the last merge took. `automatic` takes the one-kernel merge where the ranks can
  /// address each other, otherwise `packed`, which sends fewer bytes than `staged`.
  [[nodiscard]] MergeChoice last_merge_choice() const {
    return {last_.plan, last_.reason(why_unmapped())};
  }

 private:
  [[nodiscard]] PeerKernels* peer_kernels() const noexcept {
    return transport() != nullptr && decision().peer_mapping.on ? transport()->peer_kernels()
                                                                : nullptr;
  }

  [[nodiscard]] std::string_view why_unmapped() const noexcept {
    return to_string(decision().peer_mapping.reason);
  }

  /// Merges a caller's partials into a caller's tensors.
  void merge_into(MergeArguments& arguments, MergeResult result,
                  std::span<const std::int64_t> counts, StreamRef stream) {
    throw_if_closed();
    check_merge(arguments, result, counts);
    detail::check_into(caller(), backend().device(), arguments);
    const Call call = begin(stream, made_merge(arguments));
    issue(call, [&] { issue_merge(arguments, call); });
  }

  /// Checks a caller's partials and says where they go.
  void check_merge(MergeArguments& arguments, MergeResult result,
                   std::span<const std::int64_t> counts) {
    detail::check_partials(caller(), backend().device(), arguments.partials, result);
    const Dims& shape = arguments.partials.out.shape();
    if (result == MergeResult::by_token && counts.empty()) {
      for (int r = 0; r < size(); ++r) {
        even_counts_[static_cast<std::size_t>(r)] = dcp::MergeRows::even_count(shape[1], size(), r);
      }
      counts = even_counts_;
    }
    arguments.rows = detail::checked_rows(caller(), shape, result, counts);
    refuse("merge_attention",
           backend().ops().merge_obstacle(arguments.partials.out, arguments.rows));
  }

  /// Throws `UsageError` where the backend cannot take a shape by any plan.
  static void refuse(std::string_view call, const std::string& obstacle) {
    if (!obstacle.empty()) {
      throw UsageError(fmt::format("{} {}", call, obstacle));
    }
  }

  // What ranks compare says nothing of plans and paths, whose messages would not meet either.

  [[nodiscard]] static Made made_query(const detail::QueryParts& parts) {
    return {TraceCall::gather_query,
            parts.nope,
            0,
            {},
            static_cast<int>(parts.pe.size(2)),
            parts.types};
  }
  [[nodiscard]] static Made made_merge(const MergeArguments& arguments) {
    const Partials& partials = arguments.partials;
    const dcp::MergeRows& rows = arguments.rows;
    const bool gathers_lse = rows.result == MergeResult::replicated && arguments.lse;
    const int variant = static_cast<int>(partials.base) + (partials.sink ? 2 : 0) +
                        (gathers_lse ? 4 : 0) + 8 * static_cast<int>(rows.result);
    return {TraceCall::merge_attention, partials.out, 1, rows.counts, variant};
  }

  // From here on the call has begun and its arguments are right.

  void issue_query(const TensorView& q, const detail::QueryParts& parts, const Call& call) {
    const auto& [types, nope, pe] = parts;
    if (size() == 1) {
      backend().ops().pack_query(nope, pe, q, call.stream);
      return;
    }
    if (PeerKernels* kernels = peer_kernels();
        kernels != nullptr && kernels->gather_obstacle(nope, pe).empty()) {
      kernels->gather_query(nope, pe, q, types, call.stream);
      return;
    }
    // Heads first whatever the strides of `q`, which may differ between the ranks: what arrives is
    // then in place where they are heads first as well, and has the same order on every rank.
    const std::int64_t own = nope.size(1);
    const Tensor packed = temporary({own, q.size(0), q.size(2)}, q.dtype(), call);
    backend().ops().pack_query(nope, pe, packed.view().transpose(0, 1), call.stream);
    transport()->agree_also(types.number() + nope.size(2) * 0x10000);
    issue_gather(q.transpose(0, 1), packed, equal(own), 0, call);
  }

  void issue_merge(MergeArguments& arguments, const Call& call) {
    if (arguments.rows.result == MergeResult::replicated) {
      arguments.rows.whole = size() == 1 || merges_whole(arguments);
      if (!arguments.rows.whole) {
        merge_and_gather(arguments, call);
        return;
      }
    }
    issue_rows(arguments, call);
  }

  /// Whether every rank had better merge everything: where one launch does, and the rows are few.
  [[nodiscard]] bool merges_whole(MergeArguments arguments) const {
    PeerKernels* const kernels = peer_kernels();
    const ConstTensorView& out = arguments.partials.out;
    if (kernels == nullptr || merge_.plan == MergePlan::staged ||
        merge_.plan == MergePlan::packed ||
        static_cast<std::int64_t>(out.bytes()) / out.shape()[0] >
            kernels->most_replicated_bytes()) {
      return false;
    }
    arguments.rows.whole = true;
    return kernels->merge_obstacle(arguments).empty();
  }

  /// Everything on every rank: each merges its heads, which are then gathered.
  void merge_and_gather(const MergeArguments& arguments, const Call& call) {
    MergeArguments mine = arguments;
    const std::int64_t own = arguments.rows.heads / size();
    const std::int64_t batch = arguments.rows.batch;
    // Heads first, so that a gather along them needs no packing here.
    const Tensor part =
        temporary({own, batch, arguments.merged.size(2)}, arguments.merged.dtype(), call);
    mine.merged = part.view().transpose(0, 1);
    Tensor lse;
    if (arguments.lse) {
      lse = temporary({own, batch}, DType::f32, call);
      mine.lse = lse.view().transpose(0, 1);
    }
    issue_rows(mine, call);
    issue_gather(arguments.merged.transpose(0, 1), part, equal(own), 0, call);
    if (arguments.lse) {
      issue_gather(arguments.lse->transpose(0, 1), lse, equal(own), 0, call);
    }
  }

  /// Every rank the rows that it merges.
  void issue_rows(const MergeArguments& arguments, const Call& call) {
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

  [[nodiscard]] detail::ChosenMerge choose(const MergeArguments& arguments) const {
    const auto obstacle = [&]() -> std::optional<std::string> {
      PeerKernels* const kernels = peer_kernels();
      return kernels == nullptr ? std::nullopt : std::optional(kernels->merge_obstacle(arguments));
    };
    return detail::choose_merge(merge_.plan, size(), obstacle, why_unmapped());
  }

  void merge_packed(const MergeArguments& arguments, const Call& call) {
    if (size() == 1 && backend().ops().merge_alone(arguments, call.stream)) {
      return;
    }
    const ConstTensorView& out = arguments.partials.out;
    const auto piece =
        dcp::packed_piece(arguments.rows.widest(), 1, out.shape()[3], size_of(out.dtype()));
    const Dims shape{size(), static_cast<std::int64_t>(piece.bytes)};
    const detail::PackedScratch scratch(size(), piece.bytes * static_cast<std::size_t>(size()));
    const Tensor block = scratch_of(scratch.parts, call);
    const TensorView mine = part_of(block, scratch.mine, DType::u8, shape);
    const TensorView theirs = part_of(block, scratch.theirs, DType::u8, shape);
    backend().ops().pack_partial(arguments, mine, call.stream);
    if (size() > 1) {
      transport()->agree_also(dcp::merge_form(arguments));
      issue_all_to_all(theirs, mine, call);
    }
    backend().ops().merge_pieces(theirs, arguments, rank(), call.stream);
  }

  /// A block for the parts of a merge: one costs less than one for each.
  [[nodiscard]] Tensor scratch_of(const detail::BlockParts& parts, const Call& call) {
    return temporary({static_cast<std::int64_t>(parts.bytes)}, DType::u8, call);
  }
  [[nodiscard]] static TensorView part_of(const Tensor& block, std::size_t begin, DType dtype,
                                          const Dims& shape) {
    return {static_cast<std::byte*>(block.data()) + begin, dtype, shape, block.device()};
  }

  void merge_staged(const MergeArguments& arguments, const Call& call) {
    const Partials& partials = arguments.partials;
    const dcp::MergeRows& rows = arguments.rows;
    const DType dtype = merge_.staged_dtype(partials.out.dtype());
    const std::int64_t dim = partials.out.shape()[3];
    const detail::StagedScratch scratch(size(), rows.batch, rows.heads, rows.widest(), dim, dtype);
    const Tensor block = scratch_of(scratch.parts, call);
    const TensorView lses =
        part_of(block, scratch.lses, DType::f32, {size(), rows.batch, rows.heads});
    const auto gather = [&](const ConstTensorView& own) {
      transport()->agree_also(dcp::merge_form(arguments));
      issue_gather(lses, own, equal(1), 0, call);
    };
    if (partials.is_plain()) {
      gather(partials.lse);
    } else {
      const TensorView own =
          part_of(block, scratch.own_lse, DType::f32, {1, rows.batch, rows.heads});
      backend().ops().local_lse(partials, own.reshape({rows.batch, rows.heads}), call.stream);
      gather(own);
    }
    if (arguments.lse) {
      backend().ops().merge_lse(lses, arguments, rank(), call.stream);
    }
    // What a rank gets comes first: it is then contiguous, and a reduce-scatter in windows needs no
    // packing.
    const bool by_token = rows.result == MergeResult::by_token;
    const auto scattered_first = [&](const TensorView& x) {
      return by_token ? x : x.transpose(0, 1);
    };
    const TensorView corrected =
        part_of(block, scratch.corrected, dtype,
                by_token ? Dims{rows.batch, rows.heads, dim} : Dims{rows.heads, rows.batch, dim});
    backend().ops().correct_partial(partials, lses, rank(), scattered_first(corrected),
                                    call.stream);
    const TensorView merged = scattered_first(arguments.merged);
    const auto shares = by_token ? rows.counts : equal(rows.heads / size());
    if (dtype == merged.dtype() && merged.is_contiguous()) {
      issue_scatter(merged, corrected, shares, 0, ReduceOp::sum, call);
    } else {
      const TensorView sums = part_of(block, scratch.sums, dtype, merged.shape());
      issue_scatter(sums, corrected, shares, 0, ReduceOp::sum, call);
      backend().ops().copy(sums, merged, call.stream);
    }
  }

  MergeOptions merge_;
  detail::ChosenMerge last_;
  std::vector<std::int64_t> even_counts_ =
      std::vector<std::int64_t>(static_cast<std::size_t>(size()));
};

}  // namespace cohort
