// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cohort/dcp/lse_merge.hpp>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "support/catch.hpp"

// Merged partials of a sequence that is shared out, against attention over all of it.

using namespace cohort;
using namespace cohort::dcp;

namespace {

// Attention of one head over tokens with these scores and values, in fp64, by the definition.
struct Attention {
  std::vector<double> out;
  double lse = 0;  // base e
};

Attention attend(const std::vector<double>& scores, const std::vector<std::vector<double>>& values,
                 const std::vector<std::size_t>& tokens, std::size_t dim) {
  double max = -std::numeric_limits<double>::infinity();
  for (const std::size_t t : tokens) {
    max = std::max(max, scores[t]);
  }
  double mass = 0;
  Attention result{std::vector<double>(dim, 0.0), 0};
  for (const std::size_t t : tokens) {
    const double p = std::exp(scores[t] - max);
    mass += p;
    for (std::size_t d = 0; d < dim; ++d) {
      result.out[d] += p * values[t][d];
    }
  }
  for (double& element : result.out) {
    element /= mass;
  }
  result.lse = max + std::log(mass);
  return result;
}

// Of elements up to about 4, inputs and result rounded to 2^-11 or 2^-8 each.
template <class T>
constexpr double kFromFullAttention = 4 * 4e-6;
template <>
constexpr double kFromFullAttention<Half> = 4 * 1.5e-3;
template <>
constexpr double kFromFullAttention<BFloat16> = 4 * 1.2e-2;

// Shards a random sequence of `tokens` tokens over n ranks, merges the partials, and compares with
// the attention over everything.
template <class T>
void check_against_full_attention(int n, std::size_t tokens, LseBase base, unsigned seed) {
  constexpr std::size_t kDim = 70;  // a full block and a partial one
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<double> scores(tokens);
  std::vector<std::vector<double>> values(tokens, std::vector<double>(kDim));
  for (std::size_t t = 0; t < tokens; ++t) {
    scores[t] = 4 * normal(random);
    for (double& value : values[t]) {
      value = normal(random);
    }
  }
  std::vector<std::size_t> everything(tokens);
  for (std::size_t t = 0; t < tokens; ++t) {
    everything[t] = t;
  }
  const double log2_e = 1.0 / std::log(2.0);
  const double to_base = base == LseBase::e ? 1.0 : log2_e;
  std::vector<std::vector<T>> rows;
  std::vector<float> lses;
  for (int r = 0; r < n; ++r) {
    std::vector<std::size_t> own;
    for (std::size_t t = static_cast<std::size_t>(r); t < tokens;
         t += static_cast<std::size_t>(n)) {
      own.push_back(t);
    }
    std::vector<T> row(kDim,
                       T(std::numeric_limits<float>::quiet_NaN()));  // a rank without tokens leaves
                                                                     // its output undefined
    float lse = kEmptyLse;
    if (!own.empty()) {
      const Attention part = attend(scores, values, own, kDim);
      for (std::size_t d = 0; d < kDim; ++d) {
        row[d] = T(static_cast<float>(part.out[d]));
      }
      lse = static_cast<float>(part.lse * to_base);
    }
    rows.push_back(std::move(row));
    lses.push_back(lse);
  }

  std::vector<float> scales(lses.size());
  float lse = 0;
  merge_weights(lses.data(), n, base, scales.data(), &lse);
  std::vector<const T*> at;
  for (const auto& row : rows) {
    at.push_back(row.data());
  }
  std::vector<T> out(kDim, T(-77.0F));
  merge_row(at.data(), scales.data(), n, out.data(), static_cast<std::int64_t>(kDim));
  const Attention full = attend(scores, values, everything, kDim);
  double worst = 0;
  for (std::size_t d = 0; d < kDim; ++d) {
    worst =
        std::max(worst, std::abs(static_cast<double>(static_cast<float>(out[d])) - full.out[d]));
  }
  INFO("ranks " << n << " tokens " << tokens << " base " << static_cast<int>(base));
  CHECK(worst <= kFromFullAttention<T>);
  CHECK(std::abs(static_cast<double>(lse) - full.lse * to_base) <= 4e-6 * (1 + std::abs(full.lse)));
}

}  // namespace

TEST_CASE("merging shards equals attention over everything", "[lse_merge]") {
  for (const LseBase base : {LseBase::e, LseBase::two}) {
    for (int n = 1; n <= 16; ++n) {
      for (const std::size_t tokens : {std::size_t{1}, std::size_t{5}, std::size_t{64}}) {
        const auto seed = static_cast<unsigned>(n) * 100 + static_cast<unsigned>(tokens);
        check_against_full_attention<float>(n, tokens, base, seed);
        check_against_full_attention<Half>(n, tokens, base, seed);
        check_against_full_attention<BFloat16>(n, tokens, base, seed);
      }
    }
  }
}
