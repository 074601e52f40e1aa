// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cohort/cuda/shapes.hpp"
#include "elements.cuh"
#include "require.hpp"

// What the local and the peer kernels for attention share.

namespace cohort::cuda::detail {

/// A [batch][heads] array of floats.
struct Strided2 {
  float* base = nullptr;
  std::int64_t batch_stride = 0;
  std::int64_t head_stride = 0;

  __device__ __forceinline__ float* at(std::uint32_t b, std::uint32_t h) const {
    return base + b * batch_stride + h * head_stride;
  }
};

inline Strided2 lses_of(const Partial& p) {
  return {const_cast<float*>(p.lse), p.lse_batch_stride, p.lse_head_stride};
}
inline Strided2 lses_of(const Merged& m) { return {m.lse, m.lse_batch_stride, m.lse_head_stride}; }

/// Whether a rank's rows can be taken as they are.
inline bool is_plain(const MergeShape& s, const Partial& p) {
  return s.splits == 1 && p.local_tokens == nullptr;
}
/// Whether the ranks merge their heads of all tokens.
inline bool is_by_head(const MergeShape& s) {
  return s.result == MergeResult::by_head || (s.result == MergeResult::replicated && !s.whole);
}

/// Exponential and logarithm of splits' LSEs, of either base by one code: one_kernel and packed
/// weigh splits with the same bits.
struct SplitBase {
  float to_two;    ///< log2 of the base.
  float from_two;  ///< Its inverse.

  SplitBase() = default;
  explicit SplitBase(LseBase base)
      : to_two(base == LseBase::e ? 1.44269504F : 1.0F),
        from_two(base == LseBase::e ? 0.693147181F : 1.0F) {}

  struct Exp {
    float factor;
    __host__ __device__ float operator()(float x) const {
#ifdef __CUDA_ARCH__
      return exp2f(__fmul_rn(x, factor));
#else
      return x;
#endif
    }
  };
  struct Log {
    float factor;
    __host__ __device__ float operator()(float x) const {
#ifdef __CUDA_ARCH__
      return __fmul_rn(log2f(x), factor);
#else
      return x;
#endif
    }
  };
  __device__ __forceinline__ Exp exp() const { return {to_two}; }
  __device__ __forceinline__ Log log() const { return {from_two}; }
};

/// A rank's rows where they are not to be taken as they are: combined of splits, or empty because
/// the rank has no tokens.
struct SplitRows {
  Rows out;  ///< Of the first split, and aligned as all are.
  Strided2 lse;
  std::int64_t out_split;  ///< Bytes.
  std::int64_t lse_split;
  const std::int32_t* local_tokens;
  std::int64_t local_tokens_stride;
  int splits;
  SplitBase split_base;

  SplitRows() = default;
  SplitRows(const MergeShape& s, const Partial& p)
      : out(p.out, p.out_batch_stride, p.out_head_stride, size_of(s.dtype)),
        lse(lses_of(p)),
        out_split(p.out_split_stride * static_cast<std::int64_t>(size_of(s.dtype))),
        lse_split(p.lse_split_stride),
        local_tokens(p.local_tokens),
        local_tokens_stride(p.local_tokens_stride),
        splits(static_cast<int>(s.splits)),
        split_base(s.base) {
    out.aligned = out.aligned && (splits == 1 || out_split % 16 == 0);
  }

  __device__ __forceinline__ bool is_empty(std::uint32_t token) const {
    return local_tokens != nullptr && local_tokens[token * local_tokens_stride] <= 0;
  }
};

/// Which rows each of up to kMost ranks merges, as kernels are told.
template <int kMost>
struct RankRows {
  std::uint32_t heads;      ///< Of every rank's rows.
  std::uint32_t head_step;  ///< From one rank's first head to the next one's.
  std::uint32_t first_token[kMost];
  std::uint32_t tokens[kMost];

  RankRows() = default;
  explicit RankRows(const dcp::MergeRows& rows) : first_token{}, tokens{} {
    for (int r = 0; r < rows.ranks; ++r) {
      const auto block = rows.of(r);
      first_token[r] = static_cast<std::uint32_t>(block.first_token);
      tokens[r] = static_cast<std::uint32_t>(block.tokens);
    }
    heads = static_cast<std::uint32_t>(rows.of(0).heads);
    head_step = static_cast<std::uint32_t>(rows.ranks > 1 ? rows.of(1).first_head : 0);
  }

  __device__ __forceinline__ dcp::RowBlock<std::uint32_t> of(int rank) const {
    return {first_token[rank], tokens[rank], static_cast<std::uint32_t>(rank) * head_step, heads};
  }
};

/// Sinks by head.
struct Sinks {
  const float* base = nullptr;
  std::int64_t stride = 1;

  __device__ __forceinline__ float at(std::uint32_t head) const {
    return base != nullptr ? base[head * stride] : dcp::kEmptyLse;
  }
};
inline Sinks sinks_of(const Partial& p) { return {p.sink, p.sink_stride}; }

inline void check_merge_shape(const MergeShape& s, int n) {
  if (const std::string obstacle = merge_obstacle(s, n); !obstacle.empty()) {
    throw UsageError(obstacle);
  }
}

}  // namespace cohort::cuda::detail
