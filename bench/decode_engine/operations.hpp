// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cohort/dtype.hpp"

/// \file
/// The arguments of a decode's operations. Pure.

namespace decode_engine {

using cohort::BFloat16;

/// y[g][r] = w[g] x[g][r] for each row and each group, such as a head.
struct Product {
  const BFloat16* x = nullptr;  ///< [groups, rows, in], with these strides
  std::int64_t x_group = 0, x_row = 0;
  const BFloat16* w = nullptr;                 ///< [groups, out, in] without gaps
  void* y = nullptr;                           ///< [groups, rows, out], with these strides
  cohort::DType y_type = cohort::DType::bf16;  ///< or f32
  std::int64_t y_group = 0, y_row = 0;
  std::int64_t rows = 0, in = 0, out = 0, groups = 1;
};

/// Cosine and sine of an angle.
struct Turn {
  float cos = 1, sin = 0;
};

/// Rows of the cache and what they are made of.
struct CacheRow {
  const BFloat16* kv = nullptr;         ///< [batch, latent + rope]
  const BFloat16* gain = nullptr;       ///< [latent]
  const Turn* turns = nullptr;          ///< [batch, rope / 2]
  const std::int64_t* slots = nullptr;  ///< [batch]: in the sequence's shard, or negative
  BFloat16* cache = nullptr;            ///< [batch, capacity, latent + rope]
  std::int64_t batch = 0, capacity = 0, latent = 0, rope = 0;
};

/// out[h][b] and lse[b][h] of q[h][b] over a rank's rows of the cache; empty where it has none.
struct Attention {
  const BFloat16* q = nullptr;           ///< [heads, batch, latent + rope]
  const BFloat16* cache = nullptr;       ///< [batch, capacity, latent + rope]
  const std::int32_t* counts = nullptr;  ///< [batch]: rows of each sequence
  BFloat16* out = nullptr;               ///< [heads, batch, latent]
  float* lse = nullptr;                  ///< [batch, heads], base e
  void* room = nullptr;                  ///< What `Device::attention_room` gave for these sizes.
  std::int64_t heads = 0, batch = 0, capacity = 0, latent = 0, rope = 0;
  double scale = 0;
  /// Whether the next kernel on the stream waits for this one's results, even where the card
  /// launches it early. NCCL's may not.
  bool next_waits = false;
};

/// to[h][b] = from[b][h], each pair turned. `from` begins at the first rotated element; strides are
/// those of heads and sequences.
struct Rotation {
  const BFloat16* from = nullptr;
  std::int64_t from_sequence = 0, from_head = 0;
  BFloat16* to = nullptr;
  std::int64_t to_sequence = 0, to_head = 0;
  const Turn* turns = nullptr;  ///< [batch, rope / 2]
  std::int64_t batch = 0, heads = 0, rope = 0;
  bool next_waits = false;  ///< As `Attention`'s.
};

}  // namespace decode_engine
