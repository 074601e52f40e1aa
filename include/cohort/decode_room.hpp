// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>

#include "cohort/collective_arguments.hpp"
#include "cohort/dcp/merge_rows.hpp"
#include "cohort/dcp/packed_piece.hpp"
#include "cohort/dtype.hpp"
#include "cohort/error.hpp"
#include "cohort/merge_choice.hpp"
#include "cohort/offset_allocator.hpp"
#include "cohort/tensor.hpp"

/// \file
/// What decode steps need room for: of the group's arena, of its transport's scratch and of the
/// library's inboxes. Pure.

namespace cohort {

/// The largest decode step that a group must have room for. H = heads of all DCP ranks.
struct DecodeShape {
  std::int64_t batch = 0;     ///< B: queries of a step
  std::int64_t heads = 0;     ///< H
  std::int64_t latent = 0;    ///< elements of q_nope for each head
  std::int64_t rope = 0;      ///< elements of q_pe for each head
  std::int64_t value = 0;     ///< D: elements of the attention's output for each head
  DType dtype = DType::bf16;  ///< Of partial outputs, and of queries where nothing else is said.
  std::optional<DType> query_dtype = {};  ///< Of q_nope, and of q_pe where nothing else is said.
  std::optional<DType> rope_dtype = {};   ///< Of q_pe.
  /// Where merged attentions go. Each has room for those before it as well: by head, by token,
  /// replicated. By token alone, and without a query, the ranks need not divide the heads.
  MergeResult result = MergeResult::by_head;
  /// By token and replicated: most tokens of a rank in a merge by token; where 0, as many as each
  /// has where the batch is shared out evenly, rounded up.
  std::int64_t tokens = 0;
};

namespace detail {

/// The parts of one block, each where a block of its own could lie.
struct BlockParts {
  std::size_t bytes = 0;  ///< Of all so far.

  /// Adds a part; where in the block it begins.
  [[nodiscard]] constexpr std::size_t add(std::size_t part) noexcept {
    return std::exchange(bytes, bytes + OffsetAllocator::rounded(part));
  }
  /// A part of that shape.
  [[nodiscard]] constexpr std::size_t add(const Dims& shape, DType dtype) {
    return add(bytes_of(shape, dtype));
  }
};

/// The block of a packed merge: the pieces that a rank of n sends, and those that it gets.
struct PackedScratch {
  /// @param pieces  Bytes of those for all ranks.
  constexpr PackedScratch(int ranks, std::size_t pieces) noexcept
      : mine(parts.add(pieces)), theirs(ranks > 1 ? parts.add(pieces) : mine) {}

  BlockParts parts;    ///< Of the block.
  std::size_t mine;    ///< Where they begin.
  std::size_t theirs;  ///< The same for one rank.
};

/// The block of a staged merge, whatever a rank has and wherever its result goes, so that all
/// ranks' arenas stay alike.
struct StagedScratch {
  /// @param widest  Most rows of a rank.
  /// @param dtype   In which partials are corrected and added.
  constexpr StagedScratch(int ranks, std::int64_t batch, std::int64_t heads, std::int64_t widest,
                          std::int64_t dim, DType dtype)
      : lses(parts.add({ranks, batch, heads}, DType::f32)),
        own_lse(parts.add({batch, heads}, DType::f32)),
        corrected(parts.add({batch, heads, dim}, dtype)),
        sums(parts.add({widest, dim}, dtype)) {}

  BlockParts parts;       ///< Of the block.
  std::size_t lses;       ///< Of all ranks, [n, B, H].
  std::size_t own_lse;    ///< Of this one, [B, H], where it has to be worked out.
  std::size_t corrected;  ///< This rank's partial.
  std::size_t sums;       ///< Of its rows, where they have to be put in place.
};

/// The room for steps of up to one shape, in a group of n ranks.
class DecodeRoom {
 public:
  /// Throws `UsageError` for a shape that cannot be.
  DecodeRoom(const DecodeShape& shape, int ranks, const MergeOptions& merge)
      : shape_(shape), ranks_(ranks), merge_(merge) {
    const std::int64_t least =
        std::min({shape.batch, shape.heads, shape.latent, shape.rope, shape.value, shape.tokens});
    const bool by_token_alone =
        shape.result == MergeResult::by_token && shape.latent == 0 && shape.rope == 0;
    if (least < 0 || (shape.heads % ranks != 0 && !by_token_alone) ||
        !is_attention_dtype(shape.dtype)) {
      throw UsageError(fmt::format(
          "reserve_for: expected sizes >= 0, heads that {} ranks divide for a result {}{} and f32, "
          "f16 or bf16; got batch {}, heads {}, latent {}, rope {}, value {}, tokens {}, {}",
          ranks, to_string(shape.result),
          shape.result == MergeResult::by_token ? " with a query" : "", shape.batch, shape.heads,
          shape.latent, shape.rope, shape.value, shape.tokens, to_string(shape.dtype)));
    }
    check_dtype("reserve_for query_dtype", shape.query_dtype.value_or(shape.dtype));
    check_dtype("reserve_for rope_dtype", shape.rope_dtype.value_or(shape.dtype));
    if (shape.result > MergeResult::replicated) {
      throw UsageError(
          fmt::format("reserve_for result: expected by_head, by_token or replicated, got number {}",
                      static_cast<int>(shape.result)));
    }
    const auto check_extent = [&](std::int64_t extent, std::string_view argument) {
      // In bytes of the largest type, so that sums of them do not overflow.
      static_cast<void>(numel({ranks, shape.batch, shape.heads, extent, 8}, argument));
    };
    check_extent(shape.latent, "reserve_for batch, heads and latent, of all ranks in bytes");
    check_extent(shape.rope, "reserve_for batch, heads and rope, of all ranks in bytes");
    check_extent(shape.value, "reserve_for batch, heads and value, of all ranks in bytes");
    static_cast<void>(numel({shape.batch, shape.heads, query_row_bytes()},
                            "reserve_for batch, heads, latent and rope, in bytes"));
  }

  /// The blocks of a step, as the calls of the group allocate them.
  [[nodiscard]] StepRoom step() const {
    const std::int64_t own = shape_.heads / ranks_;
    const std::int64_t query = query_row_bytes();
    const std::int64_t widest = widest_rows();
    const bool replicated = shape_.result == MergeResult::replicated;
    StepRoom room;
    room.add_block({shape_.batch, shape_.heads, query}, DType::u8);
    room.add_block({widest, shape_.value}, shape_.dtype);
    room.add_block({widest}, DType::f32);
    if (replicated) {
      room.add_block({shape_.batch, shape_.heads, shape_.value}, shape_.dtype);
      room.add_block({shape_.batch, shape_.heads}, DType::f32);
    }
    if (ranks_ > 1) {
      room.add_block({own, shape_.batch, query}, DType::u8);
    }
    const Dims lses{ranks_, shape_.batch, shape_.heads};
    std::size_t most = std::max(query_bytes(), static_cast<std::size_t>(numel(lses)) * 4);
    if (merge_.plan == MergePlan::staged && ranks_ > 1) {
      const StagedScratch scratch(ranks_, shape_.batch, shape_.heads, widest, shape_.value,
                                  merge_.staged_dtype(shape_.dtype));
      room.blocks.push_back(scratch.parts.bytes);
    } else {
      room.blocks.push_back(PackedScratch(ranks_, pieces_bytes(widest)).parts.bytes);
    }
    if (replicated) {
      most = std::max(most, static_cast<std::size_t>(shape_.batch * shape_.heads * shape_.value) *
                                size_of(shape_.dtype));
    }
    room.scratch = most + most / static_cast<std::size_t>(ranks_);
    return room;
  }

  /// Of the largest inbox slot, where every rank merges everything itself up to so many bytes.
  [[nodiscard]] std::size_t inbox_bytes(std::int64_t most_replicated) const {
    std::size_t most = std::max(query_bytes(), pieces_bytes(widest_rows()));
    if (shape_.result == MergeResult::replicated) {
      const std::int64_t row = shape_.value * static_cast<std::int64_t>(size_of(shape_.dtype));
      most =
          std::max(most, pieces_bytes(std::min(shape_.batch * shape_.heads,
                                               most_replicated / std::max<std::int64_t>(row, 1))));
    }
    return most;
  }

 private:
  [[nodiscard]] std::int64_t query_row_bytes() const {
    const DType nope = shape_.query_dtype.value_or(shape_.dtype);
    return shape_.latent * static_cast<std::int64_t>(size_of(nope)) +
           shape_.rope * static_cast<std::int64_t>(size_of(shape_.rope_dtype.value_or(nope)));
  }
  [[nodiscard]] std::size_t query_bytes() const {
    return static_cast<std::size_t>(shape_.batch * shape_.heads) *
           static_cast<std::size_t>(query_row_bytes());
  }
  /// Most rows of a rank in a merge by any of the results that there is room for.
  [[nodiscard]] std::int64_t widest_rows() const {
    const std::int64_t by_head = shape_.batch * (shape_.heads / ranks_);
    if (shape_.result == MergeResult::by_head) {
      return by_head;
    }
    const std::int64_t even = dcp::MergeRows::even_count(shape_.batch, ranks_, 0);
    const std::int64_t tokens = shape_.tokens == 0 ? even : std::min(shape_.tokens, shape_.batch);
    return std::max(by_head, tokens * shape_.heads);
  }
  /// Bytes of one piece of so many rows for each rank.
  [[nodiscard]] std::size_t pieces_bytes(std::int64_t rows) const {
    return static_cast<std::size_t>(ranks_) *
           dcp::packed_piece(rows, 1, shape_.value, size_of(shape_.dtype)).bytes;
  }

  DecodeShape shape_;
  int ranks_;
  MergeOptions merge_;
};

}  // namespace detail

}  // namespace cohort
