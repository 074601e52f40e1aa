// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cohort/dcp/lse_merge.hpp"
#include "cohort/dtype.hpp"

/// \file
/// Attention over one KV head that all query heads share, as in absorbed multi-head latent
/// attention: keys are whole rows of the cache, values their first elements. Once as an engine's
/// kernel would do it, in fp32 over one rank's tokens, and once in fp64 over all of them.

namespace dcp_decode {

using cohort::BFloat16;

/// Rows [tokens, width] of one sequence.
struct Rows {
  std::span<const BFloat16> data;
  std::int64_t width = 0;

  [[nodiscard]] std::int64_t tokens() const {
    return static_cast<std::int64_t>(data.size()) / width;
  }
};

/// What scores are multiplied by where keys have `width` elements.
[[nodiscard]] double score_scale(std::int64_t width);

/// A row for each head, `stride` elements from one to the next.
template <class T>
struct HeadRows {
  T* data = nullptr;
  std::int64_t stride = 0;

  [[nodiscard]] T* operator[](std::int64_t head) const { return data + head * stride; }
};

/// Attention of `heads` heads: out [heads, value] and lse [heads] in the base, from q [heads,
/// width] and scores multiplied by `scale`. Goes once over the tokens, in blocks. Without tokens
/// the LSE is -inf and the output NaN, which nobody may read.
void local_attention(const Rows& kv, HeadRows<const BFloat16> q, std::int64_t heads,
                     std::int64_t value, double scale, cohort::LseBase base, HeadRows<BFloat16> out,
                     float* lse);

/// How far results are from the reference, and what the bound of that is made of.
struct Deviation {
  double max_rel_error = 0.0;  ///< over elements: |out - reference| / sum_t p_t |v_t|
  double max_lse_error = 0.0;  ///< in natural units
  double max_score = 0.0;      ///< largest sum_i |q_i k_i| * scale: what scores cancel from
  double max_lse = 0.0;        ///< largest |lse| of the reference, natural units
  std::int64_t max_tokens = 0;

  void include(const Deviation& other);
};

/// Attends to all tokens in fp64 with the queries nope [heads, latent] and pe [heads, rope], and
/// compares: merged [heads, value] and merged_lse [heads] in the base.
[[nodiscard]] Deviation compare(const Rows& kv, const BFloat16* nope, const BFloat16* pe,
                                std::int64_t heads, std::int64_t latent, std::int64_t value,
                                cohort::LseBase base, const BFloat16* merged,
                                const float* merged_lse);

/// Bounds that hold for every input that led to these maxima.
struct Bounds {
  double rel_error = 0.0;
  double lse_error = 0.0;
};
[[nodiscard]] Bounds bounds(const Deviation& seen, std::int64_t width, int ranks);

}  // namespace dcp_decode
