// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

/// \file
/// The sizes of a model, and what of it a rank holds. Pure.

namespace decode_engine {

/// Extents are signed, and containers count without signs.
[[nodiscard]] constexpr std::size_t index(std::int64_t value) noexcept {
  return static_cast<std::size_t>(value);
}

/// A stack as DeepSeek-V2 and V3 have it: multi-head latent attention, and a SwiGLU as wide as the
/// experts that a token takes together.
struct Sizes {
  std::int64_t layers = 0;
  std::int64_t hidden = 0;
  std::int64_t heads = 0;
  std::int64_t query_rank = 0;  ///< Of the queries' compression; 0 where they are not compressed.
  std::int64_t latent = 0;      ///< Of the compression of keys and values: what the cache holds.
  std::int64_t rope = 0;        ///< Elements of a query and of a key that are rotated; even.
  std::int64_t nope = 0;        ///< Those of a head that are not.
  std::int64_t value = 0;       ///< Elements of a head's values.
  std::int64_t inner = 0;       ///< Of the SwiGLU.
  std::int64_t vocabulary = 0;

  /// A row of the cache.
  [[nodiscard]] std::int64_t row() const noexcept { return latent + rope; }
  /// What scores are multiplied by: absorbed keys are longer than those that training saw.
  [[nodiscard]] std::int64_t key() const noexcept { return nope + rope; }
  [[nodiscard]] std::int64_t query_input() const noexcept {
    return query_rank > 0 ? query_rank : hidden;
  }
};

/// Where a rank stands, and of how many.
struct Place {
  int tp_rank = 0, tp = 1;
  int pp_rank = 0, pp = 1;
  int dcp_rank = 0, dcp = 1;

  /// As `cohort::ParallelLayout` numbers the ranks of a world.
  [[nodiscard]] static Place of(int rank, int tp, int pp, int dcp) noexcept {
    return {rank % tp, tp, rank / tp, pp, rank % tp % dcp, dcp};
  }
  [[nodiscard]] bool is_first() const noexcept { return pp_rank == 0; }
  [[nodiscard]] bool is_last() const noexcept { return pp_rank == pp - 1; }
  /// The layers of the stage: [first_layer, end_layer).
  [[nodiscard]] std::int64_t first_layer(const Sizes& sizes) const noexcept {
    return sizes.layers * pp_rank / pp;
  }
  [[nodiscard]] std::int64_t end_layer(const Sizes& sizes) const noexcept {
    return sizes.layers * (pp_rank + 1) / pp;
  }
  [[nodiscard]] std::int64_t own_heads(const Sizes& sizes) const noexcept {
    return sizes.heads / tp;
  }
  [[nodiscard]] std::int64_t own_inner(const Sizes& sizes) const noexcept {
    return sizes.inner / tp;
  }
  /// Rounded up: the last ranks may hold fewer tokens of the vocabulary, or none.
  [[nodiscard]] std::int64_t vocabulary_share(const Sizes& sizes) const noexcept {
    return (sizes.vocabulary + tp - 1) / tp;
  }
  /// Bytes of the cache of a stage on a rank, in bf16, for so many tokens of each sequence.
  [[nodiscard]] std::int64_t cache_bytes(const Sizes& sizes, std::int64_t batch,
                                         std::int64_t tokens) const noexcept {
    return own_rows(sizes, batch, tokens) * sizes.row() * 2;
  }
  /// Operations of the attention over that cache: each of the DCP group's heads multiplies a row by
  /// its query and the row's first part by the weight that comes out.
  [[nodiscard]] double attention_flops(const Sizes& sizes, std::int64_t batch,
                                       std::int64_t tokens) const noexcept {
    return 2.0 * static_cast<double>(own_rows(sizes, batch, tokens)) *
           static_cast<double>(own_heads(sizes) * dcp * (sizes.row() + sizes.latent));
  }

 private:
  [[nodiscard]] std::int64_t own_rows(const Sizes& sizes, std::int64_t batch,
                                      std::int64_t tokens) const noexcept {
    const std::int64_t own = (tokens + dcp - 1) / dcp;
    return (end_layer(sizes) - first_layer(sizes)) * batch * own;
  }
};

}  // namespace decode_engine
