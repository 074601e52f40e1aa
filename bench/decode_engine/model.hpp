// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "cohort/dtype.hpp"
#include "noise.hpp"
#include "sizes.hpp"

/// \file
/// The weights, as functions of a seed: every rank makes its own part, whatever the layout.

namespace decode_engine {

using cohort::BFloat16;

/// The matrices of a model, [rows, columns] of the whole model with a row for each output; gains
/// are [1, columns].
enum class Part : std::uint8_t {
  embedding,       ///< [vocabulary, hidden]
  attention_gain,  ///< [1, hidden]
  query_down,      ///< [query_rank, hidden]
  query_gain,      ///< [1, query_rank]
  query_up,        ///< [heads * (nope + rope), query_rank or hidden]
  kv_down,         ///< [latent + rope, hidden]
  kv_gain,         ///< [1, latent]
  key_up,          ///< [heads * latent, nope]: from a head's query to the latent one
  value_up,        ///< [heads * value, latent]
  output,          ///< [hidden, heads * value]
  inner_gain,      ///< [1, hidden]
  gate,            ///< [inner, hidden]
  up,              ///< [inner, hidden]
  down,            ///< [hidden, inner]
  final_gain,      ///< [1, hidden]
  head,            ///< [vocabulary, hidden]
};

class Model {
 public:
  Model(const Sizes& sizes, std::uint64_t seed) : sizes_(sizes), seed_(seed) {}
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;
  virtual ~Model() = default;

  [[nodiscard]] const Sizes& sizes() const noexcept { return sizes_; }
  [[nodiscard]] std::uint64_t seed() const noexcept { return seed_; }
  /// Elements [first_column, first_column + row.size()) of a row.
  virtual void fill(Part part, std::int64_t layer, std::int64_t row, std::int64_t first_column,
                    std::span<BFloat16> elements) const = 0;
  /// What a part is made of, where that is noise alone: a device can then make it.
  [[nodiscard]] virtual std::optional<Noise> noise(Part, std::int64_t /*layer*/) const {
    return std::nullopt;
  }

  [[nodiscard]] std::vector<BFloat16> block(Part part, std::int64_t layer,
                                            const Block& block) const;
  /// Columns of a part.
  [[nodiscard]] std::int64_t columns(Part part) const noexcept;
  /// The largest Euclidean norm of a row of the head.
  [[nodiscard]] double largest_head_norm() const;

 private:
  Sizes sizes_;
  std::uint64_t seed_;
};

/// Gaussian-like weights of the usual size: activations keep theirs, logits have a standard
/// deviation of about one. Whatever comes out means nothing.
[[nodiscard]] std::unique_ptr<Model> random_model(const Sizes& sizes, std::uint64_t seed);

/// Weights that are worked out by hand, plus noise in every element. The model continues a sequence
/// by what followed the last token where it stood before, as two attention heads in series learn to
/// do (C. Olsson et al., "In-context Learning and Induction Heads", 2022, arXiv:2209.11895): in
/// layer 0 every token looks, by its rotary part alone, at the one before it; in the last layer it
/// looks, by its latent part alone, for tokens that stand behind one like itself, and the last
/// SwiGLU hands what those are to the head. All heads and all inner elements carry a part of that,
/// so what one rank gets wrong shows. Throws `cohort::ConfigError` for sizes that it does not fit.
[[nodiscard]] std::unique_ptr<Model> copy_model(const Sizes& sizes, std::uint64_t seed);

/// What `copy_model` is asked: BOS (token 0), a cycle of different tokens that the seed and the
/// sequence's number name, and the first of them again. What must follow is known.
class CopyTask {
 public:
  CopyTask(const Sizes& sizes, std::uint64_t seed, std::int64_t sequence);
  /// Tokens before the first that is to be told.
  [[nodiscard]] std::int64_t prompt_length() const noexcept;
  /// Token at a position: of the prompt, or the right one.
  [[nodiscard]] std::int64_t token(std::int64_t position) const;

 private:
  std::vector<std::int64_t> cycle_;
};

}  // namespace decode_engine
