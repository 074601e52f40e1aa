// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/ATen.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>

#include "cohort/cohort.hpp"
#include "cohort/torch.hpp"
#include "engines.hpp"
#include "operands.hpp"

/// \file
/// The operators of a decode step: the query's gather and the merge of partial attentions.

namespace cohort::python {

inline void gather_query_into(const at::Tensor& q, const at::Tensor& q_nope, const at::Tensor& q_pe,
                              Name group) {
  const DcpUse use(group);
  use->gather_query_into(view_of(q), const_view_of(q_nope), const_view_of(q_pe), use.stream());
}

inline at::Tensor gather_query(const at::Tensor& q_nope, const at::Tensor& q_pe, Name group) {
  DcpUse use(group);
  const auto nope = const_view_of(q_nope);
  const auto pe = const_view_of(q_pe);
  Sizes shape{0, 0, 0};  // what has not three dimensions is refused by the call
  const bool as_bytes = nope.dtype() != pe.dtype();
  if (nope.ndim() == 3 && pe.ndim() == 3) {
    const auto width = [&](const ConstTensorView& part) {
      return part.size(2) * (as_bytes ? static_cast<std::int64_t>(size_of(part.dtype())) : 1);
    };
    shape = {nope.size(0), nope.size(1) * use->size(), width(nope) + width(pe)};
  }
  const at::Tensor q = use.result(shape, as_bytes ? at::kByte : q_nope.scalar_type());
  use->gather_query_into(view_of(q), nope, pe, use.stream());
  return q;
}

/// What merges read besides the partial attentions. Tensors that are not given are none.
struct MergeExtras {
  bool base2 = false;
  bool replicated = false;
  const std::optional<at::Tensor>& sink;
  const std::optional<at::Tensor>& local_tokens;

  [[nodiscard]] Partials partials(const at::Tensor& out, const at::Tensor& lse) const {
    Partials all{.out = const_view_of(out),
                 .lse = const_view_of(lse),
                 .base = base2 ? LseBase::two : LseBase::e};
    if (sink) {
      all.sink = const_view_of(*sink);
    }
    if (local_tokens) {
      all.local_tokens = const_view_of(*local_tokens);
    }
    return all;
  }
  [[nodiscard]] MergeResult result() const {
    return replicated ? MergeResult::replicated : MergeResult::by_head;
  }
};

inline void merge_attention_into(const at::Tensor& merged, const at::Tensor& out,
                                 const at::Tensor& lse, bool base2, bool replicated,
                                 const std::optional<at::Tensor>& sink,
                                 const std::optional<at::Tensor>& local_tokens,
                                 const std::optional<at::Tensor>& merged_lse, Name group) {
  const DcpUse use(group);
  const MergeExtras extras{base2, replicated, sink, local_tokens};
  MergeInto into{.merged = view_of(merged), .result = extras.result()};
  if (merged_lse) {
    into.lse = view_of(*merged_lse);
  }
  use->merge_attention_into(into, extras.partials(out, lse), use.stream());
}

/// Merges into new tensors; what has not three or four dimensions is refused by the call.
[[nodiscard]] inline std::pair<at::Tensor, at::Tensor> merge_new(const at::Tensor& out,
                                                                 const at::Tensor& lse,
                                                                 const MergeExtras& extras,
                                                                 bool with_lse, Name group) {
  DcpUse use(group);
  const Partials partials = extras.partials(out, lse);
  Sizes shape{0, 0, 0};
  if (out.dim() == 3 || out.dim() == 4) {
    shape = out.sizes().slice(static_cast<std::size_t>(out.dim() - 3)).vec();
    shape[1] /= extras.replicated ? 1 : use->size();
  }
  const at::Tensor merged = use.result(shape, out.scalar_type());
  const at::Tensor merged_lse =
      with_lse ? use.result({shape[0], shape[1]}, at::kFloat) : at::Tensor();
  MergeInto into{.merged = view_of(merged), .result = extras.result()};
  if (with_lse) {
    into.lse = view_of(merged_lse);
  }
  use->merge_attention_into(into, partials, use.stream());
  return {merged, merged_lse};
}

inline at::Tensor merge_attention(const at::Tensor& out, const at::Tensor& lse, bool base2,
                                  bool replicated, const std::optional<at::Tensor>& sink,
                                  const std::optional<at::Tensor>& local_tokens, Name group) {
  return merge_new(out, lse, {base2, replicated, sink, local_tokens}, false, group).first;
}

inline std::tuple<at::Tensor, at::Tensor> merge_attention_lse(
    const at::Tensor& out, const at::Tensor& lse, bool base2, bool replicated,
    const std::optional<at::Tensor>& sink, const std::optional<at::Tensor>& local_tokens,
    Name group) {
  return merge_new(out, lse, {base2, replicated, sink, local_tokens}, true, group);
}

}  // namespace cohort::python
