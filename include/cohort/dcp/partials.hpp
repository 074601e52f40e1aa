// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "cohort/dcp/lse_merge.hpp"
#include "cohort/dcp/merge_rows.hpp"
#include "cohort/tensor.hpp"

/// \file
/// What a DCP rank brings to a merge of partial attentions, and what it gets.

namespace cohort {

/// The partial attentions of one rank: B tokens, H heads of all ranks, D elements for each. One, or
/// S of them: splits of the local KV cache, chunks and new tokens, levels of a cascade. Splits are
/// combined while they are read, in their order, by the rules of dcp/lse_merge.hpp, and rounded
/// once to their type, and their LSE to fp32, as if a kernel had combined them before: then the
/// ranks' are merged.
struct Partials {
  ConstTensorView out;        ///< [B, H, D] or [S, B, H, D] in f32, f16 or bf16; D without gaps
  ConstTensorView lse;        ///< [B, H] or [S, B, H] in f32, any strides
  LseBase base = LseBase::e;  ///< Of the LSEs and the sinks.
  /// [H] in f32: a score that takes part in the softmax and has no value, counted once in the group
  /// whatever the number of ranks and splits. It adds to the merged LSE; where all else is empty it
  /// is the merged LSE. -inf, +inf and NaN are no sink. All ranks give one, with the same values,
  /// or none does: each reads those of the rows that it merges.
  std::optional<ConstTensorView> sink = {};
  /// [B] in i32, of the device: the tokens of the KV cache that this rank attended to. Where it is
  /// 0 or less the row is empty, whatever its LSEs and outputs hold, which are not read into
  /// anything.
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

/// [B, H, D] or [B, H] as [1, B, H, D] or [1, B, H].
template <class Void>
[[nodiscard]] BasicTensorView<Void> as_one_split(const BasicTensorView<Void>& view) {
  const auto behind = [&](std::int64_t first, const Dims& rest) {
    return rest.size() == 2 ? Dims{first, rest[0], rest[1]}
                            : Dims{first, rest[0], rest[1], rest[2]};
  };
  return {view.data(), view.dtype(), behind(1, view.shape()), behind(0, view.strides()),
          view.device()};
}

}  // namespace dcp

}  // namespace cohort
