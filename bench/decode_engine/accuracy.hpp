// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "model.hpp"

/// \file
/// What a way's logits are held to. Pure.

namespace decode_engine {

/// How far a logit computed in bf16 may lie from the exact one.
///
/// A hidden state is the sum of what some 16 roundings a layer went into: after both gains, query,
/// key, partial and merged attention, projections, gates and sums. Of a row-parallel product each
/// rank rounds its part, then the ranks' sum is rounded, and the hidden state with that added to
/// it: one by one, whether one call does both or two; MPI's sums are rounded with the hidden state
/// alone. Each is off by at most u = 2^-8 of its size, by u / sqrt(3) in the mean square; together
/// that is u sqrt(R / 3) of the hidden state for R roundings, which do not know of each other. A
/// logit is its product with a row of the head, so it is off by that times the row's norm; six
/// standard deviations hold for all logits of a run. Where weights sharpen what comes in, as steep
/// attention between tokens of like scores does, that is not a theorem, so the logits of decoded
/// tokens are compared with fp64, and with one rank's, against the same bound.
[[nodiscard]] double logit_bound(const Model& model);

/// Two results of which each is right up to `logit_bound` choose the same token where the first
/// choice is ahead of the second by more than this.
[[nodiscard]] inline double margin_bound(double logit_bound) noexcept { return 2 * logit_bound; }

/// How far the mean loss of so many tokens may lie from one rank's: 1e-3 for the 4096 of 16
/// prompts. Errors of single tokens do not know of each other, so the mean of fewer is as much less
/// certain as the root of their number is smaller.
[[nodiscard]] double loss_bound(std::int64_t tokens);

/// A choice that differs.
struct Exception {
  std::int64_t prompt = 0;
  std::int64_t position = 0;
  std::int32_t chosen = 0;
  std::int32_t expected = 0;
  double margin = 0;  ///< Of one rank's logits.
};

/// One way's decode, against one rank's and against fp64.
struct Findings {
  std::int64_t tokens = 0;  ///< Judged.
  std::int64_t right = 0;   ///< Those that are the token that must follow.
  std::int64_t exact = 0;   ///< Those whose logits were compared with fp64.
  std::vector<Exception> exceptions = {};
  double largest_difference = 0;  ///< Of a logit from one rank's.
  double largest_error = 0;       ///< Of a logit from that in fp64.
  double least_margin = 0;        ///< Of one rank's choices.
  double loss = 0;                ///< Mean of -log of the probability of the next token.
  double expected_loss = 0;       ///< By one rank.
  std::uint64_t bits = 0;         ///< Hash of all logits.
  bool same_on_all_ranks = true;
};

/// FNV-1a over more bytes.
[[nodiscard]] std::uint64_t hash(std::uint64_t so_far, std::span<const std::byte> bytes) noexcept;
inline constexpr std::uint64_t kEmptyHash = 0xcbf29ce484222325ULL;

/// Collects findings position by position.
class Judge {
 public:
  Judge();

  /// A token that was decoded.
  struct Decoded {
    std::int64_t prompt = 0;
    std::int64_t position = 0;
    std::span<const float> logits;    ///< [vocabulary]
    std::span<const float> expected;  ///< One rank's.
    std::span<const double> exact;    ///< Those in fp64, or none.
    std::int32_t chosen = 0;
    std::int32_t expected_choice = 0;
    std::int32_t next = 0;  ///< The token that must follow, or one rank's choice.
  };
  void add(const Decoded& token);
  /// Logits of any position, within a prompt as well.
  void add_bits(std::span<const float> logits) {
    found_.bits = hash(found_.bits, std::as_bytes(logits));
  }
  [[nodiscard]] Findings findings() const;

 private:
  Findings found_;
};

/// Largest logit less the second.
[[nodiscard]] double margin_of(std::span<const float> logits);

/// What is wrong with the findings, or nothing. `must_be_right` where what follows is known,
/// `must_be_exact` where tokens are to be compared with fp64.
[[nodiscard]] std::vector<std::string> faults(const Findings& findings, double logit_bound,
                                              bool must_be_right, bool must_be_exact);

}  // namespace decode_engine
