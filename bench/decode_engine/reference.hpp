// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "model.hpp"

/// \file
/// The same model in fp64 and the way textbooks write it: keys and values of every head are formed
/// from the latents and kept, nothing is absorbed, nothing is rounded but the weights, which are
/// bf16.

namespace decode_engine {

class Reference {
 public:
  Reference(const Model& model, std::int64_t batch);
  Reference(const Reference&) = delete;
  Reference& operator=(const Reference&) = delete;
  ~Reference();

  /// Logits [batch, vocabulary] behind one more token of every sequence.
  [[nodiscard]] std::vector<double> step(std::span<const std::int32_t> tokens);

 private:
  struct Layer;
  struct Keys;

  [[nodiscard]] std::vector<double> matrix(Part part, std::int64_t layer, std::int64_t rows) const;
  void attend(const Layer& layer, Keys& keys, std::vector<double>& hidden) const;
  void transform(const Layer& layer, std::vector<double>& hidden) const;

  const Model& model_;
  std::vector<Layer> layers_;
  std::vector<std::vector<Keys>> keys_;  ///< [sequence][layer]
  std::vector<double> embedding_, final_gain_, head_;
};

}  // namespace decode_engine
