// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <optional>
#include <string_view>

#include "cohort/collective_arguments.hpp"
#include "cohort/dcp/kv_placement.hpp"
#include "cohort/dcp/kv_shard.hpp"
#include "cohort/dtype.hpp"
#include "cohort/error.hpp"
#include "cohort/tensor.hpp"

/// \file
/// The arguments of `DecodeContextParallelGroup::place_step`, and what they must be. Pure.

namespace cohort {

/// What a rank of a DCP group has of a decode step: B sequences, each with q new tokens, the last
/// of it, or up to q where `new_tokens` says how many. All lie on the device, with any strides; q
/// is 1 where nothing is [B, q].
struct KvStep {
  /// [B] i32: all ranks' tokens of each sequence, the new ones included; 0 or less where a batch is
  /// padded.
  ConstTensorView lengths;
  /// [B] i32: the new tokens k of each sequence, where drafts are ragged. Its first k rows are
  /// theirs, the last k tokens of G; its other rows are padding, with a count of 0 and
  /// `dcp::kNoSlot`. Numbers below 0 are taken as 0, those above q as q.
  std::optional<ConstTensorView> new_tokens = {};
  /// [B, q] i32, written: the rank's tokens among those that row j attends to, the first
  /// G - (k - 1 - j) of G, where k is q unless `new_tokens` says otherwise. Or [B] i32: those of
  /// the whole sequence.
  std::optional<TensorView> counts = {};
  /// [B, q] i64, written: where the rank writes the new tokens, `dcp::kNoSlot` for those that it
  /// does not write. A position in the sequence's shard, or with `pages`, in all pages.
  std::optional<TensorView> slots = {};
  /// [B, P] i32: the pages of the sequence's shard on this rank. Tokens beyond them and those whose
  /// page is negative get `dcp::kNoSlot`.
  std::optional<ConstTensorView> pages = {};
  std::int64_t page_tokens = 0;  ///< Tokens of a page, at most `kMaxPageTokens`; 0 without `pages`.

  /// So that the slots of any page have 64 bits.
  static constexpr std::int64_t kMaxPageTokens = std::int64_t{1} << 32;

  /// q
  [[nodiscard]] std::int64_t queries() const {
    return slots ? slots->size(1) : counts && counts->ndim() == 2 ? counts->size(1) : 1;
  }

  /// As memory, once the views are what they are said to be.
  [[nodiscard]] dcp::KvRows rows(const dcp::KvPlacement& placement, int rank) const {
    dcp::KvRows rows{.placement = placement,
                     .rank = rank,
                     .batch = lengths.size(0),
                     .queries = queries(),
                     .lengths = lengths.data_as<std::int32_t>(),
                     .length_stride = lengths.strides()[0]};
    if (new_tokens) {
      rows.new_tokens = new_tokens->data_as<std::int32_t>();
      rows.new_token_stride = new_tokens->strides()[0];
    }
    if (counts) {
      rows.counts = counts->data_as<std::int32_t>();
      rows.count_batch_stride = counts->strides()[0];
      rows.whole_counts = counts->ndim() == 1;
      rows.count_query_stride = rows.whole_counts ? 0 : counts->strides()[1];
    }
    if (slots) {
      rows.slots = slots->data_as<std::int64_t>();
      rows.slot_batch_stride = slots->strides()[0];
      rows.slot_query_stride = slots->strides()[1];
    }
    if (pages) {
      rows.pages = pages->data_as<std::int32_t>();
      rows.page_batch_stride = pages->strides()[0];
      rows.page_stride = pages->strides()[1];
      rows.pages_of_sequence = pages->size(1);
      rows.page_tokens = page_tokens;
    }
    return rows;
  }
};

namespace detail {

/// Throws `UsageError` unless `x` is such an array on the device.
template <class Void>
void check_array(std::string_view argument, const Caller& caller, Device device,
                 const BasicTensorView<Void>& x, DType dtype, const Dims& shape) {
  check_on_device(argument, caller, device, x);
  if (x.dtype() != dtype || x.shape() != shape) {
    throw UsageError(fmt::format("{}: expected {}{}, got {}{}", argument, to_string(dtype),
                                 to_string(shape), to_string(x.dtype()), to_string(x.shape())));
  }
}

/// Throws `UsageError` where a result lies on itself or on what is read.
inline void check_result(std::string_view argument, const KvStep& step, const TensorView& x) {
  check_distinct(argument, x);
  check_apart(argument, x, step.lengths);
  if (step.new_tokens) {
    check_apart(argument, x, *step.new_tokens);
  }
  if (step.pages) {
    check_apart(argument, x, *step.pages);
  }
}

}  // namespace detail

/// Throws `UsageError` unless the views are what `KvStep` says, results lie apart from all else,
/// and the placement is for as many ranks as the caller's group has.
inline void check_step(const Caller& caller, Device device, const dcp::KvShard& shard,
                       const KvStep& step) {
  const auto& [lengths, new_tokens, counts, slots, pages, page_tokens] = step;
  if (shard.ranks() != caller.size) {
    throw UsageError(fmt::format("place_step shard: expected a placement for {} ranks, got {}",
                                 caller.size, shard.ranks()));
  }
  if (!counts && !slots) {
    throw UsageError("place_step: expected counts or slots to be written, got neither");
  }
  if (pages.has_value() != (page_tokens > 0) || page_tokens < 0 || (pages && !slots)) {
    throw UsageError(
        fmt::format("place_step pages: expected a table and the tokens of a page with slots, or "
                    "neither; got {} table, pages of {} tokens and {} slots",
                    pages ? "a" : "no", page_tokens, slots ? "some" : "no"));
  }
  if (page_tokens > KvStep::kMaxPageTokens) {
    throw UsageError(fmt::format("place_step page_tokens: expected at most {}, got {}",
                                 KvStep::kMaxPageTokens, page_tokens));
  }
  if (lengths.ndim() != 1) {
    throw UsageError(
        fmt::format("place_step lengths: expected [B], got {}", to_string(lengths.shape())));
  }
  const std::int64_t batch = lengths.size(0);
  detail::check_array("place_step lengths", caller, device, lengths, DType::i32, {batch});
  if (new_tokens) {
    detail::check_array("place_step new_tokens", caller, device, *new_tokens, DType::i32, {batch});
  }
  if (slots && (slots->ndim() != 2 || slots->size(1) < 1)) {
    throw UsageError(
        fmt::format("place_step slots: expected [B, q], got {}", to_string(slots->shape())));
  }
  const std::int64_t q = step.queries();
  if (slots) {
    detail::check_array("place_step slots", caller, device, *slots, DType::i64, {batch, q});
    detail::check_result("place_step slots", step, *slots);
  }
  if (counts) {
    detail::check_array("place_step counts", caller, device, *counts, DType::i32,
                        counts->ndim() == 1 ? Dims{batch} : Dims{batch, q});
    detail::check_result("place_step counts", step, *counts);
  }
  if (counts && slots) {
    check_apart("place_step slots", *slots, *counts);
  }
  if (pages) {
    detail::check_array("place_step pages", caller, device, *pages, DType::i32,
                        {batch, pages->ndim() == 2 ? pages->size(1) : 0});
  }
}

}  // namespace cohort
