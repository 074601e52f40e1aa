// SPDX-License-Identifier: Apache-2.0
#include "reference.hpp"

#include <algorithm>
#include <cmath>

#include "rotation.hpp"

namespace decode_engine {

namespace {

using Vector = std::vector<double>;

/// y = w x, with a row of `w` for each element of y.
Vector times(const Vector& w, std::span<const double> x) {
  Vector y(w.size() / x.size());
  for (std::size_t row = 0; row < y.size(); ++row) {
    for (std::size_t i = 0; i < x.size(); ++i) {
      y[row] += w[row * x.size() + i] * x[i];
    }
  }
  return y;
}

Vector normalized(std::span<const double> x, const Vector& gain) {
  double squares = 0;
  for (const double element : x) {
    squares += element * element;
  }
  const double scale = 1 / std::sqrt(squares / static_cast<double>(x.size()) + kNormEpsilon);
  Vector y(x.begin(), x.end());
  for (std::size_t i = 0; i < y.size(); ++i) {
    y[i] *= scale * gain[i];
  }
  return y;
}

void add(Vector& x, const Vector& y) {
  std::transform(x.begin(), x.end(), y.begin(), x.begin(), std::plus<>());
}

void rotate(std::span<double> x, std::int64_t position) {
  for (std::size_t i = 0; i + 1 < x.size(); i += 2) {
    const double angle = rotation_angle(static_cast<std::int64_t>(i / 2),
                                        static_cast<std::int64_t>(x.size()), position);
    const double a = x[i];
    const double b = x[i + 1];
    x[i] = a * std::cos(angle) - b * std::sin(angle);
    x[i + 1] = a * std::sin(angle) + b * std::cos(angle);
  }
}

}  // namespace

struct Reference::Layer {
  Vector attention_gain, query_down, query_gain, query_up, kv_down, kv_gain, key_up, value_up,
      output, inner_gain, gate, up, down;
};

/// Of one sequence in one layer.
struct Reference::Keys {
  std::vector<Vector> keys;    ///< [tokens][heads * (nope + rope)]
  std::vector<Vector> values;  ///< [tokens][heads * value]
  std::int64_t position = 0;
};

Reference::Reference(const Model& model, std::int64_t batch)
    : model_(model),
      embedding_(matrix(Part::embedding, 0, model.sizes().vocabulary)),
      final_gain_(matrix(Part::final_gain, 0, 1)),
      head_(matrix(Part::head, 0, model.sizes().vocabulary)) {
  const Sizes& s = model.sizes();
  for (std::int64_t l = 0; l < s.layers; ++l) {
    layers_.push_back({.attention_gain = matrix(Part::attention_gain, l, 1),
                       .query_down = matrix(Part::query_down, l, s.query_rank),
                       .query_gain = matrix(Part::query_gain, l, s.query_rank > 0 ? 1 : 0),
                       .query_up = matrix(Part::query_up, l, s.heads * s.key()),
                       .kv_down = matrix(Part::kv_down, l, s.row()),
                       .kv_gain = matrix(Part::kv_gain, l, 1),
                       .key_up = matrix(Part::key_up, l, s.heads * s.latent),
                       .value_up = matrix(Part::value_up, l, s.heads * s.value),
                       .output = matrix(Part::output, l, s.hidden),
                       .inner_gain = matrix(Part::inner_gain, l, 1),
                       .gate = matrix(Part::gate, l, s.inner),
                       .up = matrix(Part::up, l, s.inner),
                       .down = matrix(Part::down, l, s.hidden)});
  }
  keys_.resize(index(batch));
  for (auto& sequence : keys_) {
    sequence.resize(layers_.size());
  }
}

Reference::~Reference() = default;

Vector Reference::matrix(Part part, std::int64_t layer, std::int64_t rows) const {
  const auto elements = model_.block(part, layer, {0, rows, 0, model_.columns(part)});
  Vector wide(elements.size());
  std::transform(elements.begin(), elements.end(), wide.begin(),
                 [](BFloat16 x) { return static_cast<double>(static_cast<float>(x)); });
  return wide;
}

void Reference::attend(const Layer& layer, Keys& past, Vector& hidden) const {
  const Sizes& s = model_.sizes();
  const Vector x = normalized(hidden, layer.attention_gain);
  Vector q = times(layer.query_up,
                   s.query_rank > 0 ? normalized(times(layer.query_down, x), layer.query_gain) : x);
  const Vector kv = times(layer.kv_down, x);
  const Vector latent = normalized(std::span(kv).first(index(s.latent)), layer.kv_gain);
  Vector rotated(kv.begin() + s.latent, kv.end());
  rotate(rotated, past.position);

  Vector& keys = past.keys.emplace_back(index(s.heads * s.key()));
  for (std::int64_t h = 0; h < s.heads; ++h) {
    double* key = &keys[index(h * s.key())];
    for (std::int64_t c = 0; c < s.latent; ++c) {
      for (std::int64_t n = 0; n < s.nope; ++n) {
        key[n] += layer.key_up[index((h * s.latent + c) * s.nope + n)] * latent[index(c)];
      }
    }
    std::copy(rotated.begin(), rotated.end(), key + s.nope);
    rotate({&q[index(h * s.key() + s.nope)], index(s.rope)}, past.position);
  }
  past.values.push_back(times(layer.value_up, latent));
  ++past.position;

  Vector merged(index(s.heads * s.value));
  Vector weights(past.keys.size());
  for (std::int64_t h = 0; h < s.heads; ++h) {
    for (std::size_t t = 0; t < weights.size(); ++t) {
      weights[t] = 0;
      for (std::int64_t i = h * s.key(); i < (h + 1) * s.key(); ++i) {
        weights[t] += q[index(i)] * past.keys[t][index(i)];
      }
      weights[t] /= std::sqrt(static_cast<double>(s.key()));
    }
    const double max = *std::max_element(weights.begin(), weights.end());
    double sum = 0;
    for (double& weight : weights) {
      weight = std::exp(weight - max);
      sum += weight;
    }
    for (std::size_t t = 0; t < weights.size(); ++t) {
      for (std::int64_t i = h * s.value; i < (h + 1) * s.value; ++i) {
        merged[index(i)] += weights[t] / sum * past.values[t][index(i)];
      }
    }
  }
  add(hidden, times(layer.output, merged));
}

void Reference::transform(const Layer& layer, Vector& hidden) const {
  const Vector x = normalized(hidden, layer.inner_gain);
  Vector inner = times(layer.gate, x);
  const Vector up = times(layer.up, x);
  for (std::size_t i = 0; i < inner.size(); ++i) {
    inner[i] = inner[i] / (1 + std::exp(-inner[i])) * up[i];
  }
  add(hidden, times(layer.down, inner));
}

Vector Reference::step(std::span<const std::int32_t> tokens) {
  const Sizes& s = model_.sizes();
  Vector logits;
  for (std::size_t b = 0; b < tokens.size(); ++b) {
    const auto row = embedding_.begin() + tokens[b] * s.hidden;
    Vector hidden(row, row + s.hidden);
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      attend(layers_[l], keys_[b][l], hidden);
      transform(layers_[l], hidden);
    }
    const Vector mine = times(head_, normalized(hidden, final_gain_));
    logits.insert(logits.end(), mine.begin(), mine.end());
  }
  return logits;
}

}  // namespace decode_engine
