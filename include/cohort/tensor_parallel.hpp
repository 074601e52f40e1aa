// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cohort/group_coordinator.hpp"

/// \file
/// The tensor-parallel group: every rank holds a slice of each layer's weights.

namespace cohort {

/// Besides the collectives, the two calls that close a tensor-parallel layer: the reduction after a
/// row-parallel matrix product and the gathering of logits over the vocabulary (M. Shoeybi et al.,
/// "Megatron-LM", 2019, arXiv:1909.08053, section 3).
class TensorParallelGroup : public GroupCoordinator {
 public:
  /// Made by `ParallelState::create`.
  using GroupCoordinator::GroupCoordinator;

  /// Sums the ranks' partial products of a row-parallel layer, in place. `partial` [..., hidden].
  void row_parallel_reduce(const TensorView& partial, StreamRef stream = {}) {
    all_reduce(partial, stream);
  }

  /// The same sum with the rows shared out for sequence parallelism: this rank's part of dimension
  /// 0, which the group's size must divide.
  [[nodiscard]] Tensor row_parallel_reduce_scatter(const TensorView& partial,
                                                   StreamRef stream = {}) {
    return reduce_scatter_along_dim(partial, 0, stream);
  }

  /// Extents of the vocabulary that rank `rank` holds where each holds `ceil(vocabulary / size)`
  /// and the last ones hold the rest, which may be nothing.
  [[nodiscard]] std::int64_t vocabulary_extent(std::int64_t vocabulary, int rank) const {
    const std::int64_t padded = (vocabulary + size() - 1) / size();
    return std::clamp<std::int64_t>(vocabulary - rank * padded, 0, padded);
  }

  /// Logits [..., vocabulary] from every rank's [..., ceil(vocabulary / size)], the padding of the
  /// last ranks cut off.
  [[nodiscard]] Tensor gather_vocabulary(const TensorView& logits, std::int64_t vocabulary,
                                         StreamRef stream = {}) {
    const auto [mine, sizes] = vocabulary_parts(logits, vocabulary);
    return all_gatherv(mine, sizes, -1, stream);
  }
  /// The same into `out` [..., vocabulary].
  void gather_vocabulary_into(const TensorView& out, const TensorView& logits,
                              std::int64_t vocabulary, StreamRef stream = {}) {
    const auto [mine, sizes] = vocabulary_parts(logits, vocabulary);
    all_gatherv_into(out, mine, sizes, -1, stream);
  }

 private:
  [[nodiscard]] std::pair<TensorView, std::vector<std::int64_t>> vocabulary_parts(
      const TensorView& logits, std::int64_t vocabulary) const {
    const std::int64_t padded = (vocabulary + size() - 1) / size();
    if (vocabulary < 0 || logits.ndim() < 1 || logits.size(-1) != padded) {
      throw UsageError(fmt::format(
          "gather_vocabulary logits: expected {} extents along the last dimension, a share of {} "
          "over {} ranks, got {}",
          padded, vocabulary, size(), to_string(logits.shape())));
    }
    std::vector<std::int64_t> sizes;
    for (int r = 0; r < size(); ++r) {
      sizes.push_back(vocabulary_extent(vocabulary, r));
    }
    return {logits.slice(-1, 0, sizes[static_cast<std::size_t>(rank())]), std::move(sizes)};
  }
};

}  // namespace cohort
