// SPDX-License-Identifier: Apache-2.0
#include <bit>
#include <cmath>
#include <cohort/dtype.hpp>
#include <cohort/vectorised.hpp>
#include <cstdint>
#include <cstring>
#include <vector>

#include "support/catch.hpp"

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

/// Floats of every exponent, infinities, NaN and subnormals among them.
std::vector<float> patterns(std::uint32_t step) {
  std::vector<float> found;
  for (std::uint64_t bits = 0; bits < (std::uint64_t{1} << 32); bits += step) {
    found.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(bits)));
  }
  found.resize(found.size() / kBlock * kBlock);
  return found;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

}  // namespace

TEMPLATE_TEST_CASE("a loop gives the bits of its scalar form, whatever the processor has",
                   "[vectorised]", float, Half, BFloat16) {
  const auto a = patterns(65'521);
  const std::vector<float> b(a.rbegin(), a.rend());
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
