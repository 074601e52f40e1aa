// SPDX-License-Identifier: Apache-2.0
#include "cohort/host/host_norm.hpp"

#include <cmath>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;

// Groups norm by these rows: support/norm_checks.hpp checks them in every type.

TEST_CASE("a row's squares are added in 16 lanes, which are added in order", "[host_norm]") {
  constexpr std::int64_t kHidden = 16 * 40 + 5;
  std::vector<float> x(kHidden);
  std::vector<float> residual(kHidden);
  std::vector<float> weight(kHidden);
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] = 1.0F / static_cast<float>(i + 3);
    residual[i] = 0.37F * static_cast<float>(i % 11) - 1.9F;
    weight[i] = 0.5F + static_cast<float>(i % 5) * 0.1F;
  }
  std::vector<float> sums(kHidden);
  float lanes[16] = {};
  for (std::size_t i = 0; i < x.size(); ++i) {
    sums[i] = x[i] + residual[i];
    const volatile float square = sums[i] * sums[i];  // not fused with the sum
    lanes[i % 16] += square;
  }
  float total = 0;
  for (const float lane : lanes) {
    total += lane;
  }
  const float factor = 1.0F / std::sqrt(total / static_cast<float>(kHidden) + 1e-5F);

  // Where the sum comes in the output's own place.
  const Dims shape{1, kHidden};
  const ResidualNorm norm{.residual = TensorView(residual.data(), DType::f32, shape),
                          .weight = TensorView(weight.data(), DType::f32, {kHidden}),
                          .epsilon = 1e-5F};
  const TensorView in_place(x.data(), DType::f32, shape);
  host::norm_rows({in_place, norm, in_place});
  CHECK(residual == sums);
  for (std::size_t i = 0; i < x.size(); ++i) {
    CHECK(x[i] == sums[i] * factor * weight[i]);
  }
}

TEST_CASE("rows of zeros stay zeros, and NaN stays in its row", "[host_norm]") {
  std::vector<float> x{0, 0, 1, NAN};
  std::vector<float> residual(4, 0.0F);
  std::vector<float> weight{1, 1};
  const Dims shape{2, 2};
  const ResidualNorm norm{.residual = TensorView(residual.data(), DType::f32, shape),
                          .weight = TensorView(weight.data(), DType::f32, {2})};
  std::vector<float> out(4);
  host::norm_rows(
      {TensorView(x.data(), DType::f32, shape), norm, TensorView(out.data(), DType::f32, shape)});
  CHECK(out[0] == 0.0F);
  CHECK(out[1] == 0.0F);
  CHECK(std::isnan(out[2]));
  CHECK(std::isnan(out[3]));
}
