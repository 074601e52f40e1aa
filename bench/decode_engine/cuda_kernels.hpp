// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "attention_splits.hpp"
#include "noise.hpp"
#include "operations.hpp"

/// \file
/// The kernels of a decode besides matrix products. Every launch throws `cohort::TransportError`
/// where CUDA refuses it.

namespace decode_engine::kernels {

using cohort::BFloat16;

void fill_with_noise(BFloat16* to, const Noise& noise, const Block& block, cudaStream_t stream);
void embed(const std::int32_t* tokens, const BFloat16* table, BFloat16* hidden, std::int64_t batch,
           std::int64_t width, cudaStream_t stream);
/// Throws `cohort::ConfigError` for rows wider than `kMostWidth`.
inline constexpr std::int64_t kMostWidth = 8192;
/// `sums` in bf16, or null.
void add_and_normalize(BFloat16* hidden, const BFloat16* sums, const BFloat16* gain, BFloat16* y,
                       std::int64_t rows, std::int64_t width, cudaStream_t stream);
/// `add_and_normalize` without sums of `row.batch` rows, and `keep`.
void normalize_and_keep(BFloat16* x, const BFloat16* gain, BFloat16* y, std::int64_t width,
                        const CacheRow& row, cudaStream_t stream);
/// May be launched early, and waits for the kernel before.
void rotate(const Rotation& rotation, cudaStream_t stream);
void keep(const CacheRow& row, cudaStream_t stream);
void gate(const BFloat16* x, BFloat16* y, std::int64_t rows, std::int64_t width,
          cudaStream_t stream);
void choose(const float* logits, std::int64_t stride, std::int32_t* tokens, std::int64_t rows,
            std::int64_t vocabulary, cudaStream_t stream);
void lengthen(std::int32_t* lengths, Turn* turns, std::int64_t batch, std::int64_t rope,
              cudaStream_t stream);

/// Partial results of attention's splits over the tokens, as `AttentionSplits` divides them.
struct Splits {
  float* sums = nullptr;  ///< [parts, batch, heads, latent]; unused of one part, as the next
  float* lses = nullptr;  ///< [parts, batch, heads]
  int count = 1;
  int tiles = 1;  ///< Of each split, of 64 tokens.
  bool together = false;
  int sets = 1;
  bool ahead = false;

  /// In a room of `parts() * batch * heads * (latent + 1)` numbers.
  static Splits in(float* room, const Attention& a, const AttentionSplits& splits) {
    return {
        .sums = room,
        .lses = room == nullptr ? nullptr : room + splits.parts() * a.batch * a.heads * a.latent,
        .count = static_cast<int>(splits.count),
        .tiles = static_cast<int>(splits.tiles),
        .together = splits.together,
        .sets = static_cast<int>(splits.sets),
        .ahead = splits.ahead};
  }
};
/// Before attention of such rows is captured. Throws `cohort::ConfigError` for rows that no kernel
/// was compiled for.
void prepare_attention(std::int64_t latent, std::int64_t rope);
/// Pointers are multiples of 16 bytes, the capacity one of 64 tokens. May be launched early: counts
/// and rows, but not queries, are read while the kernel before still runs.
void attend(const Attention& attention, const Splits& splits, cudaStream_t stream);

}  // namespace decode_engine::kernels
