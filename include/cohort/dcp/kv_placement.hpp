// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

/// \file
/// The arithmetic of `KvShard`, for the host and for kernels, and what a rank has of a decode step:
/// nothing is checked, nothing throws. Kernels include it, so it stays free of fmt; in a kernel its
/// functions need nvcc's --expt-relaxed-constexpr.
///
/// A step gives each of B sequences q new tokens, the last q of its length G; q > 1 where a model
/// verifies drafts. Row j of a sequence attends to the tokens up to its own, the first
/// G - (q - 1 - j). A rank's share of those is no difference of shares: with 2 ranks and G = 4,
/// rank 0 has 2 tokens of all and 2 of the first 3, while 2 - 1 is 1. So each row's is computed
/// from its own global length.
///
/// Where drafts are ragged, sequence b has k of those q rows: its first k are the last k tokens of
/// its length, and the others are padding, which attends to nothing and writes nothing.
///
/// The counts equal those of vLLM's `get_dcp_local_seq_lens` (vllm/v1/attention/backends/utils.py)
/// with `interleave` as its `cp_kv_cache_interleave_size`, and the slots in pages those of
/// `_compute_slot_mapping_kernel` (vllm/v1/worker/block_table.py), whose padding is -1 as well, and
/// whose pages have a multiple of that many tokens.

namespace cohort::dcp {

/// The slot of a token that a rank does not write: another rank's, one before the sequence's first,
/// or one that the page table has no page for.
inline constexpr std::int64_t kNoSlot = -1;

/// Where the tokens of a sequence live; see kv_shard.hpp. `KvShard::placement` makes one.
struct KvPlacement {
  std::int64_t ranks = 1;       ///< Ranks that share the cache, at least 1.
  std::int64_t interleave = 1;  ///< Consecutive tokens of one rank, at least 1.

  /// Rank that holds a token, 0 or more.
  [[nodiscard]] constexpr std::int64_t owner(std::int64_t token) const noexcept {
    return token / interleave % ranks;
  }

  /// Position of a token, 0 or more, in its owner's shard.
  [[nodiscard]] constexpr std::int64_t local_index(std::int64_t token) const noexcept {
    return token / (interleave * ranks) * interleave + token % interleave;
  }

  /// Tokens on a rank of a sequence of `length` tokens; 0 of a length below 1.
  [[nodiscard]] constexpr std::int64_t local_count(std::int64_t length,
                                                   std::int64_t rank) const noexcept {
    if (length < 1) {
      return 0;
    }
    const std::int64_t beyond = length % (interleave * ranks) - rank * interleave;
    const std::int64_t partial = beyond < 0 ? 0 : beyond < interleave ? beyond : interleave;
    return length / (interleave * ranks) * interleave + partial;
  }

  /// Where a rank writes a token in its shard: `local_index`, or `kNoSlot` where the token is
  /// another rank's or negative.
  [[nodiscard]] constexpr std::int64_t slot(std::int64_t token, std::int64_t rank) const noexcept {
    return token >= 0 && owner(token) == rank ? local_index(token) : kNoSlot;
  }

  friend bool operator==(const KvPlacement&, const KvPlacement&) noexcept = default;
};

/// What one rank has of a step's tokens, as memory: the host's loop and the kernel both call
/// `place` for each row. Strides count elements.
struct KvRows {
  KvPlacement placement;     ///< Whose arithmetic it is.
  std::int64_t rank = 0;     ///< The rank that has them.
  std::int64_t batch = 0;    ///< B
  std::int64_t queries = 1;  ///< q

  const std::int32_t* lengths = nullptr;  ///< [B]
  std::int64_t length_stride = 1;         ///< Of `lengths`.

  const std::int32_t* new_tokens = nullptr;  ///< [B]: k of each, or null where all have q.
  std::int64_t new_token_stride = 1;         ///< Of `new_tokens`.

  std::int32_t* counts = nullptr;       ///< [B, q], or [B] for the whole sequences, or null.
  std::int64_t count_batch_stride = 0;  ///< Of `counts`, along B.
  std::int64_t count_query_stride = 0;  ///< Along q.
  bool whole_counts = false;            ///< `counts` is [B].

  std::int64_t* slots = nullptr;       ///< [B, q], or null.
  std::int64_t slot_batch_stride = 0;  ///< Of `slots`, along B.
  std::int64_t slot_query_stride = 0;  ///< Along q.

  const std::int32_t* pages = nullptr;  ///< [B, P]: the pages of each sequence's shard, or null.
  std::int64_t page_batch_stride = 0;   ///< Of `pages`, along B.
  std::int64_t page_stride = 0;         ///< Along P.
  std::int64_t pages_of_sequence = 0;   ///< P
  std::int64_t page_tokens = 1;         ///< Tokens of a page, 1 to 2^32.

  /// Writes what belongs to row j of sequence b.
  constexpr void place(std::int64_t b, std::int64_t j) const noexcept {
    const std::int64_t length = lengths[b * length_stride];
    const std::int64_t fresh = rows_of(b);
    const std::int64_t visible = j < fresh ? length - (fresh - 1 - j) : 0;
    if (counts != nullptr && !whole_counts) {
      counts[b * count_batch_stride + j * count_query_stride] =
          static_cast<std::int32_t>(placement.local_count(visible, rank));
    } else if (counts != nullptr && j == 0) {
      counts[b * count_batch_stride] =
          static_cast<std::int32_t>(placement.local_count(length, rank));
    }
    if (slots != nullptr) {
      slots[b * slot_batch_stride + j * slot_query_stride] =
          in_pages(b, placement.slot(visible - 1, rank));
    }
  }

 private:
  /// k, of 0 to q.
  [[nodiscard]] constexpr std::int64_t rows_of(std::int64_t b) const noexcept {
    if (new_tokens == nullptr) {
      return queries;
    }
    const std::int64_t fresh = new_tokens[b * new_token_stride];
    return fresh < 0 ? 0 : fresh < queries ? fresh : queries;
  }
  [[nodiscard]] constexpr std::int64_t in_pages(std::int64_t b, std::int64_t local) const noexcept {
    if (pages == nullptr || local == kNoSlot) {
      return local;
    }
    const std::int64_t at = local / page_tokens;
    const std::int64_t page =
        at < pages_of_sequence ? pages[b * page_batch_stride + at * page_stride] : -1;
    return page < 0 ? kNoSlot : page * page_tokens + local % page_tokens;
  }
};

}  // namespace cohort::dcp
