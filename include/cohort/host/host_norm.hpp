// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "cohort/dtype.hpp"
#include "cohort/error.hpp"
#include "cohort/float_mode.hpp"
#include "cohort/residual_norm.hpp"
#include "cohort/vectorised.hpp"

/// \file
/// Residual and RMS norm on the host: in fp32 with every row's squares added in one order, so that
/// results are bitwise repeatable.

namespace cohort::host {
namespace detail {

/// Sums of squares that are kept apart, of every 16th element each; they are added in order.
inline constexpr std::int64_t kNormLanes = 16;

/// residual += x, rounded.
template <class T>
struct AddToResidual {
  [[gnu::always_inline]] static void run(T* __restrict residual, const T* __restrict x,
                                         std::int64_t count) noexcept {
    for (std::int64_t i = 0; i < count; ++i) {
      residual[i] = static_cast<T>(static_cast<float>(x[i]) + static_cast<float>(residual[i]));
    }
  }
};

/// Adds the squares of the elements to the lanes.
template <class T>
struct AddSquares {
  [[gnu::always_inline]] static void run(float* __restrict lanes, const T* __restrict x,
                                         std::int64_t count) noexcept {
    const std::int64_t whole = count / kNormLanes * kNormLanes;
    for (std::int64_t i = 0; i < whole; i += kNormLanes) {
      for (std::int64_t l = 0; l < kNormLanes; ++l) {
        const auto value = static_cast<float>(x[i + l]);
        lanes[l] += value * value;
      }
    }
    for (std::int64_t i = whole; i < count; ++i) {
      const auto value = static_cast<float>(x[i]);
      lanes[i - whole] += value * value;
    }
  }
};

/// out = x * factor * weight, rounded.
template <class T>
struct ScaleRow {
  [[gnu::always_inline]] static void run(T* __restrict out, const T* __restrict x,
                                         const T* __restrict weight, float factor,
                                         std::int64_t count) noexcept {
    for (std::int64_t i = 0; i < count; ++i) {
      out[i] = static_cast<T>(static_cast<float>(x[i]) * factor * static_cast<float>(weight[i]));
    }
  }
};

/// The same to f8_e4m3.
template <class T>
struct QuantiseRow {
  [[gnu::always_inline]] static void run(std::uint8_t* __restrict out, const T* __restrict x,
                                         const T* __restrict weight, float factor,
                                         float inverse_scale, std::int64_t count) noexcept {
    for (std::int64_t i = 0; i < count; ++i) {
      out[i] = float_to_f8_e4m3(static_cast<float>(x[i]) * factor * static_cast<float>(weight[i]) *
                                inverse_scale);
    }
  }
};

template <class T>
void norm_rows(const NormArguments& arguments) {
  using cohort::detail::vectorised;
  const auto& [x, norm, out] = arguments;
  const std::int64_t hidden = x.shape()[1];
  const float inverse_scale = norm.scale ? 1.0F / *norm.scale->template data_as<float>() : 1.0F;
  const T* const weight = norm.weight.template data_as<T>();
  for (std::int64_t row = 0; row < x.shape()[0]; ++row) {
    const std::int64_t at = row * hidden;
    T* const residual = norm.residual.template data_as<T>() + at;
    vectorised<AddToResidual<T>>(residual, x.template data_as<T>() + at, hidden);
    const T* const sums = residual;
    float lanes[kNormLanes] = {};
    vectorised<AddSquares<T>>(static_cast<float*>(lanes), sums, hidden);
    float total = 0;
    for (const float lane : lanes) {
      total += lane;
    }
    const float factor = 1.0F / std::sqrt(total / static_cast<float>(hidden) + norm.epsilon);
    if (norm.scale) {
      vectorised<QuantiseRow<T>>(static_cast<std::uint8_t*>(out.data()) + at, sums, weight, factor,
                                 inverse_scale, hidden);
    } else {
      vectorised<ScaleRow<T>>(out.template data_as<T>() + at, sums, weight, factor, hidden);
    }
  }
}

}  // namespace detail

/// Adds `x`, which may be `out`, to the residual and norms that; see `TensorOps::rms_norm`.
inline void norm_rows(const NormArguments& arguments) {
  const DefaultFloatMode mode;
  switch (arguments.x.dtype()) {
    case DType::f32:
      return detail::norm_rows<float>(arguments);
    case DType::f16:
      return detail::norm_rows<Half>(arguments);
    case DType::bf16:
      return detail::norm_rows<BFloat16>(arguments);
    default:
      throw UsageError("rms_norm x: expected f32, f16 or bf16");
  }
}

}  // namespace cohort::host
