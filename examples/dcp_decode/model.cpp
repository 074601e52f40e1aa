// SPDX-License-Identifier: Apache-2.0
#include "model.hpp"

#include <algorithm>
#include <cmath>

#include "numbers.hpp"

namespace dcp_decode {
namespace {

// Which family of numbers a key belongs to.
enum Family : std::uint64_t { kTokens, kPositions, kLengths, kContext, kQuery, kKv, kOutput };

const double kUnit = std::sqrt(3.0);  // makes the root mean square of [-1, 1) one
// Scores then have a standard deviation of about 3: a few tokens carry most of the weight, as in
// trained models, and a rank that is left out shows.
constexpr double kSharpness = 3.0;

std::uint64_t key(std::int64_t value) { return static_cast<std::uint64_t>(value); }

}  // namespace

std::vector<std::int64_t> ragged_lengths(std::int64_t batch, std::int64_t context,
                                         std::uint64_t seed) {
  std::vector<std::int64_t> lengths;
  for (std::int64_t b = 0; b < batch; ++b) {
    const double share = (uniform(seed, kLengths, key(b), 0) + 1.0) / 2.0;
    const auto drawn = static_cast<std::int64_t>(share * static_cast<double>(context));
    lengths.push_back(b < 3 && b + 1 < batch ? std::min(b, context) : drawn);
  }
  lengths.back() = context;
  return lengths;
}

Layer::Layer(const ModelShape& shape, std::uint64_t seed, int stage, std::int64_t first_head,
             std::int64_t own_heads)
    : shape_(shape),
      seed_(seed),
      stage_(key(stage)),
      first_head_(first_head),
      own_heads_(own_heads) {
  const double per_head = 1.0 / std::sqrt(static_cast<double>(shape.heads));
  for (std::int64_t h = first_head; h < first_head + own_heads; ++h) {
    for (std::int64_t i = 0; i < shape.width(); ++i) {
      const std::uint64_t head = stage_ << 32 | key(h);
      query_gain_.push_back(
          static_cast<float>(kSharpness * kUnit * uniform(seed, kQuery, head, key(i))));
      output_gain_.push_back(
          static_cast<float>(per_head * kUnit * uniform(seed, kOutput, head, key(i))));
    }
  }
  for (std::int64_t i = 0; i < shape.width(); ++i) {
    kv_gain_.push_back(static_cast<float>(kUnit * uniform(seed, kKv, stage_, key(i))));
  }
}

void Layer::embed(std::int64_t token, std::int64_t position, std::span<BFloat16> hidden) const {
  for (std::size_t i = 0; i < hidden.size(); ++i) {
    hidden[i] = BFloat16(static_cast<float>(uniform(seed_, kTokens, key(token), i) +
                                            uniform(seed_, kPositions, key(position), i)));
  }
}

void Layer::query(std::span<const BFloat16> hidden, BFloat16* nope, BFloat16* pe) const {
  const std::int64_t width = shape_.width();
  for (std::int64_t h = 0; h < own_heads_; ++h) {
    const std::int64_t rotation = 7 * (first_head_ + h);
    for (std::int64_t i = 0; i < width; ++i) {
      const BFloat16 q(static_cast<float>(hidden[index((i + rotation) % width)]) *
                       query_gain_[index(h * width + i)]);
      if (i < shape_.latent) {
        nope[h * shape_.latent + i] = q;
      } else {
        pe[h * shape_.rope + i - shape_.latent] = q;
      }
    }
  }
}

void Layer::kv_row(std::span<const BFloat16> hidden, std::span<BFloat16> row) const {
  for (std::size_t i = 0; i < row.size(); ++i) {
    row[i] = BFloat16(static_cast<float>(hidden[i]) * kv_gain_[i]);
  }
}

void Layer::context_row(std::int64_t sequence, std::int64_t token, std::span<BFloat16> row) const {
  const std::uint64_t place = (stage_ << 56) ^ (key(sequence) << 32) ^ key(token);
  for (std::size_t i = 0; i < row.size(); ++i) {
    row[i] = BFloat16(static_cast<float>(kUnit * uniform(seed_, kContext, place, i)));
  }
}

void Layer::project(const BFloat16* merged, std::span<float> partial) const {
  const std::int64_t width = shape_.width();
  std::fill(partial.begin(), partial.end(), 0.0F);
  for (std::int64_t h = 0; h < own_heads_; ++h) {
    for (std::int64_t i = 0; i < width; ++i) {
      const std::int64_t from = (i + first_head_ + h) % shape_.value;
      partial[index(i)] +=
          static_cast<float>(merged[h * shape_.value + from]) * output_gain_[index(h * width + i)];
    }
  }
}

void Layer::add_and_normalize(std::span<BFloat16> hidden, std::span<const float> projected) const {
  std::vector<float> sums;
  double squares = 0.0;
  for (std::size_t i = 0; i < hidden.size(); ++i) {
    sums.push_back(static_cast<float>(hidden[i]) + projected[i]);
    squares += static_cast<double>(sums.back()) * static_cast<double>(sums.back());
  }
  const double scale = 1.0 / std::sqrt(squares / static_cast<double>(hidden.size()) + 1e-6);
  for (std::size_t i = 0; i < hidden.size(); ++i) {
    hidden[i] = BFloat16(sums[i] * static_cast<float>(scale));
  }
}

std::int64_t Layer::choose_token(std::span<const BFloat16> hidden) {
  const auto largest = std::max_element(hidden.begin(), hidden.end(), [](BFloat16 a, BFloat16 b) {
    return static_cast<float>(a) < static_cast<float>(b);
  });
  return largest - hidden.begin();
}

}  // namespace dcp_decode
