// SPDX-License-Identifier: Apache-2.0
#include <bit>
#include <cmath>
#include <cohort/dtype.hpp>
#include <cohort/vectorised.hpp>
#include <cstdint>
#include <cstring>
#include <vector>

#include "support/catch.hpp"
#include "support/skip.hpp"

using namespace cohort;

namespace {

constexpr std::int64_t kBlock = 64;

/// out = T(scale * a + b) for whole blocks: rounding, products and sums that FMA would change.
template <class T>
struct ScaleAndAdd {
  [[gnu::always_inline]] static void run(T* __restrict out, float scale, const float* __restrict a,
                                         const float* __restrict b, std::int64_t count) noexcept {
    for (std::int64_t i = 0; i < count; i += kBlock) {
      for (std::int64_t j = 0; j < kBlock; ++j) {
        out[i + j] = T(scale * a[i + j] + b[i + j]);
      }
    }
  }
};

/// out = a + b in float, rounded: what reductions do, which add no product.
template <class T>
struct Add {
  [[gnu::always_inline]] static void run(T* __restrict out, const T* __restrict a,
                                         const T* __restrict b, std::int64_t count) noexcept {
    for (std::int64_t i = 0; i < count; i += kBlock) {
      for (std::int64_t j = 0; j < kBlock; ++j) {
        out[i + j] = T(static_cast<float>(a[i + j]) + static_cast<float>(b[i + j]));
      }
    }
  }
};

/// Floats of every exponent, infinities, NaN and subnormals among them.
std::vector<float> patterns(std::uint32_t step) {
  std::vector<float> found;
  for (std::uint64_t bits = 0; bits < (std::uint64_t{1} << 32); bits += step) {
    found.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(bits)));
  }
  found.resize(found.size() / kBlock * kBlock);
  return found;
}

/// `a` backwards, but 1 where both would be NaN: compilers choose which of two is the sum.
template <class T>
std::vector<T> partners(const std::vector<T>& a) {
  std::vector<T> b(a.rbegin(), a.rend());
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (std::isnan(static_cast<float>(a[i])) && std::isnan(static_cast<float>(b[i]))) {
      b[i] = T(1.0F);
    }
  }
  return b;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

}  // namespace

TEMPLATE_TEST_CASE("a loop gives the bits of its scalar form, whatever the processor has",
                   "[vectorised]", float, Half, BFloat16) {
  const auto a = patterns(65'521);
  const auto b = partners(a);
  const auto count = static_cast<std::int64_t>(a.size());
  std::vector<TestType> chosen(a.size());
  cohort::detail::vectorised<ScaleAndAdd<TestType>>(chosen.data(), 0.3F, a.data(), b.data(), count);
  std::vector<TestType> plain(a.size());
  cohort::detail::run_for_target<ScaleAndAdd<TestType>, TestType*, float, const float*,
                                 const float*, std::int64_t>(plain.data(), 0.3F, a.data(), b.data(),
                                                             count);
  CHECK(same_bits(chosen, plain));
  for (std::size_t i = 0; i < a.size(); ++i) {
    const volatile float product = 0.3F * a[i];  // rounded by itself
    const TestType expected(product + b[i]);
    const TestType fused(std::fma(0.3F, a[i], b[i]));  // where the tests are built with FMA
    const auto found = static_cast<float>(chosen[i]);
    REQUIRE((found == static_cast<float>(expected) || found == static_cast<float>(fused) ||
             (std::isnan(found) && std::isnan(static_cast<float>(expected)))));
  }
}

TEMPLATE_TEST_CASE("a loop that adds no product gives its bits with the widest vectors",
                   "[vectorised]", float, Half, BFloat16) {
  std::vector<TestType> a;
  for (const float value : patterns(65'521)) {
    a.emplace_back(value);
  }
  const auto b = partners(a);
  const auto count = static_cast<std::int64_t>(a.size());
  std::vector<TestType> chosen(a.size());
  cohort::detail::vectorised_widest<Add<TestType>>(chosen.data(), a.data(), b.data(), count);
  std::vector<TestType> plain(a.size());
  cohort::detail::run_for_target<Add<TestType>, TestType*, const TestType*, const TestType*,
                                 std::int64_t>(plain.data(), a.data(), b.data(), count);
  CHECK(same_bits(chosen, plain));
  for (std::size_t i = 0; i < a.size(); ++i) {
    const volatile float sum = static_cast<float>(a[i]) + static_cast<float>(b[i]);
    const auto expected = static_cast<float>(TestType(sum));
    const auto found = static_cast<float>(chosen[i]);
    REQUIRE((found == expected || (std::isnan(found) && std::isnan(expected))));
  }
}

#if defined(__x86_64__)
TEST_CASE("512-bit vectors are tested where the processor has them", "[vectorised]") {
  if (test::skip_if(!cohort::detail::has_avx512(), "no AVX-512 of Ice Lake, Zen 4 or later")) {
    return;
  }
  const std::vector<float> ones(kBlock, 1.0F);
  std::vector<float> out(kBlock, -1.0F);
  cohort::detail::run_for_avx512<Add<float>, float*, const float*, const float*, std::int64_t>(
      out.data(), ones.data(), ones.data(), kBlock);
  CHECK(out == std::vector<float>(kBlock, 2.0F));
}
#endif

TEST_CASE("a loop writes its blocks and nothing else", "[vectorised]") {
  const std::vector<float> ones(256, 1.0F);
  for (const std::int64_t count : {0, 64, 128, 192}) {
    std::vector<float> out(256, -1.0F);
    cohort::detail::vectorised<ScaleAndAdd<float>>(out.data(), 2.0F, ones.data(), ones.data(),
                                                   count);
    for (std::size_t i = 0; i < out.size(); ++i) {
      REQUIRE(out[i] == (static_cast<std::int64_t>(i) < count ? 3.0F : -1.0F));
    }
  }
}
