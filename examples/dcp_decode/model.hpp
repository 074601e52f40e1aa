// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cohort/dtype.hpp"

/// \file
/// A stand-in for a model with one layer a stage. Its matrices are a rotation and a diagonal each,
/// so that the arithmetic costs next to nothing; what depends on what is as in a real model, and a
/// single wrong bit of one step changes every later one. All of it is a function of the seed.

namespace dcp_decode {

using cohort::BFloat16;

struct ModelShape {
  std::int64_t heads = 0;  ///< of the whole model
  std::int64_t latent = 0;
  std::int64_t rope = 0;
  std::int64_t value = 0;

  [[nodiscard]] std::int64_t width() const { return latent + rope; }
};

/// Lengths of the sequences before the first step: none, one and few tokens, so that some ranks of
/// a DCP group and at first all of them have no token of a sequence; up to `context` otherwise.
[[nodiscard]] std::vector<std::int64_t> ragged_lengths(std::int64_t batch, std::int64_t context,
                                                       std::uint64_t seed);

/// One stage, as the rank sees it that holds the heads [first_head, first_head + own_heads).
class Layer {
 public:
  Layer(const ModelShape& shape, std::uint64_t seed, int stage, std::int64_t first_head,
        std::int64_t own_heads);

  /// What enters the first stage: hidden [width] for a token at a position.
  void embed(std::int64_t token, std::int64_t position, std::span<BFloat16> hidden) const;

  /// nope [own heads, latent] and pe [own heads, rope] from hidden [width].
  void query(std::span<const BFloat16> hidden, BFloat16* nope, BFloat16* pe) const;

  /// The row that the KV cache gets for hidden [width].
  void kv_row(std::span<const BFloat16> hidden, std::span<BFloat16> row) const;

  /// A row of the context that is there before the first step.
  void context_row(std::int64_t sequence, std::int64_t token, std::span<BFloat16> row) const;

  /// This rank's part of the output projection, partial [width], from merged [own heads, value].
  /// The sum over the TP ranks is the whole.
  void project(const BFloat16* merged, std::span<float> partial) const;

  /// hidden = (hidden + projected), scaled to a root mean square of 1.
  void add_and_normalize(std::span<BFloat16> hidden, std::span<const float> projected) const;

  /// The greedy choice among `width` tokens.
  [[nodiscard]] static std::int64_t choose_token(std::span<const BFloat16> hidden);

 private:
  ModelShape shape_;
  std::uint64_t seed_;
  std::uint64_t stage_;
  std::int64_t first_head_;
  std::int64_t own_heads_;
  std::vector<float> query_gain_;   // [own heads, width]
  std::vector<float> kv_gain_;      // [width]
  std::vector<float> output_gain_;  // [own heads, width]
};

}  // namespace dcp_decode
