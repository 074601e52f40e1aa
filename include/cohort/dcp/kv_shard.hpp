// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "cohort/dcp/kv_placement.hpp"
#include "cohort/error.hpp"

/// \file
/// Where the tokens of a sequence live when its KV cache is shared out among the ranks of a DCP
/// group. Arithmetic only; without checks, for kernels, in kv_placement.hpp.
///
/// Tokens are interleaved in blocks of `interleave`: token t is on rank (t / interleave) mod n.
/// Each rank keeps its tokens in ascending order without gaps. With n=2 and interleave=2:
///
///     token         0 1 2 3 4 5 6 7 8
///     rank          0 0 1 1 0 0 1 1 0
///     local index   0 1 0 1 2 3 2 3 4
///
/// So every rank's share of any prefix differs from any other's by at most one block, and no token
/// ever moves when the sequence grows.

namespace cohort::dcp {

/// The placement for one group. A value; all ranks of a group must use equal ones.
class KvShard {
 public:
  /// @param ranks       Ranks of the DCP group.
  /// @param interleave  Consecutive tokens that stay together; engines with a paged cache choose a
  ///                    divisor or a multiple of the page size.
  /// @throw ConfigError if one is below 1, or `ranks * interleave` does not fit 64 bits.
  explicit KvShard(int ranks, std::int64_t interleave = 1) : placement_{ranks, interleave} {
    if (ranks < 1 || interleave < 1) {
      throw ConfigError(fmt::format(
          "KvShard: ranks and interleave must be at least 1, got {} and {}", ranks, interleave));
    }
    if (interleave > kMaxTokens / ranks) {
      throw ConfigError(
          fmt::format("KvShard: {} ranks times interleave {} overflow 64 bits", ranks, interleave));
    }
  }

  /// Ranks that share the cache.
  [[nodiscard]] int ranks() const noexcept { return static_cast<int>(placement_.ranks); }
  /// Consecutive tokens that stay on one rank.
  [[nodiscard]] std::int64_t interleave() const noexcept { return placement_.interleave; }
  /// The same without checks, for kernels. `DecodeContextParallelGroup::place_step` fills a step's
  /// counts and slots on the device.
  [[nodiscard]] const KvPlacement& placement() const noexcept { return placement_; }

  /// Rank that holds a token. The owner of the next token to append to a sequence of L tokens is
  /// `owner(L)`.
  /// @throw UsageError if `token` is negative.
  [[nodiscard]] int owner(std::int64_t token) const {
    check_not_negative("token", token);
    return static_cast<int>(placement_.owner(token));
  }

  /// Position of a token in its owner's shard. The slot that the next appended token takes in a
  /// sequence of L tokens is `local_index(L)`, on `owner(L)`.
  /// @throw UsageError if `token` is negative.
  [[nodiscard]] std::int64_t local_index(std::int64_t token) const {
    check_not_negative("token", token);
    return placement_.local_index(token);
  }

  /// The token at a position of a rank's shard: the inverse of `owner` and `local_index`.
  /// @throw UsageError if an argument is out of range, or the token's number overflows 64 bits.
  [[nodiscard]] std::int64_t global_index(int rank, std::int64_t local) const {
    check_rank(rank);
    check_not_negative("local", local);
    const std::int64_t cycle = interleave() * placement_.ranks;
    const std::int64_t in_cycle = rank * interleave() + local % interleave();
    if (local / interleave() > (kMaxTokens - in_cycle) / cycle) {
      throw UsageError(
          fmt::format("local: position {} of rank {} is beyond token 2^63-1", local, rank));
    }
    return local / interleave() * cycle + in_cycle;
  }

  /// Tokens on a rank of a sequence of `length` tokens; 0 where the sequence does not reach it.
  /// @throw UsageError if `length` is negative or the rank is not in the group.
  [[nodiscard]] std::int64_t local_count(std::int64_t length, int rank) const {
    check_not_negative("length", length);
    check_rank(rank);
    return placement_.local_count(length, rank);
  }

  /// `local_count` for each sequence of a batch.
  /// @param lengths  [B] tokens per sequence.
  /// @param rank     Whose tokens are counted.
  /// @param counts   [B], written; may be `lengths`.
  /// @throw UsageError as `local_count`, or if the sizes differ; nothing is written then.
  void local_counts(std::span<const std::int64_t> lengths, int rank,
                    std::span<std::int64_t> counts) const {
    if (counts.size() != lengths.size()) {
      throw UsageError(fmt::format("counts: expected {} elements, one a sequence, got {}",
                                   lengths.size(), counts.size()));
    }
    check_rank(rank);
    for (const std::int64_t length : lengths) {
      check_not_negative("lengths", length);
    }
    std::ranges::transform(lengths, counts.begin(),
                           [this, rank](std::int64_t length) { return local_count(length, rank); });
  }

  /// As above, into a vector.
  [[nodiscard]] std::vector<std::int64_t> local_counts(std::span<const std::int64_t> lengths,
                                                       int rank) const {
    std::vector<std::int64_t> counts(lengths.size());
    local_counts(lengths, rank, counts);
    return counts;
  }

  friend bool operator==(const KvShard&, const KvShard&) noexcept = default;

 private:
  static constexpr std::int64_t kMaxTokens = std::numeric_limits<std::int64_t>::max();

  static void check_not_negative(const char* argument, std::int64_t value) {
    if (value < 0) {
      throw UsageError(fmt::format("{}: expected 0 or more, got {}", argument, value));
    }
  }

  void check_rank(int rank) const {
    if (rank < 0 || rank >= ranks()) {
      throw UsageError(fmt::format("rank: expected 0 to {}, got {}", ranks() - 1, rank));
    }
  }

  KvPlacement placement_;
};

}  // namespace cohort::dcp
