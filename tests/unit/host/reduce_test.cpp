// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cohort/host/reduce.hpp>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using namespace cohort::host;

namespace {

template <class T>
std::vector<T> reduce_all(ReduceOp op, const std::vector<std::vector<T>>& inputs) {
  std::vector<T> out(inputs.front().size());
  std::vector<const std::byte*> sources;
  for (const auto& input : inputs) {
    sources.push_back(reinterpret_cast<const std::byte*>(input.data()));
  }
  reduce(dtype_of<T>, op, reinterpret_cast<std::byte*>(out.data()), sources,
         static_cast<std::int64_t>(out.size()));
  return out;
}

}  // namespace

TEST_CASE("integers wrap around", "[host]") {
  constexpr auto kMax32 = std::numeric_limits<std::int32_t>::max();
  constexpr auto kMin64 = std::numeric_limits<std::int64_t>::min();
  CHECK(reduce_all<std::int32_t>(ReduceOp::sum, {{kMax32}, {1}, {1}})[0] == -kMax32);
  CHECK(reduce_all<std::int32_t>(ReduceOp::prod, {{kMax32}, {2}})[0] == -2);
  CHECK(reduce_all<std::int64_t>(ReduceOp::sum, {{kMin64}, {-1}})[0] ==
        std::numeric_limits<std::int64_t>::max());
  CHECK(reduce_all<std::int8_t>(ReduceOp::sum, {{100}, {100}})[0] == -56);
  CHECK(reduce_all<std::uint8_t>(ReduceOp::prod, {{20}, {20}})[0] == 144);
}

TEST_CASE("half types are summed in fp32 and rounded once", "[host]") {
  // In bf16, 256 + 1 rounds to 256 at every step; the true sum is 260.
  const auto bf16 = [](float x) { return std::vector<BFloat16>{BFloat16(x)}; };
  CHECK(static_cast<float>(reduce_all<BFloat16>(
            ReduceOp::sum, {bf16(256), bf16(1), bf16(1), bf16(2)})[0]) == 260.0F);
  // In f16, 2048 + 1 rounds to 2048.
  const auto f16 = [](float x) { return std::vector<Half>{Half(x)}; };
  CHECK(static_cast<float>(reduce_all<Half>(ReduceOp::sum, {f16(2048), f16(1), f16(1)})[0]) ==
        2050.0F);
  // 256 * 256 overflows f16 on the way, not in fp32.
  CHECK(static_cast<float>(reduce_all<Half>(ReduceOp::prod, {f16(256), f16(256), f16(0.5F)})[0]) ==
        32768.0F);
}

TEST_CASE("operands are combined in the order given", "[host]") {
  const float big = 16777216.0F;  // 2^24: adding 1 is lost
  CHECK(reduce_all<float>(ReduceOp::sum, {{big}, {1.0F}, {1.0F}})[0] == big);
  CHECK(reduce_all<float>(ReduceOp::sum, {{1.0F}, {1.0F}, {big}})[0] == big + 2.0F);
}

TEST_CASE("NaN in any operand gives NaN", "[host]") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const ReduceOp op : {ReduceOp::sum, ReduceOp::prod, ReduceOp::min, ReduceOp::max}) {
    CHECK(std::isnan(reduce_all<float>(op, {{nan}, {1.0F}, {2.0F}})[0]));
    CHECK(std::isnan(reduce_all<float>(op, {{1.0F}, {2.0F}, {nan}})[0]));
    CHECK(std::isnan(
        static_cast<float>(reduce_all<Half>(op, {{Half(1.0F)}, {Half(nan)}, {Half(2.0F)}})[0])));
  }
}

TEMPLATE_TEST_CASE("every length and any gaps give the bits of the scalar loop", "[host]", float,
                   Half, BFloat16, std::int32_t) {
  using Sum = std::conditional_t<std::is_same_v<TestType, std::int32_t>, std::int32_t, float>;
  for (const std::int64_t count : {1, 15, 16, 63, 64, 65, 127, 128, 200, 1000}) {
    for (const std::size_t n : {1U, 2U, 3U, 5U}) {
      for (const std::int64_t stride : {1, 3}) {
        std::vector<std::vector<TestType>> inputs(n);
        for (std::size_t r = 0; r < n; ++r) {
          for (std::int64_t i = 0; i < count * stride; ++i) {
            inputs[r].push_back(static_cast<TestType>(
                1000.0F / static_cast<float>(1 + (i * 31 + static_cast<int>(r)) % 97)));
          }
        }
        const TestType untouched(-1);
        std::vector<TestType> out(static_cast<std::size_t>(count * stride), untouched);
        const Layout layout = collapse(Dims{count}, Dims{stride});
        std::vector<ReadCursor> sources;
        for (const auto& input : inputs) {
          sources.emplace_back(reinterpret_cast<const std::byte*>(input.data()), layout,
                               sizeof(TestType));
        }
        WriteCursor writer(reinterpret_cast<std::byte*>(out.data()), layout, sizeof(TestType));
        reduce(dtype_of<TestType>, ReduceOp::sum, writer, sources, count);
        for (std::int64_t i = 0; i < count * stride; ++i) {
          const auto at = static_cast<std::size_t>(i);
          Sum sum = static_cast<Sum>(inputs[0][at]);
          for (std::size_t r = 1; r < n; ++r) {
            sum += static_cast<Sum>(inputs[r][at]);
          }
          const TestType expected = i % stride == 0 ? static_cast<TestType>(sum) : untouched;
          REQUIRE(std::memcmp(&out[at], &expected, sizeof(TestType)) == 0);
        }
      }
    }
  }
}

TEMPLATE_TEST_CASE("every operation on integers has the bits of the scalar loop", "[host]",
                   std::int8_t, std::uint8_t, std::int32_t, std::int64_t) {
  using Modular = std::make_unsigned_t<TestType>;
  for (const std::size_t n : {1U, 2U, 4U}) {
    std::vector<std::vector<TestType>> inputs(n);
    for (std::size_t r = 0; r < n; ++r) {
      for (std::int64_t i = 0; i < 1100; ++i) {
        inputs[r].push_back(
            static_cast<TestType>((i * 37 + static_cast<int>(r) * 101) % 251 - 125));
      }
    }
    const auto expected = [&](const auto& apply) {
      std::vector<TestType> all = inputs[0];
      for (std::size_t r = 1; r < n; ++r) {
        for (std::size_t i = 0; i < all.size(); ++i) {
          all[i] = apply(all[i], inputs[r][i]);
        }
      }
      return all;
    };
    CHECK(reduce_all(ReduceOp::sum, inputs) == expected([](TestType x, TestType y) {
            return static_cast<TestType>(static_cast<Modular>(x) + static_cast<Modular>(y));
          }));
    CHECK(reduce_all(ReduceOp::prod, inputs) == expected([](TestType x, TestType y) {
            return static_cast<TestType>(static_cast<Modular>(x) * static_cast<Modular>(y));
          }));
    CHECK(reduce_all(ReduceOp::min, inputs) ==
          expected([](TestType x, TestType y) { return std::min(x, y); }));
    CHECK(reduce_all(ReduceOp::max, inputs) ==
          expected([](TestType x, TestType y) { return std::max(x, y); }));
  }
}

TEST_CASE("the output may be one of the operands", "[host]") {
  for (const std::size_t place : {0U, 1U}) {
    std::vector<std::vector<std::int32_t>> inputs(2, std::vector<std::int32_t>(150, 3));
    const std::vector<const std::byte*> sources = {
        reinterpret_cast<const std::byte*>(inputs[0].data()),
        reinterpret_cast<const std::byte*>(inputs[1].data())};
    reduce(DType::i32, ReduceOp::prod, reinterpret_cast<std::byte*>(inputs[place].data()), sources,
           150);
    CHECK(inputs[place] == std::vector<std::int32_t>(150, 9));
  }
}

TEST_CASE("8-bit floats have no arithmetic", "[host]") {
  std::byte value{};
  const std::byte* source = &value;
  CHECK_THROWS_AS(reduce(DType::f8_e4m3, ReduceOp::sum, &value, std::span(&source, 1), 1),
                  UsageError);
}
