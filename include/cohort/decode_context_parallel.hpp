#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "cohort/dcp/lse_merge.hpp"
#include "cohort/dcp/packed_piece.hpp"
#include "cohort/group_coordinator.hpp"
#include "cohort/merge_plan.hpp"

/// \file
/// The decode-context-parallel group: its ranks share out the tokens of the KV cache. A decode step
/// gathers the query heads, attends to the local tokens, and merges the partial attentions.

namespace cohort {

/// The largest decode step that a group must have room for. H = heads of all DCP ranks.
struct DecodeShape {
  std::int64_t batch = 0;   ///< B: queries of a step
  std::int64_t heads = 0;   ///< H
  std::int64_t latent = 0;  ///< elements of q_nope for each head
  std::int64_t rope = 0;    ///< elements of q_pe for each head
  std::int64_t value = 0;   ///< D: elements of the attention's output for each head
  DType dtype = DType::bf16;
};

/// In which precision the staged plan corrects and reduces.
enum class StagedPrecision : std::uint8_t {
  f32,      ///< Corrected partials in fp32: the reduction adds fp32 and rounds once.
  partial,  ///< Corrected partials in their own type: half the bytes, rounded before the sum.
};

/// Which plan a merge takes, and why.
struct MergeChoice {
  MergePlan plan = MergePlan::packed;
  std::string reason;
};

/// How a group merges.
struct MergeOptions {
  MergePlan plan = MergePlan::automatic;
  StagedPrecision staged_precision = StagedPrecision::f32;
};

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

  [[nodiscard]] const MergeOptions& merge_options() const noexcept { return merge_; }

  /// Collective. Makes room for decode steps of up to this shape with every plan, so that nothing
  /// grows while serving: the arena's temporaries and the library's inboxes.
  /// Throws `UsageError` for a shape that cannot be, and as `GroupCoordinator::reserve`.
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
    const auto ranks = static_cast<std::size_t>(size());
    for (const auto extent : {shape.latent, shape.rope, shape.value}) {
      static_cast<void>(numel({size(), shape.batch, shape.heads, extent}));  // throws on overflow
    }
    const auto piece =
        dcp::packed_piece(shape.batch, shape.heads / size(), shape.value, size_of(shape.dtype));
    const auto rows = static_cast<std::size_t>(shape.batch * shape.heads);
    const std::size_t query =
        rows * static_cast<std::size_t>(shape.latent + shape.rope) * size_of(shape.dtype);
    const std::size_t value = rows * static_cast<std::size_t>(shape.value);
    // Live at once at most: what the caller gathers and merges into, and one plan's temporaries.
    const std::size_t packed = 2 * ranks * piece.bytes;
    const std::size_t staged =
        (ranks + 1) * rows * sizeof(float) + (value + value / ranks) * sizeof(float);
    const std::size_t results =
        2 * query + value / ranks * size_of(shape.dtype) + rows * sizeof(float);
    reserve(results + std::max(packed, staged) + kBlockSlack);
    if (transport() != nullptr) {
      transport()->reserve_scratch(query + query / ranks);
    }
    if (PeerKernels* kernels = peer_kernels()) {
      kernels->reserve(std::max(query, ranks * piece.bytes));
    }
  }

  /// The queries of all heads on every rank: q [B, H, Dn + Dr] from this rank's q_nope [B, H/n, Dn]
  /// and q_pe [B, H/n, Dr]. Heads come in rank order. Inputs may lie in any memory.
  [[nodiscard]] Tensor gather_query(const ConstTensorView& q_nope, const ConstTensorView& q_pe,
                                    StreamRef stream = {}) {
    begin("gather_query q_nope", q_nope, stream);
    Tensor q = arena()->empty(query_shape(q_nope, q_pe), q_nope.dtype(), stream);
    gather_query_into(q, q_nope, q_pe, stream);
    return q;
  }
  void gather_query_into(const TensorView& q, const ConstTensorView& q_nope,
                         const ConstTensorView& q_pe, StreamRef stream = {}) {
    begin("gather_query q_nope", q_nope, stream);
    check_like("gather_query q", q, q_nope, query_shape(q_nope, q_pe));
    if (size() == 1) {
      backend().ops().pack_query(q_nope, q_pe, q, stream);
      return;
    }
    if (PeerKernels* kernels = peer_kernels();
        kernels != nullptr && kernels->gather_obstacle(q_nope, q_pe).empty()) {
      debug_compare("gather_query", q_nope, 0, {}, static_cast<int>(q_pe.size(2)), &q);
      kernels->gather_query(q_nope, q_pe, q, stream);
      return;
    }
    Dims shape = q.shape();
    shape[1] = q_nope.size(1);
    const Tensor packed = arena()->empty(shape, q.dtype(), stream);
    backend().ops().pack_query(q_nope, q_pe, packed, stream);
    all_gather_into(q, packed, 1, stream);
  }

  /// Merges the ranks' partial attentions exactly and scatters the heads: [B, H/n, D] from this
  /// rank's `out` [B, H, D] and `lse` [B, H] in f32, of any strides with D without gaps. Ranks
  /// without tokens have lse = -inf; their `out` is never read. See dcp/lse_merge.hpp.
  [[nodiscard]] Tensor merge_attention(const ConstTensorView& out, const ConstTensorView& lse,
                                       LseBase base = LseBase::e, StreamRef stream = {}) {
    begin("merge_attention out", out, stream);
    Tensor merged = arena()->empty(merged_shape(out), out.dtype(), stream);
    merge_attention_into(merged, out, lse, base, stream);
    return merged;
  }
  /// The same into `merged` [B, H/n, D] and, where given, `merged_lse` [B, H/n] in f32, in the same
  /// base. Throws `ConfigError` where the plan is forced and cannot run with these arguments.
  void merge_attention_into(const TensorView& merged, const ConstTensorView& out,
                            const ConstTensorView& lse, LseBase base = LseBase::e,
                            StreamRef stream = {}, const TensorView* merged_lse = nullptr) {
    begin("merge_attention out", out, stream);
    check_merge(merged, out, lse, merged_lse);
    const MergeArguments arguments{out, lse, merged, merged_lse, base};
    last_choice_ = choose(arguments);
    switch (last_choice_.plan) {
      case MergePlan::one_kernel:
        debug_compare("merge_attention", out, 0, {}, static_cast<int>(base), &merged);
        peer_kernels()->merge_attention(arguments, stream);
        return;
      case MergePlan::staged:
        merge_staged(arguments, stream);
        return;
      case MergePlan::packed:
      case MergePlan::automatic:
        merge_packed(arguments, stream);
        return;
    }
  }

  /// The plan that the last merge took. `automatic` takes the one-kernel merge where the ranks can
  /// address each other, otherwise `packed`, which sends fewer bytes than `staged`.
  [[nodiscard]] const MergeChoice& last_merge_choice() const noexcept { return last_choice_; }

 private:
  /// Each temporary is rounded up to the allocator's alignment.
  static constexpr std::size_t kBlockSlack = 16 * OffsetAllocator::kAlignment;

  [[nodiscard]] PeerKernels* peer_kernels() const noexcept {
    return transport() != nullptr && decision().peer_mapping.on ? transport()->peer_kernels()
                                                                : nullptr;
  }

  [[nodiscard]] Dims query_shape(const ConstTensorView& q_nope, const ConstTensorView& q_pe) const {
    if (q_nope.ndim() != 3) {
      throw UsageError(fmt::format("gather_query q_nope: expected [B, H/n, Dn], got {}",
                                   to_string(q_nope.shape())));
    }
    if (q_pe.ndim() != 3) {
      throw UsageError(
          fmt::format("gather_query q_pe: expected [B, H/n, Dr], got {}", to_string(q_pe.shape())));
    }
    check_like("gather_query q_pe", q_pe, q_nope, {q_nope.size(0), q_nope.size(1), q_pe.size(2)});
    return {q_nope.size(0), q_nope.size(1) * size(), q_nope.size(2) + q_pe.size(2)};
  }

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

  void check_merge(const TensorView& merged, const ConstTensorView& out, const ConstTensorView& lse,
                   const TensorView* merged_lse) const {
    const Dims shape = merged_shape(out);
    if (!is_attention_dtype(out.dtype())) {
      throw UsageError(fmt::format("merge_attention out: expected f32, f16 or bf16, got {}",
                                   to_string(out.dtype())));
    }
    check_rows("merge_attention out", out);
    check_like("merge_attention merged", merged, out, shape);
    check_rows("merge_attention merged", merged);
    check_lse("merge_attention lse", lse, {out.size(0), out.size(1)});
    if (merged_lse != nullptr) {
      check_lse("merge_attention merged_lse", *merged_lse, {shape[0], shape[1]});
    }
  }

  [[nodiscard]] MergeChoice choose(const MergeArguments& arguments) const {
    if (size() == 1) {
      return {MergePlan::packed, "single rank: a local copy"};
    }
    if (merge_.plan == MergePlan::staged || merge_.plan == MergePlan::packed) {
      return {merge_.plan, "chosen by the user"};
    }
    PeerKernels* kernels = peer_kernels();
    const std::string obstacle =
        kernels != nullptr
            ? kernels->merge_obstacle(arguments)
            : fmt::format("no peer mapping: {}", to_string(decision().peer_mapping.reason));
    if (merge_.plan == MergePlan::one_kernel) {
      if (!obstacle.empty()) {
        throw ConfigError(fmt::format("merge plan one_kernel: {}", obstacle));
      }
      return {MergePlan::one_kernel, "chosen by the user"};
    }
    if (obstacle.empty()) {
      return {MergePlan::one_kernel, "every rank can address every other"};
    }
    return {MergePlan::packed, obstacle};
  }

  void merge_packed(const MergeArguments& arguments, StreamRef stream) {
    const auto& out = arguments.out;
    const auto piece =
        dcp::packed_piece(out.size(0), out.size(1) / size(), out.size(2), size_of(out.dtype()));
    const Dims shape{size(), static_cast<std::int64_t>(piece.bytes)};
    const Tensor mine = arena()->empty(shape, DType::u8, stream);
    backend().ops().pack_partial(out, arguments.lse, mine, stream);
    const Tensor pieces = all_to_all(mine, stream);
    backend().ops().merge_pieces(pieces, arguments.base, arguments.merged, arguments.merged_lse,
                                 stream);
  }

  void merge_staged(const MergeArguments& arguments, StreamRef stream) {
    const auto& out = arguments.out;
    const std::int64_t batch = out.size(0);
    const std::int64_t heads = out.size(1);
    const std::int64_t own = heads / size();
    const Tensor lses = arena()->empty({size(), batch, heads}, DType::f32, stream);
    const ConstTensorView lse(arguments.lse.data(), DType::f32, {1, batch, heads},
                              {0, arguments.lse.strides()[0], arguments.lse.strides()[1]},
                              arguments.lse.device());
    all_gather_into(lses, lse, 0, stream);
    if (arguments.merged_lse != nullptr) {
      backend().ops().merge_lse(lses.view().slice(2, rank() * own, own), arguments.base,
                                *arguments.merged_lse, stream);
    }
    const bool wide = merge_.staged_precision == StagedPrecision::f32;
    const DType dtype = wide ? DType::f32 : out.dtype();
    // Heads first: what a rank gets is then contiguous, and a reduce-scatter in windows needs no
    // packing.
    const Tensor corrected = arena()->empty({heads, batch, out.size(2)}, dtype, stream);
    backend().ops().correct_partial(out, lses, rank(), arguments.base,
                                    corrected.view().transpose(0, 1), stream);
    const TensorView merged = arguments.merged.transpose(0, 1);
    // Allocated whatever this rank's strides are, so that all ranks' arenas stay alike.
    const Tensor sums = arena()->empty(merged.shape(), dtype, stream);
    const bool direct = dtype == merged.dtype() && merged.is_contiguous();
    reduce_scatter_into(direct ? merged : sums.view(), corrected, 0, stream);
    if (!direct) {
      backend().ops().copy(sums, merged, stream);
    }
  }

  MergeOptions merge_;
  MergeChoice last_choice_;
};

}  // namespace cohort
