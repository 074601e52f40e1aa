// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cohort/cohort.hpp>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "random.hpp"
#include "support/group_tensors.hpp"
#include "tensors.hpp"

/// \file
/// Random steps of a decode for the merges: what each rank brings, and by fp64 what comes out.

namespace cohort::fuzz::merges {

using test::u;

/// One decode step of a group, and what each rank brings to it.
struct Step {
  std::int64_t batch = 0;
  std::int64_t own = 0;  ///< Heads of a rank.
  std::int64_t value = 0;
  std::int64_t latent = 0;
  std::int64_t rope = 0;
  DType dtype = DType::f32;
  DType nope = DType::f32;
  DType pe = DType::f32;
  LseBase base = LseBase::e;
  int replays = 0;    ///< 0 where it is called eagerly.
  double spread = 8;  ///< The LSEs differ by up to this.
  double offset = 0;
  std::uint64_t values = 0;  ///< Seed of LSEs and elements.
  int emptiness = 2;         ///< Of 8 LSEs, how many are empty.
  std::int64_t splits = 1;
  MergeResult result = MergeResult::by_head;
  bool sink = false;
  std::vector<std::int64_t> counts;  ///< By token.

  struct Share {
    Layout out, lse, merged, merged_lse, nope, pe, query, sink, tokens;
    bool in_window[9] = {};
    bool wants_lse = false;
    bool owning = false;
    bool local_tokens = false;
  };
  std::vector<Share> shares;

  /// The rows that a rank gets.
  [[nodiscard]] dcp::RowBlock<std::int64_t> rows_of(int rank, int n) const {
    return dcp::MergeRows{result, batch, own * n, n, counts, true}.of(rank);
  }
  /// Of the gathered query: bytes, where its parts differ in type.
  [[nodiscard]] DType query() const { return nope == pe ? nope : DType::u8; }
  [[nodiscard]] std::int64_t query_extent() const {
    return nope == pe ? latent + rope
                      : latent * static_cast<std::int64_t>(size_of(nope)) +
                            rope * static_cast<std::int64_t>(size_of(pe));
  }
  /// Whether the step is what the short form of the call can say.
  [[nodiscard]] bool is_simple() const {
    return splits == 1 && result == MergeResult::by_head && !sink;
  }
};

inline constexpr const char* kNames[] = {"out", "lse",   "merged", "merged_lse",  "nope",
                                         "pe",  "query", "sink",   "local_tokens"};

inline std::string to_string(const Step& step, int n) {
  std::string text = fmt::format(
      "B {}, {} heads of {} ranks, D {}, query {} {}+{} {}, {}, base {}, LSEs {} to {}, {} of 8 "
      "empty, "
      "{} "
      "replays, {} splits, {}{} [{}]\n",
      step.batch, step.own * n, n, step.value, step.latent, to_string(step.nope), step.rope,
      to_string(step.pe), to_string(step.dtype), step.base == LseBase::e ? "e" : "2", step.offset,
      step.offset + step.spread, step.emptiness, step.replays, step.splits,
      cohort::to_string(step.result), step.sink ? ", sinks" : "", fmt::join(step.counts, ","));
  for (std::size_t r = 0; r < step.shares.size(); ++r) {
    const auto& share = step.shares[r];
    text += fmt::format("  rank {}: {}{}{}", r, share.owning ? "owning" : "into",
                        share.wants_lse ? " with LSE" : "",
                        share.local_tokens ? " with numbers of tokens" : "");
    const Layout* layouts[] = {&share.out,        &share.lse,  &share.merged,
                               &share.merged_lse, &share.nope, &share.pe,
                               &share.query,      &share.sink, &share.tokens};
    for (std::size_t i = 0; i < std::size(kNames); ++i) {
      text += fmt::format("; {} {}{}", kNames[i], to_string(*layouts[i]),
                          share.in_window[i] ? " in a window" : "");
    }
    text += "\n";
  }
  return text;
}

inline Step draw_step(Random random, int n) {
  Step step;
  step.batch = random.one_in(8) ? 0 : random.between(1, random.one_in(4) ? 33 : 5);
  step.own = random.one_in(10) ? 0 : random.between(1, 4);
  step.value = random.pick({1, 3, 7, 16, 63, 64, 65, 100, 129});
  step.latent = random.pick({0, 1, 5, 16, 33, 128});
  step.rope = random.pick({0, 1, 2, 7, 64});
  step.dtype = random.pick({DType::f32, DType::f16, DType::bf16});
  step.nope = random.one_in(2) ? step.dtype : test::kAllDTypes[random.between(0, 9)];
  step.pe = random.one_in(2) ? step.nope : test::kAllDTypes[random.between(0, 9)];
  step.base = random.pick({LseBase::e, LseBase::two});
  step.replays = random.one_in(3) ? static_cast<int>(random.between(1, 3)) : 0;
  step.spread = random.pick({0.0, 2.0, 8.0, 40.0, 400.0});
  step.offset = random.pick({0.0, -3.0, 1000.0, -20000.0});
  step.values = random.word();
  step.emptiness = random.pick({0, 2, 2, 5, 8});
  const std::int64_t heads = step.own * n;
  step.splits = random.pick({1, 1, 2, 3, 4});
  step.result = random.pick({MergeResult::by_head, MergeResult::by_token, MergeResult::replicated});
  step.sink = random.one_in(2);
  if (step.result == MergeResult::by_token) {
    step.counts.assign(u(n), 0);
    for (std::int64_t b = 0; b < step.batch; ++b) {
      ++step.counts[u(random.one_in(3) ? 0 : random.between(0, n - 1))];
    }
  }
  const bool wants_lse = random.one_in(2);
  for (int r = 0; r < n; ++r) {
    Step::Share share;
    const auto rows = step.rows_of(r, n);
    share.out = draw_layout(random, {step.splits, step.batch, heads, step.value}, 1);
    share.lse = draw_layout(random, {step.splits, step.batch, heads});
    share.merged = draw_layout(random, {rows.tokens, rows.heads, step.value}, 1);
    share.merged_lse = draw_layout(random, {rows.tokens, rows.heads});
    share.sink = draw_layout(random, {heads});
    share.tokens = draw_layout(random, {step.batch});
    share.local_tokens = random.one_in(2);
    share.nope = draw_layout(random, {step.batch, step.own, step.latent}, 1);
    share.pe = draw_layout(random, {step.batch, step.own, step.rope}, 1);
    share.query = draw_layout(random, {step.batch, heads, step.query_extent()}, 1);
    for (bool& in_window : share.in_window) {
      in_window = random.one_in(2);
    }
    // Where all get everything, all get an LSE or none does.
    share.wants_lse = step.result == MergeResult::replicated ? wants_lse : random.one_in(2);
    share.owning = random.one_in(4);
    step.shares.push_back(share);
  }
  const bool owning = random.one_in(4);  // an owning result comes from the arena on every rank
  for (auto& share : step.shares) {
    share.owning = owning;
  }
  return step;
}

inline std::uint64_t hash(const Step& step, int turn, int rank, std::int64_t at) {
  return Random(step.values + static_cast<std::uint64_t>(turn) * 1'000'003 +
                static_cast<std::uint64_t>(rank) * 7'919 + static_cast<std::uint64_t>(at) * 31)
      .word();
}

/// 0 or less where a rank says so and has no tokens.
inline std::int32_t tokens_of(const Step& step, int turn, int rank, std::int64_t token) {
  const std::uint64_t bits = hash(step, turn, rank, -1'000'000 - token);
  return !step.shares[u(rank)].local_tokens || bits % 3 != 0 ? 1 + static_cast<int>(bits >> 8 & 63)
                                                             : -static_cast<int>(bits >> 8 & 1);
}

/// A row of a split counts on from those of the splits before.
inline std::int64_t split_row(const Step& step, int n, std::int64_t split, std::int64_t row) {
  return split * step.batch * step.own * n + row;
}

/// A quarter as the unit, so that all LSEs are exact in fp32; infinities and NaN for no tokens.
inline float lse_of(const Step& step, int turn, int rank, std::int64_t split_row) {
  const std::uint64_t bits = hash(step, turn, rank, -1 - split_row);
  if (static_cast<int>(bits % 8) < step.emptiness) {
    constexpr float kEmpty[] = {
        -std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
        std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()};
    return kEmpty[bits >> 8 & 3];
  }
  const auto quarters = static_cast<std::uint64_t>(step.spread * 4) + 1;
  return static_cast<float>(step.offset + static_cast<double>((bits >> 16) % quarters) / 4);
}

inline float sink_of(const Step& step, int turn, std::int64_t head) {
  const std::uint64_t bits = hash(step, turn, 99, head);
  return bits % 4 == 0 ? -std::numeric_limits<float>::infinity()
                       : static_cast<float>(step.offset + static_cast<double>(bits >> 16 & 31) / 4);
}

inline bool counts(const Step& step, int turn, int n, int rank, std::int64_t split_row) {
  const std::int64_t token = split_row / (step.own * n) % step.batch;
  return std::isfinite(lse_of(step, turn, rank, split_row)) &&
         tokens_of(step, turn, rank, token) > 0;
}

/// In [-2, 2) and exact in every type; NaN where nobody is to read it.
inline double element_of(const Step& step, int turn, int n, int rank, std::int64_t split_row,
                         std::int64_t d) {
  if (!counts(step, turn, n, rank, split_row)) {
    return std::numeric_limits<double>::quiet_NaN();
  }
  return static_cast<double>(hash(step, turn, rank, split_row * step.value + d) % 128) / 32 - 2;
}

struct Expected {
  std::vector<double> weights;  ///< [n, S]
  double lse = -std::numeric_limits<double>::infinity();
};

inline Expected expected_row(const Step& step, int turn, int n, std::int64_t row) {
  constexpr double kNone = -std::numeric_limits<double>::infinity();
  const auto exp = [&](double x) { return step.base == LseBase::e ? std::exp(x) : std::exp2(x); };
  Expected result;
  const double sink = step.sink ? sink_of(step, turn, row % (step.own * n)) : kNone;
  double max = sink;
  for (int r = 0; r < n; ++r) {
    for (std::int64_t s = 0; s < step.splits; ++s) {
      const std::int64_t at = split_row(step, n, s, row);
      result.weights.push_back(counts(step, turn, n, r, at) ? lse_of(step, turn, r, at) : kNone);
      max = std::max(max, result.weights.back());
    }
  }
  double sum = std::isfinite(sink) ? exp(sink - max) : 0;
  for (double& weight : result.weights) {
    weight = std::isfinite(weight) ? exp(weight - max) : 0;
    sum += weight;
  }
  for (double& weight : result.weights) {
    weight = sum == 0 ? 0 : weight / sum;
  }
  if (sum > 0) {
    result.lse = max + (step.base == LseBase::e ? std::log(sum) : std::log2(sum));
  }
  return result;
}

}  // namespace cohort::fuzz::merges
