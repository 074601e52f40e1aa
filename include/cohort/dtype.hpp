// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

/// \file
/// Element types, and the 16-bit floats' conversions to and from `float` for the host.

namespace cohort {

/// Types of elements.
enum class DType : std::uint8_t {
  f64,
  f32,
  f16,
  bf16,
  i8,
  u8,
  i32,
  i64,
  f8_e4m3,  ///< moved as bytes; no arithmetic, but what a norm gives may be of it
  f8_e5m2,  ///< moved as bytes; no arithmetic
  b8,       ///< one truth value, in a byte; moved as it is, no arithmetic
  i16,      ///< moved as bytes; no arithmetic
  u16,      ///< moved as bytes; no arithmetic
};

/// Whether it is one of them, and not some other number.
[[nodiscard]] constexpr bool is_dtype(DType dtype) noexcept { return dtype <= DType::u16; }

/// Bytes of one element; 0 of what is no type.
[[nodiscard]] constexpr std::size_t size_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::f64:
    case DType::i64:
      return 8;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::f16:
    case DType::bf16:
    case DType::i16:
    case DType::u16:
      return 2;
    case DType::i8:
    case DType::u8:
    case DType::f8_e4m3:
    case DType::f8_e5m2:
    case DType::b8:
      return 1;
  }
  return 0;
}

/// Such as "bf16".
[[nodiscard]] constexpr std::string_view to_string(DType dtype) noexcept {
  switch (dtype) {
    case DType::f64:
      return "f64";
    case DType::f32:
      return "f32";
    case DType::f16:
      return "f16";
    case DType::bf16:
      return "bf16";
    case DType::i8:
      return "i8";
    case DType::u8:
      return "u8";
    case DType::i32:
      return "i32";
    case DType::i64:
      return "i64";
    case DType::f8_e4m3:
      return "f8_e4m3";
    case DType::f8_e5m2:
      return "f8_e5m2";
    case DType::b8:
      return "b8";
    case DType::i16:
      return "i16";
    case DType::u16:
      return "u16";
  }
  return "unknown";
}

/// Whether reductions accept the type: all but the 8-bit floats, truth values and the 16-bit
/// integers, which NCCL has not.
[[nodiscard]] constexpr bool is_reducible(DType dtype) noexcept {
  switch (dtype) {
    case DType::f8_e4m3:
    case DType::f8_e5m2:
    case DType::b8:
    case DType::i16:
    case DType::u16:
      return false;
    default:
      return true;
  }
}

/// Whether partial attentions may have the type.
[[nodiscard]] constexpr bool is_attention_dtype(DType dtype) noexcept {
  return dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16;
}

/// bfloat16 to float: exact. The format is the upper half of an IEEE 754 binary32.
[[nodiscard]] constexpr float bf16_to_float(std::uint16_t bits) noexcept {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

/// float to bfloat16, to nearest even; NaN stays a quiet NaN of the same sign.
[[nodiscard]] constexpr std::uint16_t float_to_bf16(float value) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
  const std::uint32_t quiet_nan = (bits >> 16) | 0x40U;
  const bool is_nan = (bits & 0x7fffffffU) > 0x7f800000U;
  return static_cast<std::uint16_t>(is_nan ? quiet_nan : rounded);
}

namespace detail {
/// `condition ? yes : no` in arithmetic, so that loops over conversions vectorise.
[[nodiscard]] constexpr std::uint32_t select(bool condition, std::uint32_t yes,
                                             std::uint32_t no) noexcept {
  const std::uint32_t mask = 0U - static_cast<std::uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}
}  // namespace detail

/// IEEE 754 binary16 to float: exact.
[[nodiscard]] constexpr float f16_to_float(std::uint16_t bits) noexcept {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000U) << 16;
  const std::uint32_t magnitude = bits & 0x7fffU;
  // No step has a subnormal float, which threads may have chosen to take for zero: a subnormal
  // half is an integer times 2^-24. Infinity and NaN get all exponent bits.
  const float subnormal = static_cast<float>(static_cast<std::int32_t>(magnitude)) *
                          std::bit_cast<float>((127U - 24U) << 23);
  const std::uint32_t normal = (magnitude << 13) + (112U << 23);
  const std::uint32_t special = detail::select(magnitude >= 0x7c00U, 0x7f800000U, 0U);
  return std::bit_cast<float>(
      sign | special |
      detail::select(magnitude < 0x400U, std::bit_cast<std::uint32_t>(subnormal), normal));
}

/// float to IEEE 754 binary16, to nearest even; overflow gives infinity, NaN stays a quiet NaN.
[[nodiscard]] constexpr std::uint16_t float_to_f16(float value) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000U;
  const std::uint32_t magnitude = bits & 0x7fffffffU;
  const std::uint32_t nan = 0x7e00U | ((magnitude >> 13) & 0x3ffU);
  // Below 2^-14 the result is subnormal: adding 0.5 rounds at 2^-24.
  const std::uint32_t subnormal =
      std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5F) - 0x3f000000U;
  const std::uint32_t rebased = magnitude - (112U << 23);
  const std::uint32_t normal = (rebased + 0xfffU + ((rebased >> 13) & 1U)) >> 13;
  std::uint32_t rounded = detail::select(magnitude < 0x38800000U, subnormal, normal);
  rounded = detail::select(magnitude >= 0x477ff000U, 0x7c00U, rounded);  // from 65520 on: infinity
  rounded = detail::select(magnitude > 0x7f800000U, nan, rounded);
  return static_cast<std::uint16_t>(sign | rounded);
}

/// float to f8_e4m3, to nearest even, within +-448: what lies beyond, infinity too, becomes that;
/// NaN becomes 0x7f. Source: P. Micikevicius et al., "FP8 Formats for Deep Learning", 2022.
[[nodiscard]] constexpr std::uint8_t float_to_f8_e4m3(float value) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 24) & 0x80U;
  const std::uint32_t magnitude = bits & 0x7fffffffU;
  // Below 2^-6 the result is subnormal: adding 2^14 rounds at 2^-9.
  const std::uint32_t small = detail::select(magnitude < 0x3c800000U, magnitude, 0U);
  const std::uint32_t subnormal =
      std::bit_cast<std::uint32_t>(std::bit_cast<float>(small) + 16384.0F) - 0x46800000U;
  const std::uint32_t rebased = magnitude - (120U << 23);
  const std::uint32_t normal = (rebased + 0x7ffffU + ((rebased >> 20) & 1U)) >> 20;
  std::uint32_t rounded = detail::select(magnitude < 0x3c800000U, subnormal, normal);
  rounded = detail::select(magnitude > 0x43e00000U, 0x7eU, rounded);  // beyond 448
  rounded = detail::select(magnitude > 0x7f800000U, 0x7fU, rounded | sign);
  return static_cast<std::uint8_t>(rounded);
}

/// f8_e4m3 to float: exact.
[[nodiscard]] constexpr float f8_e4m3_to_float(std::uint8_t bits) noexcept {
  const std::uint32_t magnitude = bits & 0x7fU;
  const std::uint32_t sign = (bits & 0x80U) << 24;
  const float subnormal = static_cast<float>(magnitude) * std::bit_cast<float>((127U - 9U) << 23);
  const std::uint32_t normal = (magnitude << 20) + (120U << 23);
  const std::uint32_t value =
      detail::select(magnitude < 8, std::bit_cast<std::uint32_t>(subnormal), normal);
  return std::bit_cast<float>(sign | detail::select(magnitude == 0x7fU, 0x7fc00000U, value));
}

/// Host storage of one binary16 element.
struct Half {
  std::uint16_t bits = 0;  ///< The bits as they lie in memory.
  Half() = default;
  /// Rounds to nearest, ties to even.
  constexpr explicit Half(float value) noexcept : bits(float_to_f16(value)) {}
  /// Exact.
  [[nodiscard]] constexpr explicit operator float() const noexcept { return f16_to_float(bits); }
};

/// Host storage of one bfloat16 element.
struct BFloat16 {
  std::uint16_t bits = 0;  ///< The bits as they lie in memory.
  BFloat16() = default;
  /// Rounds to nearest, ties to even.
  constexpr explicit BFloat16(float value) noexcept : bits(float_to_bf16(value)) {}
  /// Exact.
  [[nodiscard]] constexpr explicit operator float() const noexcept { return bf16_to_float(bits); }
};

namespace detail {
template <class T>
struct DTypeOf;
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::f64;
};
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::f32;
};
template <>
struct DTypeOf<Half> {
  static constexpr DType value = DType::f16;
};
template <>
struct DTypeOf<BFloat16> {
  static constexpr DType value = DType::bf16;
};
template <>
struct DTypeOf<std::int8_t> {
  static constexpr DType value = DType::i8;
};
template <>
struct DTypeOf<std::uint8_t> {
  static constexpr DType value = DType::u8;
};
template <>
struct DTypeOf<std::int32_t> {
  static constexpr DType value = DType::i32;
};
template <>
struct DTypeOf<std::int64_t> {
  static constexpr DType value = DType::i64;
};
}  // namespace detail

/// The element type of a C++ type that the host computes with.
template <class T>
inline constexpr DType dtype_of = detail::DTypeOf<T>::value;

}  // namespace cohort
