// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "cohort/dtype.hpp"
#include "cohort/error.hpp"
#include "cohort/vectorised.hpp"

/// \file
/// The arithmetic that merges partial attentions exactly, for the host and for kernels. Kernels
/// include it, so it stays free of what nvcc cannot compile, fmt's checked format strings among it.
///
/// Rank r attends to its shard of the tokens only, with scores x_t, and reports the normalised
/// output o_r = sum_t softmax(x)_t v_t and lse_r = log sum_t exp(x_t). The softmax over all tokens
/// is the ranks' outputs weighted by their shares of the total mass:
///
///     m       = max over the ranks that are not empty of lse_r
///     w_r     = exp(lse_r - m), and 0 for an empty rank
///     s       = w_0 + w_1 + ... in rank order
///     scale_r = w_r / s
///     out     = scale_0 * o_0 + scale_1 * o_1 + ... in rank order
///     lse     = m + log(s)
///
/// An attention sink, a score without a value, is one more x: it takes part in m, and exp(sink - m)
/// is added to s behind the ranks' weights. So the outputs are scaled down and the LSE is that of
/// all scores, once, whoever merges.
///
/// A rank's several partials of one row (splits) are merged by the same rules, in their order and
/// without the sink, and rounded once to their type; the ranks' are merged after that.
///
/// With `LseBase::two` exp and log become exp2 and log2. Everything is fp32, in the order written,
/// so a result depends on the inputs alone: not on timing and not on which rank computes it.
///
/// **Empty ranks.** A rank without tokens reports lse = -inf. +inf and NaN count as empty too. A
/// finite stand-in such as -1e30 does not: where all ranks report it, their outputs are averaged,
/// unless the ranks' numbers of tokens say that they are empty. The output of a rank whose scale is
/// 0 is never read, so it may hold NaN; besides empty ranks that concerns ranks whose share
/// underflows fp32. If all ranks are empty, out is 0 and lse is the sink, or -inf without one.
///
/// Sources: M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax", 2018,
/// arXiv:1805.02867 (running maximum and rescaled sum); T. Dao, D. Haziza, F. Massa and G. Sizov,
/// "Flash-Decoding for long-context inference", 2023, https://pytorch.org/blog/flash-decoding/
/// (splitting the KV cache and merging by log-sum-exp).

namespace cohort {

/// Base of the logarithm in which an attention kernel reports its log-sum-exp.
enum class LseBase : std::uint8_t { e, two };

}  // namespace cohort

namespace cohort::dcp {

/// The LSE of no tokens at all.
inline constexpr float kEmptyLse = -std::numeric_limits<float>::infinity();

/// Whether a rank with this LSE takes no part in the merge: -inf, +inf and NaN.
[[nodiscard]] constexpr bool is_empty_lse(float lse) noexcept {
  // By bits: under -ffast-math a comparison may not tell NaN and infinity from numbers.
  return (std::bit_cast<std::uint32_t>(lse) & 0x7f800000U) == 0x7f800000U;
}

/// What all scales of a row follow from, for partials that are too many to keep them.
struct RowMass {
  float max = kEmptyLse;  ///< m
  float sum = 0.0F;       ///< s

  /// The scale of a partial with this LSE, with the bits of `merge_weights_with`.
  template <class Exp>
  [[nodiscard]] constexpr float scale(float lse, const Exp& exp) const {
    return is_empty_lse(lse) ? 0.0F : exp(lse - max) / sum;
  }
  /// The merged LSE.
  template <class Log>
  [[nodiscard]] constexpr float lse(const Log& log) const {
    return is_empty_lse(max) ? kEmptyLse : max + log(sum);
  }
};

/// Every rank's weight, from every rank's LSE, and their mass. For the host and for kernels: `exp`
/// is the base's function (`expf` or `exp2f`), because the standard one is not constexpr and
/// kernels have faster ones. In a kernel this needs nvcc's --expt-relaxed-constexpr, and functors
/// that are `__host__ __device__`.
///
/// @param lses     [n], in rank order.
/// @param n        Number of ranks.
/// @param exp      float -> float, exp(0) == 1 exactly.
/// @param weights  [n], written: w_r, exactly 0 for ranks that are not to be read. May be `lses`.
/// @param sink     A score without a value, or an empty one.
/// @return their mass. Its sum is at least 1, or 0 if all ranks and the sink are empty.
template <class Exp>
constexpr RowMass weigh_with(const float* lses, int n, const Exp& exp, float* weights,
                             float sink = kEmptyLse) {
  RowMass mass;
  // NOLINTNEXTLINE(bugprone-narrowing-conversions): both are float; the check minds the infinity
  mass.max = is_empty_lse(sink) ? kEmptyLse : sink;
  for (int r = 0; r < n; ++r) {
    if (!is_empty_lse(lses[r]) && lses[r] > mass.max) {
      mass.max = lses[r];
    }
  }
  for (int r = 0; r < n; ++r) {
    const float weight = is_empty_lse(lses[r]) ? 0.0F : exp(lses[r] - mass.max);
    weights[r] = weight;
    mass.sum += weight;
  }
  if (!is_empty_lse(sink)) {
    mass.sum += exp(sink - mass.max);
  }
  return mass;
}

/// Every rank's share of the result. As `weigh_with`; `log` is the base's (`logf` or `log2f`).
///
/// @param log     float -> float, log(1) == 0 exactly.
/// @param scales  [n], written: scale_r, exactly 0 for ranks that are not to be read. May be
/// `lses`.
/// @return the merged LSE, -inf if all ranks and the sink are empty.
template <class Exp, class Log>
constexpr float merge_weights_with(const float* lses, int n, const Exp& exp, const Log& log,
                                   float* scales, float sink = kEmptyLse) {
  const RowMass mass = weigh_with(lses, n, exp, scales, sink);
  if (is_empty_lse(mass.max)) {
    return kEmptyLse;
  }
  for (int r = 0; r < n; ++r) {
    scales[r] = scales[r] / mass.sum;
  }
  return mass.lse(log);
}

/// The mass of `n` partials, in order; `lse_at(i)` is the LSE of the i-th.
template <class LseAt, class Exp>
constexpr RowMass mass_of(const LseAt& lse_at, int n, const Exp& exp) {
  RowMass mass;
  for (int i = 0; i < n; ++i) {
    const float lse = lse_at(i);
    if (!is_empty_lse(lse) && lse > mass.max) {
      mass.max = lse;
    }
  }
  for (int i = 0; i < n; ++i) {
    const float lse = lse_at(i);
    mass.sum += is_empty_lse(lse) ? 0.0F : exp(lse - mass.max);
  }
  return mass;
}

/// `merge_weights_with` for the host: `std::exp` and `std::log`, or `std::exp2` and `std::log2`.
///
/// @param merged_lse  Written unless null: the merged LSE in the same base, -inf if all are empty.
/// @param sink        A score without a value, in the same base, or an empty one.
///
/// Not inlined, like the loops below: every plan then runs the same instructions.
[[gnu::noinline]] inline void merge_weights(const float* lses, int n, LseBase base, float* scales,
                                            float* merged_lse, float sink = kEmptyLse) noexcept {
  bool empty = is_empty_lse(sink);
  for (int r = 0; r < n; ++r) {
    empty = empty && is_empty_lse(lses[r]);
  }
  const float merged = base == LseBase::e ? merge_weights_with(
                                                lses, n, [](float x) { return std::exp(x); },
                                                [](float x) { return std::log(x); }, scales, sink)
                                          : merge_weights_with(
                                                lses, n, [](float x) { return std::exp2(x); },
                                                [](float x) { return std::log2(x); }, scales, sink);
  if (merged_lse != nullptr) {
    // As bits: under -ffast-math g++ 13 makes the largest number of a constant infinity.
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(merged);
    const std::uint32_t written = empty ? 0xff800000U : bits;
    std::memcpy(merged_lse, &written, sizeof(written));
  }
}

namespace detail {

/// Elements that the host's loops handle at once: a constant trip count lets the compiler vectorise
/// at -O2 without run-time checks.
inline constexpr std::int64_t kBlock = 64;

// The loops below are called through `vectorised`, and a row's last, partial block is padded and
// goes through the same code. Where the target has fused multiply-add, the compiler may contract
// a*b+c in one inlined copy and not in another, or in the vector body and not in the scalar tail.
// As it is, an element's bits depend neither on the plan that merges it nor on its place in the
// row. Each loop takes whole blocks, and `out` overlaps no row.

/// out = scale * row, rounded to the element type.
template <class T, class Out>
struct ScaleBlocks {
  [[gnu::always_inline]] static inline void run(Out* __restrict out, const T* __restrict row,
                                                float scale, std::int64_t blocks) noexcept {
    for (std::int64_t k = 0; k < blocks * kBlock; k += kBlock) {
      for (std::int64_t i = k; i < k + kBlock; ++i) {
        out[i] = Out(scale * static_cast<float>(row[i]));
      }
    }
  }
};

/// out = scale_a * a + scale_b * b, rounded to the element type.
template <class T, class Out>
struct AddBlocks {
  [[gnu::always_inline]] static inline void run(Out* __restrict out, const T* __restrict a,
                                                float scale_a, const T* __restrict b, float scale_b,
                                                std::int64_t blocks) noexcept {
    for (std::int64_t k = 0; k < blocks * kBlock; k += kBlock) {
      for (std::int64_t i = k; i < k + kBlock; ++i) {
        out[i] = Out(scale_a * static_cast<float>(a[i]) + scale_b * static_cast<float>(b[i]));
      }
    }
  }
};

/// out = sums + scale * row, rounded to the element type.
template <class T, class Out>
struct AddToBlock {
  [[gnu::always_inline]] static inline void run(Out* __restrict out, const float* __restrict sums,
                                                const T* __restrict row, float scale) noexcept {
    for (std::int64_t i = 0; i < kBlock; ++i) {
      out[i] = Out(sums[i] + scale * static_cast<float>(row[i]));
    }
  }
};

/// The ranks that count in a merge: those whose scale is not 0.
struct Counted {
  const float* scales;
  int n;

  [[nodiscard]] int from(int r) const noexcept {
    while (r < n && scales[r] == 0.0F) {
      ++r;
    }
    return r;
  }
};

/// Whole blocks of a merge. `row_at(r)` gives where they begin in rank r's row, as `const T*`.
template <class T, class Out, class RowAt>
void merge_blocks(const RowAt& row_at, Counted counted, std::int64_t blocks, Out* out) noexcept {
  const auto& [scales, n] = counted;
  const int first = counted.from(0);
  const int second = counted.from(first + 1);
  const int third = counted.from(second + 1);
  if (first >= n) {
    std::fill_n(out, blocks * kBlock, Out(0.0F));
  } else if (second >= n) {
    cohort::detail::vectorised<ScaleBlocks<T, Out>>(out, row_at(first), scales[first], blocks);
  } else if (third >= n) {
    cohort::detail::vectorised<AddBlocks<T, Out>>(out, row_at(first), scales[first], row_at(second),
                                                  scales[second], blocks);
  } else {
    for (std::int64_t skip = 0; skip < blocks * kBlock; skip += kBlock) {
      float sums[2][kBlock];
      float* from = sums[0];
      float* to = sums[1];
      cohort::detail::vectorised<AddBlocks<T, float>>(from, row_at(first) + skip, scales[first],
                                                      row_at(second) + skip, scales[second],
                                                      std::int64_t{1});
      int r = third;
      for (int next = counted.from(r + 1); next < n; next = counted.from(r + 1)) {
        cohort::detail::vectorised<AddToBlock<T, float>>(to, from, row_at(r) + skip, scales[r]);
        std::swap(from, to);
        r = next;
      }
      cohort::detail::vectorised<AddToBlock<T, Out>>(out + skip, from, row_at(r) + skip, scales[r]);
    }
  }
}

/// Elements [begin, length) of a merge by way of copies of the rows: for a short block, which the
/// copies pad, and where `out` is one of the rows.
template <class T, class Out, class RowAt>
void merge_copies(const RowAt& row_at, Counted counted, std::int64_t begin, std::int64_t length,
                  Out* out) noexcept {
  T copies[2][kBlock] = {};  // two, because AddBlocks reads two rows at once
  int turn = 0;
  for (; begin < length; begin += kBlock) {
    const std::int64_t count = std::min(kBlock, length - begin);
    const auto copy_at = [&](int r) {
      turn = 1 - turn;
      std::copy_n(row_at(r) + begin, count, copies[turn]);
      return static_cast<const T*>(copies[turn]);
    };
    Out merged[kBlock];
    merge_blocks<T>(copy_at, counted, 1, merged);
    std::copy_n(merged, count, out + begin);
  }
}

/// Reads no row whose scale is 0. `out` may be one of the rows if the types are equal.
template <class T, class Out, class RowAt>
void merge_row_from(const RowAt& row_at, const float* scales, int n, Out* out,
                    std::int64_t length) noexcept {
  const Counted counted{scales, n};
  bool in_place = false;
  for (int r = counted.from(0); r < n; r = counted.from(r + 1)) {
    in_place |= static_cast<const void*>(row_at(r)) == out;
  }
  const std::int64_t whole = in_place ? 0 : length / kBlock;
  merge_blocks<T>(row_at, counted, whole, out);
  if (whole * kBlock < length) {
    merge_copies<T>(row_at, counted, whole * kBlock, length, out);
  }
}

/// Calls `call` with a null pointer to the C++ type of an attention dtype.
template <class Call>
void with_attention_type(DType dtype, const char* argument, const Call& call) {
  switch (dtype) {
    case DType::f32:
      return call(static_cast<float*>(nullptr));
    case DType::f16:
      return call(static_cast<Half*>(nullptr));
    case DType::bf16:
      return call(static_cast<BFloat16*>(nullptr));
    default:
      throw UsageError(argument +
                       (": expected f32, f16 or bf16, got " + std::string(to_string(dtype))));
  }
}

}  // namespace detail

/// out[i] = scale_0 * rows[0][i] + scale_1 * rows[1][i] + ... in rank order, accumulated in fp32
/// and rounded once. Host only.
///
/// @param rows    [n] pointers to `length` contiguous elements. A pointer whose scale is 0 is not
///                followed and may be null.
/// @param scales  [n], from `merge_weights`. If all are 0, `out` becomes 0.
/// @param out     [length]; may be one of the rows if the types are equal, otherwise overlaps none.
template <class T, class Out = T>
void merge_row(const T* const* rows, const float* scales, int n, Out* out,
               std::int64_t length) noexcept {
  detail::merge_row_from<T>([rows](int r) { return rows[r]; }, scales, n, out, length);
}

/// The staged plan's step before the reduce-scatter: out[i] = scale * row[i]. The sum over the
/// ranks is then the merge. Writes zeros, without reading `row`, where the scale is 0. Host only.
///
/// @param row  [length]; may be null where the scale is 0.
/// @param out  [length], fp32 or the partial's own type; may be `row` if the types are equal.
template <class T, class Out>
void correct_row(const T* row, float scale, Out* out, std::int64_t length) noexcept {
  detail::merge_row_from<T>([row](int) { return row; }, &scale, 1, out, length);
}

/// `merge_row` by run-time type; `rows` and `out` share it. Same bits as the template.
/// @throw UsageError if the type is not f32, f16 or bf16.
inline void merge_row(DType dtype, const void* const* rows, const float* scales, int n, void* out,
                      std::int64_t length) {
  detail::with_attention_type(dtype, "dtype", [&]<class T>(T*) {
    const auto row_at = [rows](int r) { return static_cast<const T*>(rows[r]); };
    detail::merge_row_from<T>(row_at, scales, n, static_cast<T*>(out), length);
  });
}

/// `correct_row` by run-time type. Same bits as the template.
/// @throw UsageError if `row_dtype` is not f32, f16 or bf16, or `out_dtype` is neither f32 nor
/// `row_dtype`.
inline void correct_row(DType row_dtype, const void* row, float scale, DType out_dtype, void* out,
                        std::int64_t length) {
  if (out_dtype != DType::f32 && out_dtype != row_dtype) {
    throw UsageError("out_dtype: expected f32 or the row's " + std::string(to_string(row_dtype)) +
                     ", got " + std::string(to_string(out_dtype)));
  }
  detail::with_attention_type(row_dtype, "row_dtype", [&]<class T>(T*) {
    if (out_dtype == DType::f32) {
      correct_row(static_cast<const T*>(row), scale, static_cast<float*>(out), length);
    } else {
      correct_row(static_cast<const T*>(row), scale, static_cast<T*>(out), length);
    }
  });
}

}  // namespace cohort::dcp
