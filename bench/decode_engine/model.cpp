// SPDX-License-Identifier: Apache-2.0
#include "model.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

#include "cohort/error.hpp"
#include "dcp_decode/numbers.hpp"

namespace decode_engine {

namespace {

using dcp_decode::Numbers;

std::uint64_t key(std::int64_t value) { return static_cast<std::uint64_t>(value); }

/// Of the numbers that a part's elements are made of.
std::uint64_t key_of(Part part, std::int64_t layer) {
  return (key(layer) << 8) | static_cast<std::uint64_t>(part);
}

bool is_gain(Part part) {
  return part == Part::attention_gain || part == Part::query_gain || part == Part::kv_gain ||
         part == Part::inner_gain || part == Part::final_gain;
}

class RandomModel final : public Model {
 public:
  using Model::Model;

  void fill(Part part, std::int64_t layer, std::int64_t row, std::int64_t first_column,
            std::span<BFloat16> elements) const override {
    const Noise noise = noise_of(part, layer);
    const Numbers numbers = noise.row(row);
    for (std::size_t i = 0; i < elements.size(); ++i) {
      elements[i] = BFloat16(noise.element(numbers, first_column + static_cast<std::int64_t>(i)));
    }
  }
  [[nodiscard]] std::optional<Noise> noise(Part part, std::int64_t layer) const override {
    return noise_of(part, layer);
  }

 private:
  [[nodiscard]] Noise noise_of(Part part, std::int64_t layer) const {
    return {.seed = seed(),
            .key = key_of(part, layer),
            .offset = is_gain(part) ? 1.0 : 0.0,
            .size = is_gain(part) ? 0.1 : kUnitNoise * scale(part)};
  }
  [[nodiscard]] double scale(Part part) const {
    const double fan_in = 1.0 / std::sqrt(static_cast<double>(columns(part)));
    switch (part) {
      case Part::embedding:
        return 1.0;
      case Part::output:
      case Part::down:  // the sum of all layers' contributions keeps its size
        return fan_in / std::sqrt(2.0 * static_cast<double>(sizes().layers));
      case Part::query_up:
        return 2.0 * fan_in;  // some tokens then matter more than others
      default:
        return fan_in;
    }
  }
};

/// The hidden state of `CopyModel`, in codes of K elements: the token itself, the one before it,
/// what the last attention found, what the head reads; then a constant.
class CopyModel final : public Model {
 public:
  CopyModel(const Sizes& sizes, std::uint64_t seed)
      : Model(sizes, seed), code_(sizes.nope), last_(sizes.layers - 1) {
    const auto refuse = [](const std::string& what) {
      throw cohort::ConfigError("the copying model: expected " + what);
    };
    if (!std::has_single_bit(key(code_)) || sizes.vocabulary > code_) {
      refuse(fmt::format("a power of two of nope, not below the vocabulary, got {} and {}", code_,
                         sizes.vocabulary));
    }
    if (sizes.hidden < 4 * code_ + 1 || sizes.latent < 2 * code_ || sizes.query_rank <= code_ ||
        sizes.heads * sizes.value != code_ || sizes.inner < code_ || sizes.layers < 2 ||
        sizes.rope < 8) {
      refuse(
          fmt::format("hidden > {}, latent >= {}, query_rank > {}, heads * value = {}, inner >= "
                      "{}, layers >= 2, rope >= 8",
                      4 * code_, 2 * code_, code_, code_, code_));
    }
  }

  void fill(Part part, std::int64_t layer, std::int64_t row, std::int64_t first_column,
            std::span<BFloat16> elements) const override {
    const Numbers numbers(seed(), key_of(part, layer), key(row));
    for (std::size_t i = 0; i < elements.size(); ++i) {
      const std::int64_t column = first_column + static_cast<std::int64_t>(i);
      const double noise =
          kNoise / std::sqrt(static_cast<double>(columns(part))) * numbers(key(column));
      elements[i] = BFloat16(static_cast<float>(by_hand(part, layer, row, column) + noise));
    }
  }

 private:
  static constexpr double kNoise = 0.15;
  static constexpr double kConstant = 4;  // of the hidden state; other elements are +-1

  /// Codes of different tokens are orthogonal.
  [[nodiscard]] double code(std::int64_t token, std::int64_t i) const {
    return std::popcount(key(token & i)) % 2 == 0 ? 1 : -1;
  }
  /// 1 where a row takes an element over.
  [[nodiscard]] static double same(std::int64_t a, std::int64_t b) { return a == b ? 1 : 0; }
  /// The root mean square of the hidden state in a layer, by what is known of it.
  [[nodiscard]] double size_of_hidden(std::int64_t layer) const {
    const double codes = layer == 0 ? 1 : 2;
    return std::sqrt((codes * static_cast<double>(code_) + kConstant * kConstant) /
                     static_cast<double>(sizes().hidden));
  }

  [[nodiscard]] double by_hand(Part part, std::int64_t layer, std::int64_t row,
                               std::int64_t column) const {
    const std::int64_t k = code_;
    const std::int64_t constant = 4 * k;  // its place in the hidden state
    const std::int64_t repeats = sizes().inner / k;
    const double normalized = kConstant / size_of_hidden(layer);
    switch (part) {
      case Part::embedding:
        return column < k ? code(row, column) : column == constant ? kConstant : 0;
      case Part::query_down:  // the code, then the constant as large as an element of it
        return row < k ? same(row, column) : same(column, constant) / kConstant;
      case Part::kv_down:
        return row < 2 * k            ? same(row, column)
               : row < sizes().latent ? 0
               : (row - sizes().latent) % 2 == 0
                   ? same(column, constant) * kKey / (kConstant / size_of_hidden(0))
                   : 0;
      case Part::query_up:
        return query_up(layer, row % sizes().key(), column);
      case Part::key_up:
        return same(row % sizes().latent, k + column);
      case Part::value_up:
        return same(row, column) * (layer == 0 ? value_size() : 1);
      case Part::output:
        return layer == 0 ? same(row, k + column) : layer == last_ ? same(row, 2 * k + column) : 0;
      case Part::gate:  // far right, where a SiLU is all but the identity
        return layer == last_ ? same(column, constant) * kGate / normalized : 0;
      case Part::up:
        return layer == last_ && row < sizes().inner / k * k ? same(2 * k + row % k, column) : 0;
      case Part::down:
        return layer == last_ && row >= 3 * k && row < 4 * k && column < repeats * k
                   ? same(row - 3 * k, column % k) / (kGate * static_cast<double>(repeats))
                   : 0;
      case Part::head:
        return column >= 3 * k && column < 4 * k
                   ? kLogit * code(row, column - 3 * k) / static_cast<double>(k)
                   : 0;
      default:
        return 1;  // gains
    }
  }

  /// From latents whose elements have a root mean square of 1: codes then are of that size, as the
  /// rest is nearly 0.
  [[nodiscard]] double query_up(std::int64_t layer, std::int64_t row, std::int64_t column) const {
    const double scale = 1 / std::sqrt(static_cast<double>(sizes().key()));
    if (row < sizes().nope) {  // the score of a match is kMatch, other scores are 0
      return layer == last_ ? same(row, column) * kMatch / (scale * static_cast<double>(code_)) : 0;
    }
    if (layer != 0 || column < code_) {
      return 0;
    }
    // A constant, turned back by one position: the score of a token at distance d is
    // sum_j kPair * cos(frequency_j * (d - 1)).
    const std::int64_t i = row - sizes().nope;
    const std::int64_t even = i / 2 * 2;
    const double angle =
        std::pow(10000.0, -static_cast<double>(even) / static_cast<double>(sizes().rope));
    const double size = kPair / (scale * kKey) / static_cast<double>(sizes().query_rank - code_);
    return size * (i % 2 == 0 ? std::cos(angle) : -std::sin(angle));
  }
  /// Of the second half of layer 0's latents nothing is known but that they are nearly 0.
  [[nodiscard]] double value_size() const {
    return std::sqrt(static_cast<double>(code_) / static_cast<double>(sizes().latent));
  }

  static constexpr double kKey = 4;
  static constexpr double kPair = 40;
  static constexpr double kMatch = 24;
  static constexpr double kGate = 4;
  static constexpr double kLogit = 5;

  std::int64_t code_;
  std::int64_t last_;
};

}  // namespace

std::int64_t Model::columns(Part part) const noexcept {
  switch (part) {
    case Part::query_gain:
      return sizes_.query_rank;
    case Part::query_up:
      return sizes_.query_input();
    case Part::kv_gain:
    case Part::value_up:
      return sizes_.latent;
    case Part::key_up:
      return sizes_.nope;
    case Part::output:
      return sizes_.heads * sizes_.value;
    case Part::down:
      return sizes_.inner;
    default:
      return sizes_.hidden;
  }
}

std::vector<BFloat16> Model::block(Part part, std::int64_t layer, const Block& block) const {
  std::vector<BFloat16> elements(index(block.elements()));
  for (std::int64_t r = 0; r < block.rows; ++r) {
    fill(part, layer, block.first_row + r, block.first_column,
         std::span(elements).subspan(index(r * block.columns), index(block.columns)));
  }
  return elements;
}

double Model::largest_head_norm() const {
  std::vector<BFloat16> row(static_cast<std::size_t>(sizes_.hidden));
  double largest = 0;
  for (std::int64_t token = 0; token < sizes_.vocabulary; ++token) {
    fill(Part::head, 0, token, 0, row);
    double squares = 0;
    for (const BFloat16 element : row) {
      squares += std::pow(static_cast<double>(static_cast<float>(element)), 2);
    }
    largest = std::max(largest, std::sqrt(squares));
  }
  return largest;
}

std::unique_ptr<Model> random_model(const Sizes& sizes, std::uint64_t seed) {
  return std::make_unique<RandomModel>(sizes, seed);
}

std::unique_ptr<Model> copy_model(const Sizes& sizes, std::uint64_t seed) {
  return std::make_unique<CopyModel>(sizes, seed);
}

CopyTask::CopyTask(const Sizes& sizes, std::uint64_t seed, std::int64_t sequence)
    : cycle_(static_cast<std::size_t>(sizes.vocabulary - 1)) {
  std::iota(cycle_.begin(), cycle_.end(), 1);
  const Numbers numbers(seed, 0xc0b7, key(sequence));
  const auto below = [&](std::uint64_t number, std::size_t end) {
    return std::min(static_cast<std::size_t>((numbers(number) + 1) / 2 * static_cast<double>(end)),
                    end - 1);
  };
  for (std::size_t i = cycle_.size(); i > 1; --i) {
    std::swap(cycle_[i - 1], cycle_[below(i, i)]);
  }
  cycle_.resize(3 + below(0, cycle_.size() - 2));
}

std::int64_t CopyTask::prompt_length() const noexcept {
  return static_cast<std::int64_t>(cycle_.size()) + 2;
}

std::int64_t CopyTask::token(std::int64_t position) const {
  return position == 0 ? 0 : cycle_[static_cast<std::size_t>(position - 1) % cycle_.size()];
}

}  // namespace decode_engine
