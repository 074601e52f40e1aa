// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "cohort/collective_arguments.hpp"
#include "cohort/dcp/partials.hpp"
#include "cohort/error.hpp"
#include "cohort/tensor.hpp"

/// \file
/// What the arguments of a merge of partial attentions must be, and what follows from them. Pure:
/// every check throws a `UsageError` that names the argument, what was expected and what came.

namespace cohort {

/// A merged attention and its LSE, of the rows that the rank gets: [tokens, heads, D] and
/// [tokens, heads] in f32.
struct Merged {
  Tensor out;  ///< In the type of the partials.
  Tensor lse;  ///< In their base.
};

/// What a merge writes. For B tokens, H heads and D elements of n ranks, `merged` is [B, H/n, D] by
/// head, [tokens of this rank, H, D] by token, and [B, H, D] replicated.
struct MergeInto {
  TensorView merged;                          ///< Any strides, D without gaps.
  std::optional<TensorView> lse = {};         ///< [tokens, heads] in f32, where wanted.
  MergeResult result = MergeResult::by_head;  ///< Which rows each rank gets.
  std::span<const std::int64_t> counts = {};  ///< [n], by token only: tokens of each rank.
};

namespace detail {

/// Throws unless the last dimension has no gaps.
template <class Void>
void check_rows(std::string_view argument, const BasicTensorView<Void>& x) {
  const int last = x.ndim() - 1;
  if (x.shape()[last] > 1 && x.strides()[last] != 1 && x.numel() > 0) {
    throw UsageError(fmt::format("{}: expected a last dimension without gaps, got strides {}",
                                 argument, to_string(x.strides())));
  }
}

/// Throws unless `x` has that type and shape and lies on the device.
template <class Void>
void check_is(std::string_view argument, const Caller& caller, Device device, DType dtype,
              const Dims& shape, const BasicTensorView<Void>& x) {
  check_on_device(argument, caller, device, x);
  if (x.dtype() != dtype || x.shape() != shape) {
    throw UsageError(fmt::format("{}: expected {}{}, got {}{}", argument, to_string(dtype),
                                 to_string(shape), to_string(x.dtype()), to_string(x.shape())));
  }
}

/// A caller's partials as transports get them, [S, B, H, D] and [S, B, H].
[[nodiscard]] inline MergeArguments merge_of(const ConstTensorView& out, const ConstTensorView& lse,
                                             LseBase base) {
  const bool one = out.ndim() == 3 && lse.ndim() == 2;
  return {.partials = {.out = one ? out.unsqueeze() : out,
                       .lse = one ? lse.unsqueeze() : lse,
                       .base = base}};
}
/// The same of what may have more.
[[nodiscard]] inline MergeArguments merge_of(const Partials& given) {
  MergeArguments arguments = merge_of(given.out, given.lse, given.base);
  arguments.partials.sink = given.sink;
  arguments.partials.local_tokens = given.local_tokens;
  return arguments;
}

/// Throws unless they are what a merge takes.
inline void check_partials(const Caller& caller, Device device, const Partials& partials,
                           MergeResult result) {
  if (result > MergeResult::replicated) {
    throw UsageError(fmt::format(
        "merge_attention result: expected by_head, by_token or replicated, got number {}",
        static_cast<int>(result)));
  }
  if (partials.base > LseBase::two) {
    throw UsageError(fmt::format("merge_attention base: expected e or two, got number {}",
                                 static_cast<int>(partials.base)));
  }
  check_on_device("merge_attention out", caller, device, partials.out);
  const Dims& shape = partials.out.shape();
  if (shape.size() != 4 || shape[0] < 1 || shape[3] < 1) {
    throw UsageError(fmt::format(
        "merge_attention out: expected [B, H, D] or [S, B, H, D] with S >= 1 and D >= 1 and an lse "
        "of as many but the last, got {} and {}",
        to_string(shape), to_string(partials.lse.shape())));
  }
  if (!is_attention_dtype(partials.out.dtype())) {
    throw UsageError(fmt::format("merge_attention out: expected f32, f16 or bf16, got {}",
                                 to_string(partials.out.dtype())));
  }
  check_rows("merge_attention out", partials.out);
  if (result != MergeResult::by_token && shape[2] % caller.size != 0) {
    throw UsageError(fmt::format(
        "merge_attention out: expected heads that {} ranks divide for a result {}, got {} of them",
        caller.size, to_string(result), shape[2]));
  }
  check_is("merge_attention lse", caller, device, DType::f32, {shape[0], shape[1], shape[2]},
           partials.lse);
  if (partials.sink) {
    check_is("merge_attention sink", caller, device, DType::f32, {shape[2]}, *partials.sink);
  }
  if (partials.local_tokens) {
    check_is("merge_attention local_tokens", caller, device, DType::i32, {shape[1]},
             *partials.local_tokens);
  }
}

/// Which rows of partials [S, B, H, D] each rank gets.
[[nodiscard]] inline dcp::MergeRows checked_rows(const Caller& caller, const Dims& shape,
                                                 MergeResult result,
                                                 std::span<const std::int64_t> counts) {
  const bool by_token = result == MergeResult::by_token;
  if (!by_token && !counts.empty()) {
    throw UsageError(fmt::format("merge_attention counts: expected none for a result {}, got {}",
                                 to_string(result), counts.size()));
  }
  if (by_token) {
    if (const auto sum = total("merge_attention counts", caller, counts); sum != shape[1]) {
      throw UsageError(fmt::format(
          "merge_attention counts: expected the {} tokens of the partials in all, got {}", shape[1],
          sum));
    }
  }
  return {result, shape[1], shape[2], caller.size, counts};
}

/// What a rank gets of partials [S, B, H, D].
[[nodiscard]] inline Dims merged_shape(const dcp::MergeRows& rows, int rank, const Dims& partials) {
  if (rows.result == MergeResult::replicated) {
    return {rows.batch, rows.heads, partials[3]};
  }
  const auto block = rows.of(rank);
  return {block.tokens, block.heads, partials[3]};
}

/// Throws unless what is written has the right shape and overlaps nothing that is read.
inline void check_into(const Caller& caller, Device device, const MergeArguments& arguments) {
  const Partials& partials = arguments.partials;
  const Dims shape = merged_shape(arguments.rows, caller.rank, partials.out.shape());
  const auto check_output = [&](std::string_view argument, const TensorView& x) {
    check_distinct(argument, x);
    check_apart(argument, x, partials.out);
    check_apart(argument, x, partials.lse);
    if (partials.sink) {
      check_apart(argument, x, *partials.sink);
    }
    if (partials.local_tokens) {
      check_apart(argument, x, *partials.local_tokens);
    }
  };
  check_is("merge_attention merged", caller, device, partials.out.dtype(), shape, arguments.merged);
  check_rows("merge_attention merged", arguments.merged);
  check_output("merge_attention merged", arguments.merged);
  if (arguments.lse) {
    check_is("merge_attention merged_lse", caller, device, DType::f32, {shape[0], shape[1]},
             *arguments.lse);
    check_output("merge_attention merged_lse", *arguments.lse);
    check_apart("merge_attention merged_lse", *arguments.lse, arguments.merged);
  }
}

}  // namespace detail

}  // namespace cohort
