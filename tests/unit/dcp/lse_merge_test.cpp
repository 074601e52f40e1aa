// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cohort/dcp/lse_merge.hpp>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using namespace cohort::dcp;
using test::says;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr LseBase kBases[] = {LseBase::e, LseBase::two};

struct Weights {
  std::vector<float> scales;
  float lse = 0;
};

Weights weights_of(const std::vector<float>& lses, LseBase base) {
  Weights result;
  result.scales.assign(lses.size(), -1.0F);
  merge_weights(lses.data(), static_cast<int>(lses.size()), base, result.scales.data(),
                &result.lse);
  return result;
}

template <class T>
std::vector<const T*> pointers(const std::vector<std::vector<T>>& rows) {
  std::vector<const T*> result;
  for (const auto& row : rows) {
    result.push_back(row.data());
  }
  return result;
}

template <class T>
std::vector<T> merged(const std::vector<std::vector<T>>& rows, const std::vector<float>& scales) {
  std::vector<T> out(rows.front().size(), T(-77.0F));
  const auto at = pointers(rows);
  merge_row(at.data(), scales.data(), static_cast<int>(rows.size()), out.data(),
            static_cast<std::int64_t>(out.size()));
  return out;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <class T>
struct Tolerance;
template <>
struct Tolerance<float> {
  static constexpr double value = 4e-6;
};
template <>
struct Tolerance<Half> {
  static constexpr double value = 1.5e-3;  // inputs and result rounded to 2^-11 each
};
template <>
struct Tolerance<BFloat16> {
  static constexpr double value = 1.2e-2;  // to 2^-8 each
};

// Inputs that leave no bit of the arithmetic unused.
template <class T>
std::vector<std::vector<T>> random_rows(int n, std::size_t length, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<std::vector<T>> rows(static_cast<std::size_t>(n), std::vector<T>(length));
  for (auto& row : rows) {
    for (T& element : row) {
      element = T(normal(random));
    }
  }
  return rows;
}

std::vector<float> random_lses(int n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> lses(static_cast<std::size_t>(n));
  for (float& lse : lses) {
    lse = 3 * normal(random);
  }
  return lses;
}

// 2^x for small whole x, usable at compile time.
constexpr float exact_exp2(float x) {
  float power = 1;
  for (; x < 0; x += 1) {
    power /= 2;
  }
  for (; x > 0; x -= 1) {
    power *= 2;
  }
  return power;
}
constexpr float exact_log2(float x) {
  float log = 0;
  for (; x > 1; x /= 2) {
    log += 1;
  }
  return log;
}
constexpr bool merges_at_compile_time() {
  const float lses[] = {3, kEmptyLse, 3, 4};
  float scales[4] = {};
  const float lse = merge_weights_with(lses, 4, exact_exp2, exact_log2, scales);
  return lse == 5 && scales[0] == 0.25F && scales[1] == 0 && scales[2] == 0.25F &&
         scales[3] == 0.5F;
}
static_assert(merges_at_compile_time());

}  // namespace

TEST_CASE("only finite LSEs count", "[lse_merge]") {
  for (const float lse : {-kInf, kInf, kNaN, -kNaN}) {
    CHECK(is_empty_lse(lse));
  }
  for (const float lse :
       {0.0F, -0.0F, 1.0F, -1e30F, std::numeric_limits<float>::max(),
        std::numeric_limits<float>::lowest(), std::numeric_limits<float>::denorm_min()}) {
    CHECK_FALSE(is_empty_lse(lse));
  }
}

TEST_CASE("weights that are powers of two are exact", "[lse_merge]") {
  const Weights two = weights_of({0, 0, 1}, LseBase::two);
  CHECK(two.scales == std::vector<float>{0.25F, 0.25F, 0.5F});
  CHECK(two.lse == 2.0F);
  for (const LseBase base : kBases) {
    const Weights equal = weights_of({-7, -7, -7, -7}, base);
    CHECK(equal.scales == std::vector<float>{0.25F, 0.25F, 0.25F, 0.25F});
  }
  CHECK(weights_of({-7, -7, -7, -7}, LseBase::two).lse == -5.0F);
}

TEST_CASE("small integers merge exactly", "[lse_merge]") {
  const std::vector<float> scales = weights_of({0, 0, 1}, LseBase::two).scales;
  std::vector<std::vector<float>> rows(3, std::vector<float>(130));
  std::vector<float> expected(130);
  for (std::size_t i = 0; i < 130; ++i) {
    const auto x = static_cast<float>(i);
    rows[0][i] = 4 * x;
    rows[1][i] = -8 * x;
    rows[2][i] = 2 * x + 6;
    expected[i] = x - 2 * x + x + 3;
  }
  CHECK(merged(rows, scales) == expected);
}

TEST_CASE("a single rank gets its own bits back", "[lse_merge]") {
  for (const LseBase base : kBases) {
    for (const float lse : {0.0F, -123.456F, 88.8F, -3e38F, 3e38F}) {
      const Weights weights = weights_of({lse}, base);
      CHECK(weights.scales == std::vector<float>{1.0F});
      CHECK(weights.lse == lse);
    }
  }
  const auto f32 = random_rows<float>(1, 100, 1);
  const auto f16 = random_rows<Half>(1, 100, 2);
  const auto bf16 = random_rows<BFloat16>(1, 100, 3);
  CHECK(same_bits(merged(f32, {1.0F}), f32[0]));
  CHECK(same_bits(merged(f16, {1.0F}), f16[0]));
  CHECK(same_bits(merged(bf16, {1.0F}), bf16[0]));
}

TEST_CASE("-inf, +inf and NaN LSEs are empty and their rows stay unread", "[lse_merge]") {
  for (const LseBase base : kBases) {
    const Weights weights = weights_of({kNaN, 2, -kInf, 2, kInf}, base);
    CHECK(weights.scales == std::vector<float>{0, 0.5F, 0, 0.5F, 0});
    CHECK(weights.lse == weights_of({2, 2}, base).lse);

    const std::vector<float> a(100, 3.0F);
    const std::vector<float> b(100, 5.0F);
    const std::vector<float> poison(100, kNaN);
    // a null pointer proves more than NaN: following it would end the program
    const float* rows[] = {poison.data(), a.data(), nullptr, b.data(), nullptr};
    std::vector<float> out(100, kNaN);
    merge_row(rows, weights.scales.data(), 5, out.data(), 100);
    CHECK(out == std::vector<float>(100, 4.0F));
  }
}

TEST_CASE("all ranks empty give zero and -inf", "[lse_merge]") {
  for (const LseBase base : kBases) {
    for (int n = 1; n <= 16; ++n) {
      const Weights weights =
          weights_of(std::vector<float>(static_cast<std::size_t>(n), -kInf), base);
      CHECK(weights.scales == std::vector<float>(static_cast<std::size_t>(n), 0.0F));
      CHECK(weights.lse == -kInf);
      const std::vector<const BFloat16*> rows(static_cast<std::size_t>(n), nullptr);
      std::vector<BFloat16> out(65, BFloat16(kNaN));
      merge_row(rows.data(), weights.scales.data(), n, out.data(), 65);
      CHECK(same_bits(out, std::vector<BFloat16>(65, BFloat16(0.0F))));
    }
  }
  CHECK(weights_of({kNaN, kInf, -kInf}, LseBase::e).lse == -kInf);
}

TEST_CASE("a share that underflows counts as not there", "[lse_merge]") {
  for (const LseBase base : kBases) {
    const Weights weights = weights_of({-1000, 1000}, base);
    CHECK(weights.scales == std::vector<float>{0, 1});
    CHECK(weights.lse == 1000.0F);
    const float max = std::numeric_limits<float>::max();
    CHECK(weights_of({max, -max}, base).scales == std::vector<float>{1, 0});
  }
}

TEST_CASE("the merged LSE is optional, and scales may replace LSEs", "[lse_merge]") {
  std::vector<float> values = {0, 0, 1};
  merge_weights(values.data(), 3, LseBase::two, values.data(), nullptr);
  CHECK(values == std::vector<float>{0.25F, 0.25F, 0.5F});
}

TEST_CASE("both bases give the same weights once the LSE is converted", "[lse_merge]") {
  const double log2_e = 1.0 / std::log(2.0);
  for (int n = 1; n <= 16; ++n) {
    const auto lses = random_lses(n, static_cast<unsigned>(n));
    std::vector<float> in_two;
    for (const float lse : lses) {
      in_two.push_back(static_cast<float>(lse * log2_e));
    }
    const Weights e = weights_of(lses, LseBase::e);
    const Weights two = weights_of(in_two, LseBase::two);
    for (std::size_t r = 0; r < e.scales.size(); ++r) {
      CHECK(std::abs(two.scales[r] - e.scales[r]) <= 1e-5F * e.scales[r]);
    }
    CHECK(std::abs(two.lse - e.lse * log2_e) <= 1e-5 * (1 + std::abs(e.lse)));
  }
}

TEST_CASE("weights sum to one and agree with fp64", "[lse_merge]") {
  for (int n = 1; n <= 16; ++n) {
    const auto lses = random_lses(n, 1000U + static_cast<unsigned>(n));
    double mass = 0;
    for (const float lse : lses) {
      mass += std::exp(static_cast<double>(lse));
    }
    const Weights weights = weights_of(lses, LseBase::e);
    double sum = 0;
    for (std::size_t r = 0; r < lses.size(); ++r) {
      const double exact = std::exp(static_cast<double>(lses[r])) / mass;
      CHECK(std::abs(static_cast<double>(weights.scales[r]) - exact) <= 2e-6 * exact);
      sum += static_cast<double>(weights.scales[r]);
    }
    CHECK(std::abs(sum - 1) <= 1e-6);
    CHECK(std::abs(static_cast<double>(weights.lse) - std::log(mass)) <= 4e-6);
  }
}

TEMPLATE_TEST_CASE("bits depend on the inputs alone", "[lse_merge]", float, Half, BFloat16) {
  constexpr std::size_t kLength = 515;
  for (const int n : {1, 2, 3, 8, 16}) {
    const auto rows = random_rows<TestType>(n, kLength, 7U + static_cast<unsigned>(n));
    auto lses = random_lses(n, 9U + static_cast<unsigned>(n));
    if (n > 2) {
      lses[1] = kEmptyLse;
    }
    const auto scales = weights_of(lses, LseBase::e).scales;
    const auto whole = merged(rows, scales);
    CHECK(same_bits(merged(rows, scales), whole));

    // a plan may cut rows anywhere
    for (const std::size_t cut :
         {std::size_t{1}, std::size_t{63}, std::size_t{64}, std::size_t{200}, kLength - 1}) {
      std::vector<TestType> pieces(kLength);
      auto at = pointers(rows);
      merge_row(at.data(), scales.data(), n, pieces.data(), static_cast<std::int64_t>(cut));
      for (auto& row : at) {
        row += cut;
      }
      merge_row(at.data(), scales.data(), n, pieces.data() + cut,
                static_cast<std::int64_t>(kLength - cut));
      CHECK(same_bits(pieces, whole));
    }

    // and may know the type at run time only
    const auto at = pointers(rows);
    const std::vector<const void*> untyped(at.begin(), at.end());
    std::vector<TestType> out(kLength);
    merge_row(dtype_of<TestType>, untyped.data(), scales.data(), n, out.data(),
              static_cast<std::int64_t>(kLength));
    CHECK(same_bits(out, whole));

    // or merge into one of the rows
    auto in_place = rows;
    const auto own = pointers(in_place);
    merge_row(own.data(), scales.data(), n, in_place[0].data(), static_cast<std::int64_t>(kLength));
    CHECK(same_bits(in_place[0], whole));
  }
}

TEMPLATE_TEST_CASE("corrected partials sum to the merge", "[lse_merge]", float, Half, BFloat16) {
  constexpr std::size_t kLength = 100;
  constexpr int kRanks = 4;
  const auto rows = random_rows<TestType>(kRanks, kLength, 21);
  const auto scales = weights_of({0.5F, kEmptyLse, -1.0F, 2.0F}, LseBase::e).scales;
  const auto expected = merged(rows, scales);
  std::vector<float> sum(kLength, 0.0F);
  for (std::size_t r = 0; r < kRanks; ++r) {
    std::vector<float> corrected(kLength, kNaN);
    correct_row(rows[r].data(), scales[r], corrected.data(), kLength);
    for (std::size_t i = 0; i < kLength; ++i) {
      CHECK(corrected[i] == scales[r] * static_cast<float>(rows[r][i]));
      sum[i] += corrected[i];
    }
    std::vector<float> again(kLength, kNaN);
    correct_row(dtype_of<TestType>, rows[r].data(), scales[r], DType::f32, again.data(), kLength);
    CHECK(same_bits(again, corrected));

    std::vector<TestType> own(kLength, TestType(kNaN));
    correct_row(dtype_of<TestType>, rows[r].data(), scales[r], dtype_of<TestType>, own.data(),
                kLength);
    for (std::size_t i = 0; i < kLength; ++i) {
      CHECK(static_cast<float>(own[i]) == static_cast<float>(TestType(corrected[i])));
    }
  }
  for (std::size_t i = 0; i < kLength; ++i) {
    CHECK(std::abs(sum[i] - static_cast<float>(expected[i])) <= Tolerance<TestType>::value);
  }
}

TEST_CASE("correcting an empty rank's partial writes zeros", "[lse_merge]") {
  std::vector<float> out(100, kNaN);
  correct_row(static_cast<const BFloat16*>(nullptr), 0.0F, out.data(), 100);
  CHECK(out == std::vector<float>(100, 0.0F));
  std::vector<BFloat16> poison(100, BFloat16(kNaN));
  correct_row(DType::bf16, poison.data(), 0.0F, DType::bf16, poison.data(), 100);
  CHECK(same_bits(poison, std::vector<BFloat16>(100, BFloat16(0.0F))));
}

TEST_CASE("no element outside the row is written", "[lse_merge]") {
  for (const std::int64_t length : {0, 1, 63, 64, 65, 128, 129}) {
    const std::vector<float> row(static_cast<std::size_t>(length), 2.0F);
    std::vector<float> out(static_cast<std::size_t>(length) + 64, -9.0F);
    correct_row(row.data(), 1.0F, out.data(), length);
    for (std::size_t i = 0; i < out.size(); ++i) {
      CHECK(out[i] == (static_cast<std::int64_t>(i) < length ? 2.0F : -9.0F));
    }
  }
}

TEST_CASE("types that are no attention type are refused by name", "[lse_merge]") {
  const void* rows[] = {nullptr};
  const float scale = 0;
  for (const DType dtype :
       {DType::f64, DType::i8, DType::u8, DType::i32, DType::i64, DType::f8_e4m3, DType::f8_e5m2}) {
    CHECK_THROWS_MATCHES(merge_row(dtype, rows, &scale, 1, nullptr, 0), UsageError,
                         says("dtype", std::string(to_string(dtype))));
    CHECK_THROWS_MATCHES(correct_row(dtype, nullptr, 0, DType::f32, nullptr, 0), UsageError,
                         says("row_dtype", std::string(to_string(dtype))));
  }
  CHECK_THROWS_MATCHES(correct_row(DType::bf16, nullptr, 0, DType::f16, nullptr, 0), UsageError,
                       says("out_dtype", "bf16", "f16"));
}

TEST_CASE("a sink takes part in the sum and has no value", "[dcp]") {
  for (const LseBase base : kBases) {
    const std::vector<float> lses{1, kNaN, 3};
    const std::vector<float> with{1, kNaN, 3, 2};  // as a rank whose output is not looked at
    std::vector<float> scales(4);
    std::vector<float> expected(4);
    float lse = 0;
    float expected_lse = 0;
    merge_weights(lses.data(), 3, base, scales.data(), &lse, 2);
    merge_weights(with.data(), 4, base, expected.data(), &expected_lse);
    expected[3] = 0;
    CHECK(same_bits(scales, expected));
    CHECK(lse == expected_lse);
    merge_weights(lses.data(), 3, base, scales.data(), &lse, kNaN);
    merge_weights(lses.data(), 3, base, expected.data(), &expected_lse);
    CHECK(same_bits(scales, expected));
    CHECK(lse == expected_lse);
  }
}

TEST_CASE("where all ranks are empty the sink is the merged LSE", "[dcp]") {
  const std::vector<float> lses{-kInf, kNaN};
  for (const LseBase base : kBases) {
    std::vector<float> scales(2, 7);
    float lse = 0;
    merge_weights(lses.data(), 2, base, scales.data(), &lse, -2.5F);
    CHECK(lse == -2.5F);
    CHECK(scales == std::vector<float>{0, 0});
    merge_weights(lses.data(), 2, base, scales.data(), &lse, kInf);
    CHECK(lse == -kInf);
  }
}

TEST_CASE("scales of one partial after the other have the same bits", "[dcp]") {
  const auto exp = [](float x) { return std::exp(x); };
  const auto log = [](float x) { return std::log(x); };
  for (const std::vector<float>& lses :
       {std::vector<float>{1, 3, kNaN, 2.25F}, {-kInf, kInf}, {5}, {-200, 300, 299}}) {
    const int n = static_cast<int>(lses.size());
    std::vector<float> scales(lses.size());
    const float lse = merge_weights_with(lses.data(), n, exp, log, scales.data());
    const RowMass mass = mass_of([&](int i) { return lses[static_cast<std::size_t>(i)]; }, n, exp);
    CHECK(mass.lse(log) == lse);
    std::vector<float> weights(lses.size());
    const RowMass weighed = weigh_with(lses.data(), n, exp, weights.data());
    CHECK(weighed.max == mass.max);
    CHECK(weighed.sum == mass.sum);
    CHECK((weighed.sum >= 1 || weighed.sum == 0));
    for (std::size_t i = 0; i < lses.size(); ++i) {
      CHECK(mass.scale(lses[i], exp) == scales[i]);
      CHECK(weights[i] / std::max(weighed.sum, 1.0F) == scales[i]);
    }
  }
}

TEST_CASE("a sink is weighed behind the ranks and is none of them", "[dcp]") {
  std::array<float, 3> weights{};
  const std::array<float, 3> lses{1, kNaN, 3};
  const RowMass mass = weigh_with(lses.data(), 3, exact_exp2, weights.data(), 4);
  CHECK(mass.max == 4);
  CHECK(mass.sum == 0.125F + 0.5F + 1);
  CHECK(weights == std::array<float, 3>{0.125F, 0, 0.5F});
  const RowMass none = weigh_with(lses.data() + 1, 1, exact_exp2, weights.data());
  CHECK(none.max == -kInf);
  CHECK(none.sum == 0);
  CHECK(weights[0] == 0);
}
