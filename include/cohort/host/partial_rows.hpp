// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "cohort/dcp/lse_merge.hpp"
#include "cohort/dcp/partials.hpp"
#include "cohort/host/peer_access.hpp"
#include "cohort/host/strided.hpp"

/// \file
/// One rank's partial attentions, row by row: the one place where splits are combined and empty
/// rows found on the host.

namespace cohort::host {

/// The rows of `Partials` that have the dimension of the splits. Refers to them; reads what they
/// hold when a row is asked for.
class PartialRows {
 public:
  explicit PartialRows(const Partials& partials)
      : partials_(partials),
        splits_(partials.splits()),
        row_bytes_(static_cast<std::size_t>(partials.out.shape()[3]) *
                   size_of(partials.out.dtype())) {
    if (splits_ > 1) {
      lses_.resize(static_cast<std::size_t>(splits_));
      rows_.resize(lses_.size());
    }
  }

  /// The LSE of a row.
  [[nodiscard]] float lse(std::int64_t token, std::int64_t head) {
    if (is_empty(token)) {
      return dcp::kEmptyLse;
    }
    return splits_ == 1 ? split_lse(0, token, head) : weigh(token, head);
  }

  /// Writes a row, [D] of the partials' type, and returns its LSE. An empty row may be left
  /// unwritten, as none is read.
  [[nodiscard]] float read(std::int64_t token, std::int64_t head, void* row) {
    const Row found = at(token, head, row);
    if (found.out != nullptr && found.out != row) {
      std::memcpy(row, found.out, row_bytes_);
    }
    return found.lse;
  }

  /// A row and its LSE.
  struct Row {
    const void* out = nullptr;  ///< Null where it is empty.
    float lse = dcp::kEmptyLse;
  };
  /// A row where it lies, or combined in `room`, [D] of the partials' type.
  [[nodiscard]] Row at(std::int64_t token, std::int64_t head, void* room) {
    if (is_empty(token)) {
      return {};
    }
    if (splits_ == 1) {
      return {split_row(0, token, head), split_lse(0, token, head)};
    }
    const float lse = weigh(token, head);
    for (std::int64_t s = 0; s < splits_; ++s) {
      rows_[static_cast<std::size_t>(s)] = split_row(s, token, head);
    }
    dcp::merge_row(partials_.out.dtype(), rows_.data(), lses_.data(), static_cast<int>(splits_),
                   room, partials_.out.shape()[3]);
    return {room, lse};
  }

 private:
  [[nodiscard]] bool is_empty(std::int64_t token) const {
    if (!partials_.local_tokens) {
      return false;
    }
    const ConstTensorView& tokens = *partials_.local_tokens;
    return static_cast<const std::int32_t*>(tokens.data())[token * tokens.strides()[0]] <= 0;
  }
  [[nodiscard]] float split_lse(std::int64_t split, std::int64_t token, std::int64_t head) const {
    const Dims& strides = partials_.lse.strides();
    return static_cast<const float*>(
        partials_.lse.data())[split * strides[0] + token * strides[1] + head * strides[2]];
  }
  [[nodiscard]] const std::byte* split_row(std::int64_t split, std::int64_t token,
                                           std::int64_t head) const {
    const Dims& strides = partials_.out.strides();
    const std::int64_t offset = split * strides[0] + token * strides[1] + head * strides[2];
    return static_cast<const std::byte*>(partials_.out.data()) +
           offset * static_cast<std::int64_t>(size_of(partials_.out.dtype()));
  }
  /// The scales of a row's splits, in `lses_`; returns their LSE.
  [[nodiscard]] float weigh(std::int64_t token, std::int64_t head) {
    for (std::int64_t s = 0; s < splits_; ++s) {
      lses_[static_cast<std::size_t>(s)] = split_lse(s, token, head);
    }
    float lse = 0.0F;
    dcp::merge_weights(lses_.data(), static_cast<int>(splits_), partials_.base, lses_.data(), &lse);
    return lse;
  }

  const Partials& partials_;
  std::int64_t splits_;
  std::size_t row_bytes_;
  std::vector<float> lses_;
  std::vector<const void*> rows_;
};

/// A block's rows of partials or their LSEs, where there is one split.
[[nodiscard]] inline Part<const std::byte> part_of_block(const ConstTensorView& x,
                                                         const dcp::RowBlock<std::int64_t>& block) {
  const Dims& strides = x.strides();
  const std::int64_t skip = block.first_token * strides[1] + block.first_head * strides[2];
  Dims shape = x.shape();
  shape[1] = block.tokens;
  shape[2] = block.heads;
  const auto* data = static_cast<const std::byte*>(x.data());
  return {block.rows() == 0 ? data : data + skip * static_cast<std::int64_t>(size_of(x.dtype())),
          collapse(shape, strides)};
}

/// Calls `call` with a merge's arguments. Recorded ones have their counts beside them, because a
/// caller's span ends before a replay.
template <class Call>
void with_counts(const MergeArguments& arguments, std::span<const std::int64_t> counts,
                 const Call& call) {
  if (arguments.rows.counts.data() == counts.data()) {
    call(arguments);
    return;
  }
  MergeArguments recorded = arguments;
  recorded.rows.counts = counts;
  call(recorded);
}

/// The sink of a head, or an empty one.
[[nodiscard]] inline float sink_of(const Partials& partials, std::int64_t head) {
  return partials.sink
             ? static_cast<const float*>(partials.sink->data())[head * partials.sink->strides()[0]]
             : dcp::kEmptyLse;
}

}  // namespace cohort::host
