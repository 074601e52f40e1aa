// SPDX-License-Identifier: Apache-2.0
#include "attention.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numbers>

#include "numbers.hpp"

namespace dcp_decode {
namespace {

using cohort::LseBase;

constexpr std::int64_t kLanes = 16;  // a constant trip count, which compilers vectorise
constexpr std::int64_t kBlock =
    64;  // tokens whose rows stay in the cache while all heads read them

std::int64_t padded(std::int64_t extent) { return (extent + kLanes - 1) / kLanes * kLanes; }

/// Rows widened to float and padded with zeros to whole lanes: [rows, padded(width)].
std::vector<float> widen(const BFloat16* rows, std::int64_t count, std::int64_t width) {
  std::vector<float> wide(index(count * padded(width)));
  for (std::int64_t r = 0; r < count; ++r) {
    std::transform(rows + r * width, rows + (r + 1) * width, wide.begin() + r * padded(width),
                   [](BFloat16 x) { return float(x); });
  }
  return wide;
}

/// Sums in kLanes partial sums, which are added in order.
float dot(const float* a, const float* b, std::int64_t width) {
  std::array<float, kLanes> sums{};
  for (std::int64_t i = 0; i < width; i += kLanes) {
    for (std::int64_t j = 0; j < kLanes; ++j) {
      sums[index(j)] += a[i + j] * b[i + j];
    }
  }
  float total = 0.0F;
  for (const float sum : sums) {
    total += sum;
  }
  return total;
}

void add_scaled(float* __restrict sums, const float* __restrict row, float scale,
                std::int64_t width) {
  for (std::int64_t i = 0; i < width; i += kLanes) {
    for (std::int64_t j = 0; j < kLanes; ++j) {
      sums[i + j] += scale * row[i + j];
    }
  }
}

/// max that keeps what is not a number.
double larger(double a, double b) {
  return std::isnan(a) || std::isnan(b) ? std::numeric_limits<double>::infinity() : std::max(a, b);
}

/// One head's attention in fp64.
struct Reference {
  std::vector<double> out;
  std::vector<double> magnitude;  ///< sum_t p_t |v_t|: what the output cancels from
  double lse = -std::numeric_limits<double>::infinity();
  double max_score = 0.0;
};

Reference attend(const std::vector<double>& kv, std::int64_t tokens, const std::vector<double>& q,
                 std::int64_t value) {
  const auto width = static_cast<std::int64_t>(q.size());
  Reference reference;
  reference.out.resize(index(value));
  reference.magnitude.resize(index(value));
  std::vector<double> weights(index(tokens));
  for (std::int64_t t = 0; t < tokens; ++t) {
    double score = 0.0;
    double magnitude = 0.0;
    for (std::int64_t i = 0; i < width; ++i) {
      const double term = q[index(i)] * kv[index(t * width + i)];
      score += term;
      magnitude += std::abs(term);
    }
    weights[index(t)] = score * score_scale(width);
    reference.max_score = std::max(reference.max_score, magnitude * score_scale(width));
  }
  if (tokens == 0) {
    return reference;
  }
  const double max = *std::max_element(weights.begin(), weights.end());
  double sum = 0.0;
  for (double& weight : weights) {
    weight = std::exp(weight - max);
    sum += weight;
  }
  reference.lse = max + std::log(sum);
  for (std::int64_t t = 0; t < tokens; ++t) {
    const double share = weights[index(t)] / sum;
    for (std::int64_t i = 0; i < value; ++i) {
      reference.out[index(i)] += share * kv[index(t * width + i)];
      reference.magnitude[index(i)] += share * std::abs(kv[index(t * width + i)]);
    }
  }
  return reference;
}

/// One head's softmax so far, as its online form keeps it: weights are relative to the largest
/// score so far (M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax", 2018,
/// arXiv:1805.02867).
struct Online {
  float max = -std::numeric_limits<float>::infinity();
  float sum = 0.0F;
  std::vector<float> sums;  ///< [padded(value)]: weighted values

  /// Takes in rows [tokens, step] with their scores, which become weights.
  void add(const float* rows, std::int64_t step, std::span<float> scores) {
    const float largest = std::max(max, *std::max_element(scores.begin(), scores.end()));
    if (const float shrink = std::exp(max - largest); shrink != 1.0F) {
      sum *= shrink;
      for (float& value : sums) {
        value *= shrink;
      }
    }
    max = largest;
    for (std::size_t t = 0; t < scores.size(); ++t) {
      const float weight = std::exp(scores[t] - max);
      sum += weight;
      add_scaled(sums.data(), rows + static_cast<std::int64_t>(t) * step, weight,
                 static_cast<std::int64_t>(sums.size()));
    }
  }
};

}  // namespace

double score_scale(std::int64_t width) { return 1.0 / std::sqrt(static_cast<double>(width)); }

void local_attention(const Rows& kv, HeadRows<const BFloat16> q, std::int64_t heads,
                     std::int64_t value, double scale, LseBase base, HeadRows<BFloat16> out,
                     float* lse) {
  const std::int64_t tokens = kv.tokens();
  const std::int64_t step = padded(kv.width);
  std::vector<float> queries;
  for (std::int64_t h = 0; h < heads; ++h) {
    const auto wide = widen(q[h], 1, kv.width);
    queries.insert(queries.end(), wide.begin(), wide.end());
  }
  std::vector<Online> softmax(index(heads),
                              Online{.sums = std::vector<float>(index(padded(value)))});
  std::array<float, kBlock> scores{};
  for (std::int64_t first = 0; first < tokens; first += kBlock) {
    const std::int64_t count = std::min(kBlock, tokens - first);
    const auto rows = widen(kv.data.data() + first * kv.width, count, kv.width);
    for (std::int64_t h = 0; h < heads; ++h) {
      for (std::int64_t t = 0; t < count; ++t) {
        scores[index(t)] = dot(&queries[index(h * step)], &rows[index(t * step)], step) *
                           static_cast<float>(scale);
      }
      softmax[index(h)].add(rows.data(), step, std::span(scores).first(index(count)));
    }
  }
  for (std::int64_t h = 0; h < heads; ++h) {
    const Online& done = softmax[index(h)];
    if (tokens == 0) {
      std::fill_n(out[h], value, BFloat16(std::numeric_limits<float>::quiet_NaN()));
      lse[h] = cohort::dcp::kEmptyLse;
      continue;
    }
    std::transform(done.sums.begin(), done.sums.begin() + value, out[h],
                   [&](float sum) { return BFloat16(sum / done.sum); });
    lse[h] = base == LseBase::e ? done.max + std::log(done.sum)
                                : done.max * std::numbers::log2e_v<float> + std::log2(done.sum);
  }
}

void Deviation::include(const Deviation& other) {
  max_rel_error = larger(max_rel_error, other.max_rel_error);
  max_lse_error = larger(max_lse_error, other.max_lse_error);
  max_score = std::max(max_score, other.max_score);
  max_lse = std::max(max_lse, other.max_lse);
  max_tokens = std::max(max_tokens, other.max_tokens);
}

Deviation compare(const Rows& kv, const BFloat16* nope, const BFloat16* pe, std::int64_t heads,
                  std::int64_t latent, std::int64_t value, LseBase base, const BFloat16* merged,
                  const float* merged_lse) {
  const auto to_double = [](BFloat16 x) { return static_cast<double>(static_cast<float>(x)); };
  std::vector<double> rows(kv.data.size());
  std::transform(kv.data.begin(), kv.data.end(), rows.begin(), to_double);
  const std::int64_t rope = kv.width - latent;

  Deviation seen{.max_tokens = kv.tokens()};
  std::vector<double> q(index(kv.width));
  for (std::int64_t h = 0; h < heads; ++h) {
    std::transform(nope + h * latent, nope + (h + 1) * latent, q.begin(), to_double);
    std::transform(pe + h * rope, pe + (h + 1) * rope, q.begin() + latent, to_double);
    const Reference reference = attend(rows, kv.tokens(), q, value);
    Deviation head{.max_score = reference.max_score};
    for (std::int64_t i = 0; i < value; ++i) {
      const double error = std::abs(to_double(merged[h * value + i]) - reference.out[index(i)]);
      const double magnitude = reference.magnitude[index(i)];
      // Where every weighted value is 0, only 0 is right.
      head.max_rel_error = larger(head.max_rel_error, error == 0.0 ? 0.0 : error / magnitude);
    }
    const double lse =
        static_cast<double>(merged_lse[h]) * (base == LseBase::e ? 1.0 : std::numbers::ln2);
    if (kv.tokens() == 0) {
      head.max_lse_error = lse == reference.lse ? 0.0 : std::numeric_limits<double>::infinity();
    } else {
      head.max_lse_error = larger(0.0, std::abs(lse - reference.lse));
      head.max_lse = std::abs(reference.lse);
    }
    seen.include(head);
  }
  return seen;
}

Bounds bounds(const Deviation& seen, std::int64_t width, int ranks) {
  // Errors relative to a = sum_t p_t |v_t|, which is at least the sum of what the ranks'
  // partials contribute by magnitude. u is the unit roundoff of a format: half the distance
  // from 1 to the next number.
  //
  // bf16: each rank rounds its partial once, which moves the merge by at most u * a, and the merged
  // value is rounded once more, by at most u * (1 + u) * a: together 2u + u^2.
  //
  // fp32, to first order:
  //   score     a product of q and k passes width/16 additions in its lane, 15 across the lanes and
  //             two multiplications; with the subtraction of the maximum, whose operands are at
  //             most S = max_score:  (width/16 + 19) u S
  //   weight    the score's error, exp within 2 units in the last place (4u), and for each block
  //             that brings a larger score another subtraction, exp and multiplication; the
  //             maxima rise by 2S in all:  w = scores + (4 + 5 blocks + 2S) u
  //   partial   weights in numerator and normaliser, a sum over the tokens in each, multiplication
  //             and division:  2w + (2 tokens + 3) u
  //   LSE       the normaliser's error, log, the maximum's conversion to the base, their addition:
  //             w + (tokens + 4 + 2L) u, with L = max_lse
  //   merge     scales from the difference of LSEs (2L u more), exp, twice for numerator and
  //             normaliser; sums over the ranks: 2 (LSE + (2L + 4) u) + (2 ranks + 3) u
  // The merged LSE collects no more than that.
  constexpr double kBf16 = 0x1p-8;
  constexpr double kFp32 = 0x1p-24;
  const auto terms = padded(width) / kLanes + 19;
  const double scores = static_cast<double>(terms) * seen.max_score * kFp32;
  const auto tokens = static_cast<double>(seen.max_tokens);
  const auto blocks = static_cast<double>((seen.max_tokens + kBlock - 1) / kBlock);
  const double weight = scores + (4 + 5 * blocks + 2 * seen.max_score) * kFp32;
  const double partial = 2 * weight + (2 * tokens + 3) * kFp32;
  const double lse = weight + (tokens + 4 + 2 * seen.max_lse) * kFp32;
  const double merge = 2 * (lse + (2 * seen.max_lse + 4) * kFp32) + (2 * ranks + 3) * kFp32;
  const double fp32 = (partial + merge) * 1.01;  // products of the small terms
  return {.rel_error = 2 * kBf16 + kBf16 * kBf16 + fp32 * (1 + 2 * kBf16) * (1 + kBf16),
          .lse_error = fp32};
}

}  // namespace dcp_decode
