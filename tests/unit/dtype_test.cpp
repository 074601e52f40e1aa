// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cohort/dtype.hpp>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;

namespace {

// A small binary float format as IEEE 754 defines it, decoded and encoded by its definition: slow,
// with no bit tricks, so that it shares nothing with the conversions it judges.
struct Format {
  int exponent_bits;
  int fraction_bits;
  [[nodiscard]] int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  [[nodiscard]] int max_exponent_field() const { return (1 << exponent_bits) - 1; }
};

constexpr Format kF16{.exponent_bits = 5, .fraction_bits = 10};
constexpr Format kBf16{.exponent_bits = 8, .fraction_bits = 7};

// NaN for NaN patterns; otherwise the exact value, which every double can hold.
double decode(Format format, std::uint16_t bits) {
  const int exponent = (bits >> format.fraction_bits) & format.max_exponent_field();
  const int fraction = bits & ((1 << format.fraction_bits) - 1);
  const double sign = (bits & 0x8000U) != 0 ? -1.0 : 1.0;
  if (exponent == format.max_exponent_field()) {
    return fraction != 0 ? std::numeric_limits<double>::quiet_NaN()
                         : sign * std::numeric_limits<double>::infinity();
  }
  const int implicit = exponent == 0 ? 0 : 1 << format.fraction_bits;
  const int scale = (exponent == 0 ? 1 : exponent) - format.bias() - format.fraction_bits;
  return sign * std::ldexp(static_cast<double>(implicit + fraction), scale);
}

bool same_value(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

bool is_nan_pattern(Format format, std::uint16_t bits) { return std::isnan(decode(format, bits)); }

// The 16-bit pattern nearest to a finite value, ties to even, by comparing with both neighbours.
// Patterns of one sign are ordered like their values; the one after the largest finite is infinity,
// which stands at the value that the next exponent would give.
double decode_unbounded(Format format, std::uint16_t magnitude) {
  const auto infinity =
      static_cast<std::uint16_t>(format.max_exponent_field() << format.fraction_bits);
  return magnitude == infinity ? std::ldexp(1.0, format.bias() + 1) : decode(format, magnitude);
}

std::uint16_t encode_nearest(Format format, float value) {
  const double magnitude = std::fabs(static_cast<double>(value));
  const auto infinity =
      static_cast<std::uint16_t>(format.max_exponent_field() << format.fraction_bits);
  std::uint16_t low = 0;
  std::uint16_t high = infinity;
  if (magnitude >= decode_unbounded(format, high)) {
    low = high;
  }
  while (high - low > 1) {  // invariant: value(low) <= magnitude < value(high)
    const auto middle = static_cast<std::uint16_t>((low + high) / 2);
    (decode_unbounded(format, middle) <= magnitude ? low : high) = middle;
  }
  std::uint16_t nearest = low;
  if (low != high) {
    const double below = magnitude - decode_unbounded(format, low);
    const double above = decode_unbounded(format, high) - magnitude;
    const bool odd = (low & 1U) != 0;
    nearest = below < above || (below == above && !odd) ? low : high;
  }
  return static_cast<std::uint16_t>(nearest | (std::signbit(value) ? 0x8000U : 0U));
}

float from_bits(std::uint32_t bits) {
  float value = 0;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Every 16-bit pattern, its float neighbours, the midpoints to the next pattern and their
// neighbours: all places where rounding can go wrong.
template <class Convert, class Back>
int wrong_roundings(Format format, Convert convert, Back back) {
  const float infinity = std::numeric_limits<float>::infinity();
  int wrong = 0;
  const auto judge = [&](float value) {
    if (!std::isfinite(value)) {
      return;
    }
    wrong += convert(value) != encode_nearest(format, value) ? 1 : 0;
    wrong += convert(-value) != encode_nearest(format, -value) ? 1 : 0;
  };
  for (std::uint32_t bits = 0; bits < 0x8000U; ++bits) {
    const auto pattern = static_cast<std::uint16_t>(bits);
    if (is_nan_pattern(format, pattern)) {
      continue;
    }
    const float value = back(pattern);
    const auto next = static_cast<std::uint16_t>(bits + 1);
    const double middle_exact = (decode_unbounded(format, pattern) +
                                 (is_nan_pattern(format, next) ? decode_unbounded(format, pattern)
                                                               : decode_unbounded(format, next))) /
                                2;
    const auto middle = static_cast<float>(middle_exact);
    for (const float centre : {value, middle}) {
      judge(centre);
      judge(std::nextafter(centre, infinity));
      judge(std::nextafter(centre, -infinity));
    }
  }
  return wrong;
}

template <class Back>
int wrong_decodings(Format format, Back back) {
  int wrong = 0;
  for (std::uint32_t bits = 0; bits <= 0xffffU; ++bits) {
    const auto pattern = static_cast<std::uint16_t>(bits);
    wrong += same_value(static_cast<double>(back(pattern)), decode(format, pattern)) ? 0 : 1;
  }
  return wrong;
}

// Patterns that do not survive the way through float and back.
template <class Convert, class Back>
int wrong_round_trips(Format format, Convert convert, Back back) {
  int wrong = 0;
  for (std::uint32_t bits = 0; bits <= 0xffffU; ++bits) {
    const auto pattern = static_cast<std::uint16_t>(bits);
    const std::uint16_t came_back = convert(back(pattern));
    const bool nan = is_nan_pattern(format, pattern);
    const auto quiet_bit = static_cast<std::uint16_t>(1U << (format.fraction_bits - 1));
    const auto expected = nan ? static_cast<std::uint16_t>(pattern | quiet_bit) : pattern;
    wrong += came_back == expected ? 0 : 1;
  }
  return wrong;
}

// NaN of every payload bit and both signs must stay a quiet NaN of the same sign.
template <class Convert>
int wrong_nans(Format format, Convert convert) {
  int wrong = 0;
  for (std::uint32_t sign : {0U, 0x80000000U}) {
    for (std::uint32_t payload :
         {0x400000U, 0x7fffffU, 0x000001U, 0x001000U, 0x002000U, 0x00ffffU, 0x010000U, 0x3fffffU}) {
      const std::uint16_t bits = convert(from_bits(sign | 0x7f800000U | payload));
      const bool quiet = ((bits >> (format.fraction_bits - 1)) & 1U) != 0;
      const bool same_sign = ((bits & 0x8000U) != 0) == (sign != 0);
      wrong += is_nan_pattern(format, bits) && quiet && same_sign ? 0 : 1;
    }
  }
  return wrong;
}

// A walk over all of float's range that is coprime to the power-of-two steps of either format.
template <class Convert>
int wrong_in_walk(Format format, Convert convert) {
  const std::uint32_t step = cohort::test::full_run() ? 251 : 65521;
  int wrong = 0;
  for (std::uint64_t bits = 0; bits <= 0xffffffffULL; bits += step) {
    const float value = from_bits(static_cast<std::uint32_t>(bits));
    if (std::isfinite(value)) {
      wrong += convert(value) == encode_nearest(format, value) ? 0 : 1;
    }
  }
  return wrong;
}

}  // namespace

TEST_CASE("the reference format decodes what the standard lists", "[dtype]") {
  CHECK(decode(kF16, 0x3c00) == 1.0);
  CHECK(decode(kF16, 0x7bff) == 65504.0);
  CHECK(decode(kF16, 0x0001) == std::ldexp(1.0, -24));
  CHECK(decode(kF16, 0xc000) == -2.0);
  CHECK(decode(kBf16, 0x3f80) == 1.0);
  CHECK(decode(kBf16, 0x7f7f) == 0x1.fep127);
  CHECK(decode(kBf16, 0x0001) == std::ldexp(1.0, -133));
}

TEST_CASE("every f16 pattern decodes exactly", "[dtype]") {
  CHECK(wrong_decodings(kF16, f16_to_float) == 0);
}

TEST_CASE("every bf16 pattern decodes exactly", "[dtype]") {
  CHECK(wrong_decodings(kBf16, bf16_to_float) == 0);
}

TEST_CASE("f16 rounds to nearest even at every pattern and midpoint", "[dtype]") {
  CHECK(wrong_roundings(kF16, float_to_f16, f16_to_float) == 0);
  CHECK(wrong_in_walk(kF16, float_to_f16) == 0);
}

TEST_CASE("bf16 rounds to nearest even at every pattern and midpoint", "[dtype]") {
  CHECK(wrong_roundings(kBf16, float_to_bf16, bf16_to_float) == 0);
  CHECK(wrong_in_walk(kBf16, float_to_bf16) == 0);
}

TEST_CASE("16-bit patterns survive the way through float", "[dtype]") {
  CHECK(wrong_round_trips(kF16, float_to_f16, f16_to_float) == 0);
  CHECK(wrong_round_trips(kBf16, float_to_bf16, bf16_to_float) == 0);
}

TEST_CASE("infinities and overflow become infinity of the same sign", "[dtype]") {
  const float infinity = std::numeric_limits<float>::infinity();
  CHECK(float_to_f16(infinity) == 0x7c00);
  CHECK(float_to_f16(-infinity) == 0xfc00);
  CHECK(float_to_f16(65520.0F) == 0x7c00);
  CHECK(float_to_f16(std::nextafter(65520.0F, 0.0F)) == 0x7bff);
  CHECK(float_to_bf16(infinity) == 0x7f80);
  CHECK(float_to_bf16(-infinity) == 0xff80);
  CHECK(float_to_bf16(std::numeric_limits<float>::max()) == 0x7f80);
  CHECK(float_to_bf16(std::numeric_limits<float>::lowest()) == 0xff80);
}

TEST_CASE("NaN stays a quiet NaN of the same sign", "[dtype]") {
  CHECK(wrong_nans(kF16, float_to_f16) == 0);
  CHECK(wrong_nans(kBf16, float_to_bf16) == 0);
}

TEST_CASE("conversions work in constant expressions", "[dtype]") {
  STATIC_REQUIRE(float_to_f16(1.0F) == 0x3c00);
  STATIC_REQUIRE(f16_to_float(0x3c00) == 1.0F);
  STATIC_REQUIRE(float_to_bf16(1.0F) == 0x3f80);
  STATIC_REQUIRE(bf16_to_float(0x3f80) == 1.0F);
}

TEST_CASE("Half and BFloat16 are two bytes that convert explicitly", "[dtype]") {
  STATIC_REQUIRE(sizeof(Half) == 2);
  STATIC_REQUIRE(sizeof(BFloat16) == 2);
  STATIC_REQUIRE_FALSE(std::is_convertible_v<float, Half>);
  STATIC_REQUIRE_FALSE(std::is_convertible_v<BFloat16, float>);
  CHECK(static_cast<float>(Half(0.333333343F)) == 0.333251953125F);
  CHECK(static_cast<float>(BFloat16(0.333333343F)) == 0.333984375F);
  CHECK(Half().bits == 0);
  CHECK(BFloat16().bits == 0);
}

TEST_CASE("sizes, names and abilities of every dtype", "[dtype]") {
  struct Row {
    DType dtype;
    std::size_t size;
    std::string name;
    bool reducible;
    bool attention;
  };
  const std::vector<Row> rows{{DType::f64, 8, "f64", true, false},
                              {DType::f32, 4, "f32", true, true},
                              {DType::f16, 2, "f16", true, true},
                              {DType::bf16, 2, "bf16", true, true},
                              {DType::i8, 1, "i8", true, false},
                              {DType::u8, 1, "u8", true, false},
                              {DType::i32, 4, "i32", true, false},
                              {DType::i64, 8, "i64", true, false},
                              {DType::f8_e4m3, 1, "f8_e4m3", false, false},
                              {DType::f8_e5m2, 1, "f8_e5m2", false, false},
                              {DType::b8, 1, "b8", false, false},
                              {DType::i16, 2, "i16", false, false},
                              {DType::u16, 2, "u16", false, false}};
  for (const auto& row : rows) {
    CAPTURE(row.name);
    CHECK(size_of(row.dtype) == row.size);
    CHECK(to_string(row.dtype) == row.name);
    CHECK(is_reducible(row.dtype) == row.reducible);
    CHECK(is_attention_dtype(row.dtype) == row.attention);
  }
  CHECK(size_of(static_cast<DType>(99)) == 0);
  CHECK(to_string(static_cast<DType>(99)) == "unknown");
}

TEST_CASE("dtype_of maps C++ types of the same size", "[dtype]") {
  STATIC_REQUIRE(dtype_of<double> == DType::f64);
  STATIC_REQUIRE(dtype_of<float> == DType::f32);
  STATIC_REQUIRE(dtype_of<Half> == DType::f16);
  STATIC_REQUIRE(dtype_of<BFloat16> == DType::bf16);
  STATIC_REQUIRE(dtype_of<std::int8_t> == DType::i8);
  STATIC_REQUIRE(dtype_of<std::uint8_t> == DType::u8);
  STATIC_REQUIRE(dtype_of<std::int32_t> == DType::i32);
  STATIC_REQUIRE(dtype_of<std::int64_t> == DType::i64);
  STATIC_REQUIRE(size_of(dtype_of<double>) == sizeof(double));
  STATIC_REQUIRE(size_of(dtype_of<Half>) == sizeof(Half));
}

namespace {

// By the definition of the format: exponents 0 to 15 with a bias of 7, no infinity, one NaN.
double decode_e4m3(std::uint8_t bits) {
  const int exponent = (bits >> 3) & 15;
  const int fraction = bits & 7;
  const double sign = (bits & 0x80U) != 0 ? -1.0 : 1.0;
  return sign * std::ldexp(static_cast<double>(exponent == 0 ? fraction : 8 + fraction),
                           (exponent == 0 ? 1 : exponent) - 10);
}

}  // namespace

TEST_CASE("f8_e4m3 is decoded by its definition, and comes back", "[dtype]") {
  for (int i = 0; i < 256; ++i) {
    const auto bits = static_cast<std::uint8_t>(i);
    const float value = f8_e4m3_to_float(bits);
    if ((bits & 0x7fU) == 0x7fU) {
      CHECK(std::isnan(value));
      continue;
    }
    CHECK(same_value(static_cast<double>(value), decode_e4m3(bits)));
    CHECK(float_to_f8_e4m3(value) == bits);
  }
}

TEST_CASE("floats become the nearest f8_e4m3, ties the even one, within 448", "[dtype]") {
  for (std::uint8_t below = 0; below < 0x7eU; ++below) {
    const auto above = static_cast<std::uint8_t>(below + 1);
    const auto low = static_cast<float>(decode_e4m3(below));
    const auto high = static_cast<float>(decode_e4m3(above));
    const float middle = (low + high) / 2;  // exact
    const std::uint8_t even = below % 2 == 0 ? below : above;
    const auto signed_too = [](float value, std::uint8_t wanted) {
      CHECK(float_to_f8_e4m3(value) == wanted);
      CHECK(float_to_f8_e4m3(-value) == (wanted | 0x80U));
    };
    signed_too(middle, even);
    signed_too(std::nextafter(middle, 0.0F), below);
    signed_too(std::nextafter(middle, 1e9F), above);
  }
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const float value : {448.0F, 449.0F, 464.0F, 480.0F, 1e30F, kInfinity}) {
    CHECK(float_to_f8_e4m3(value) == 0x7e);
    CHECK(float_to_f8_e4m3(-value) == 0xfe);
  }
  CHECK(float_to_f8_e4m3(std::numeric_limits<float>::quiet_NaN()) == 0x7f);
  CHECK(float_to_f8_e4m3(-std::numeric_limits<float>::quiet_NaN()) == 0x7f);
  CHECK(float_to_f8_e4m3(std::numeric_limits<float>::denorm_min()) == 0);
}
