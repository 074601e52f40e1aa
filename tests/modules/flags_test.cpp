// SPDX-License-Identifier: Apache-2.0
// Built with a consumer's flags for arithmetic, -ffast-math among them: empty ranks are found and
// not read, and NaN stays. Bits are compared, because under such flags a comparison of floats may
// mean anything. A weight may miss by a unit in the last place: include/cohort/README.md, Limits.

#include <algorithm>
#include <array>
#include <bit>
#include <cohort/dcp/lse_merge.hpp>
#include <cohort/host/reduce.hpp>
#include <cstddef>
#include <cstdint>
#include <cstdio>

using namespace cohort;

namespace {

constexpr std::uint32_t kOne = 0x3f800000;
constexpr std::uint32_t kTwo = 0x40000000;
constexpr std::uint32_t kNan = 0x7fc00000;
constexpr std::uint32_t kInfinity = 0x7f800000;
constexpr std::uint32_t kMinusInfinity = 0xff800000;
constexpr std::array kEmpties = {kMinusInfinity, kInfinity, kNan, 0xffc00001U};

int wrong = 0;

/// A float that the compiler cannot know.
float number(std::uint32_t bits) {
  volatile std::uint32_t hidden = bits;
  return std::bit_cast<float>(std::uint32_t{hidden});
}
template <class Float>
std::uint32_t bits(const Float& value) {
  return std::bit_cast<std::uint32_t>(value);
}

void expect(const char* what, std::uint32_t got, std::uint32_t expected, std::uint32_t units = 0) {
  if (std::max(got, expected) - std::min(got, expected) > units) {
    std::printf("%s: expected %08x, got %08x\n", what, expected, got);
    ++wrong;
  }
}

void empties_are_found(LseBase base) {
  for (const auto empty : kEmpties) {
    std::array<float, 3> lses = {number(empty), number(kOne), number(empty)};
    std::array<float, 3> scales{};
    float merged = 0;
    dcp::merge_weights(lses.data(), 3, base, scales.data(), &merged);
    expect("scale of an empty rank", bits(scales[0]), 0);
    expect("scale of the only rank", bits(scales[1]), kOne, 1);
    expect("scale of another empty rank", bits(scales[2]), 0);
    expect("LSE of the only rank", bits(merged), kOne, 1);

    lses = {number(empty), number(kMinusInfinity), number(empty)};
    dcp::merge_weights(lses.data(), 3, base, scales.data(), &merged);
    for (const float& scale : scales) {
      expect("scale where all are empty", bits(scale), 0);
    }
    expect("LSE where all are empty", bits(merged), kMinusInfinity);
  }
}

/// `length` elements cross a block and its rest.
void empty_rows_are_not_read() {
  constexpr std::int64_t kLength = 70;
  std::array<float, kLength> full{};
  std::array<float, kLength> nan{};
  std::array<float, kLength> out{};
  full.fill(number(kTwo));
  nan.fill(number(kNan));
  std::array<float, 2> scales{};
  const std::array lses = {number(kNan), number(kOne)};
  dcp::merge_weights(lses.data(), 2, LseBase::e, scales.data(), nullptr);
  const std::array<const float*, 2> rows = {nan.data(), full.data()};
  dcp::merge_row(rows.data(), scales.data(), 2, out.data(), kLength);
  for (const float& element : out) {
    expect("an element beside an empty rank", bits(element), kTwo, 1);
  }
  dcp::correct_row(nan.data(), scales[0], out.data(), kLength);
  for (const float& element : out) {
    expect("an element of an empty rank", bits(element), 0);
  }
}

void nan_stays(ReduceOp op) {
  constexpr std::size_t kLength = 70;
  for (const bool first : {true, false}) {
    std::array<float, kLength> a{};
    std::array<float, kLength> b{};
    std::array<float, kLength> out{};
    a.fill(number(first ? kNan : kOne));
    b.fill(number(first ? kOne : kNan));
    const std::array<const std::byte*, 2> sources = {reinterpret_cast<const std::byte*>(a.data()),
                                                     reinterpret_cast<const std::byte*>(b.data())};
    host::reduce(DType::f32, op, reinterpret_cast<std::byte*>(out.data()), sources, kLength);
    for (const float& element : out) {
      const bool is_nan = (bits(element) & 0x7fffffffU) > kInfinity;
      expect(op == ReduceOp::max ? "max keeps NaN" : "min keeps NaN", is_nan ? 1 : 0, 1);
    }
  }
}

}  // namespace

int main() {
  empties_are_found(LseBase::e);
  empties_are_found(LseBase::two);
  empty_rows_are_not_read();
  nan_stays(ReduceOp::max);
  nan_stays(ReduceOp::min);
  std::printf("flags: %d wrong\n", wrong);
  return wrong == 0 ? 0 : 1;
}
