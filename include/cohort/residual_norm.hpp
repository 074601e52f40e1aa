// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cstdint>
#include <optional>

#include "cohort/hash.hpp"
#include "cohort/tensor.hpp"

/// \file
/// What follows an all-reduce in every layer of a model: the residual is added and the sum normed.

namespace cohort {

/// A residual and the RMS norm of what it becomes (B. Zhang and R. Sennrich, "Root Mean Square
/// Layer Normalization", 2019): of B rows of a model's hidden size.
struct ResidualNorm {
  TensorView residual;                        ///< [B, hidden], read and written, without gaps.
  ConstTensorView weight;                     ///< [hidden] in the type of the residual.
  float epsilon = 1e-6F;                      ///< Equal on all ranks; at least 0.
  std::optional<ConstTensorView> scale = {};  ///< [1] in f32, of the device: of an fp8 output.
};

/// The same with what is added and where the normed rows go, as transports and backends get it,
/// which has been checked.
struct NormArguments {
  ConstTensorView x;  ///< [B, hidden]: f32, f16 or bf16, without gaps.
  ResidualNorm norm;  ///< In the type of `x`.
  TensorView out;     ///< [B, hidden] in that type or f8_e4m3, without gaps.

  /// What ranks have to agree on besides the sum's bytes and type: the rows' length, the output's
  /// type and epsilon. Not 0, as it is of a sum of which nothing is normed.
  [[nodiscard]] std::int64_t form() const noexcept {
    std::uint64_t form = detail::mix(detail::kHashSeed, static_cast<std::uint64_t>(x.shape()[1]));
    form = detail::mix(form, static_cast<std::uint64_t>(out.dtype()));
    form = detail::mix(form, std::bit_cast<std::uint32_t>(norm.epsilon));
    return static_cast<std::int64_t>(form | 1);
  }
};

}  // namespace cohort
