// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "cohort/dcp/lse_merge.hpp"
#include "cohort/dcp/merge_rows.hpp"
#include "cohort/hash.hpp"
#include "cohort/tensor.hpp"

/// \file
/// What a DCP rank brings to a merge of partial attentions, and what it gets.

namespace cohort {

/// The partial attentions of one rank: B tokens, H heads of all ranks, D elements for each. One, or
/// S of them: splits of the local KV cache, chunks and new tokens, levels of a cascade. Splits are
/// combined while they are read, in their order, by the rules of dcp/lse_merge.hpp, and rounded
/// once to their type, and their LSE to fp32, as if a kernel had combined them before: then the
/// ranks' are merged. On cards S is at most 256.
struct Partials {
  ConstTensorView out;        ///< [B, H, D] or [S, B, H, D] in f32, f16 or bf16; D without gaps.
  ConstTensorView lse;        ///< [B, H] or [S, B, H] in f32, any strides
  LseBase base = LseBase::e;  ///< Of the LSEs and the sinks.
  /// [H] in f32, in the base of the LSEs: a score x of natural logarithms is x * log2(e) where
  /// `base` is two. It takes part in the softmax and has no value, counted once in the group
  /// whatever the number of ranks and splits. It adds to the merged LSE; where all else is empty it
  /// is the merged LSE. -inf, +inf and NaN are no sink. All ranks give one, with the same values,
  /// or none does: each reads those of the rows that it merges.
  std::optional<ConstTensorView> sink = {};
  /// [B] in i32, of the device: the tokens of the KV cache that this rank attended to. Where it is
  /// 0 or less the row is empty, whatever its LSEs and outputs hold, which are not read into
  /// anything. Where a sequence has q rows, `KvStep::counts` [B, q] are those, as [B * q].
  std::optional<ConstTensorView> local_tokens = {};

  /// S.
  [[nodiscard]] std::int64_t splits() const noexcept {
    return out.ndim() == 4 ? out.shape()[0] : 1;
  }
  /// Whether rows can be taken as they are: one split, and empty where the LSE says so.
  [[nodiscard]] bool is_plain() const noexcept { return splits() == 1 && !local_tokens; }
};

/// Partial attentions and what they are merged into, as transports get them, which have been
/// checked. What the ranks must agree on: all sizes, types, base, rows, splits and whether there is
/// a sink; and, replicated, whether there is an LSE.
struct MergeArguments {
  Partials partials;         ///< With the dimension of the splits: [S, B, H, D] and [S, B, H].
  dcp::MergeRows rows = {};  ///< Which rows each rank merges.
  TensorView merged = {};    ///< [tokens, heads, D] of this rank's rows, D without gaps
  std::optional<TensorView> lse = {};  ///< [tokens, heads] in f32, where asked for
};

namespace dcp {

/// What the ranks have to agree on of a merge, as a number that they compare.
[[nodiscard]] inline std::int64_t merge_form(const MergeArguments& arguments) noexcept {
  const Partials& partials = arguments.partials;
  const MergeRows& rows = arguments.rows;
  std::uint64_t form = cohort::detail::kHashSeed;
  const auto add = [&](std::int64_t word) {
    form = cohort::detail::mix(form, static_cast<std::uint64_t>(word));
  };
  for (const std::int64_t extent : partials.out.shape()) {
    add(extent);
  }
  add(static_cast<std::int64_t>(partials.out.dtype()) * 64 +
      static_cast<std::int64_t>(rows.result) * 16 + static_cast<std::int64_t>(partials.base) * 4 +
      (partials.sink ? 2 : 0) + (rows.result == MergeResult::replicated && arguments.lse ? 1 : 0));
  for (const std::int64_t count : rows.counts) {
    add(count);
  }
  return static_cast<std::int64_t>(form);
}

}  // namespace dcp

}  // namespace cohort
