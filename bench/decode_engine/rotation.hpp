// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

/// \file
/// Constants of the architecture. Pure.

namespace decode_engine {

/// Added to the mean square that a row is divided by the root of.
inline constexpr double kNormEpsilon = 1e-6;

/// Of the angles.
inline constexpr double kRotationBase = 10000;

/// By which pair `pair` of `elements` rotated ones turns at a position (J. Su et al., "RoFormer",
/// 2021, arXiv:2104.09864, with the pairs side by side).
[[nodiscard]] inline double rotation_angle(std::int64_t pair, std::int64_t elements,
                                           std::int64_t position) {
  return static_cast<double>(position) *
         std::pow(kRotationBase, -2.0 * static_cast<double>(pair) / static_cast<double>(elements));
}

}  // namespace decode_engine
