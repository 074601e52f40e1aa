#pragma once

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

inline void check_merge_shape(const MergeShape& s, int n) {
  require(n >= 1 && n <= kMaxPeers, "n", "expected 1 to {} ranks, got {}", kMaxPeers, n);
  require(
      s.batch >= 0 && s.heads >= 1 && s.heads % n == 0 && s.dim >= 8 && s.dim <= 1024 &&
          s.dim % 8 == 0,
      "shape",
      "expected batch >= 0, heads divisible by {} ranks and a dim that is a multiple of 8 up to "
      "1024, got batch={} heads={} dim={}",
      n, s.batch, s.heads, s.dim);
  require(is_attention_dtype(s.dtype), "dtype", "expected f32, f16 or bf16, got {}",
          to_string(s.dtype));
  require(s.batch * s.heads * s.dim * static_cast<std::int64_t>(size_of(s.dtype)) <
              (std::int64_t{1} << 31),
          "shape", "the partial exceeds 2 GiB");
}

}  // namespace cohort::cuda::detail
