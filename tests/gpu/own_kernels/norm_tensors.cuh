// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "world.cuh"

// What the tests of norms call them with.

namespace cohort::test {

using cuda::NormShape;
using cuda::PeerPath;

struct NormCase {
  NormShape shape;
  std::size_t shift = 0;  ///< Elements that every tensor is off its alignment.
  float epsilon = 1e-5F;
};

inline std::string norm_name(const NormCase& c, int n, PeerPath path) {
  return fmt::format("all_reduce_rms_norm {} n={} rows={} hidden={} {} to {} shift={}",
                     cuda::to_string(path), n, c.shape.rows, c.shape.hidden,
                     to_string(c.shape.dtype), to_string(c.shape.out_dtype), c.shift);
}

/// Of outputs in f8_e4m3.
inline constexpr float kNormScale = 0.013F;

/// A rank's tensors, each beginning `shift` elements into its memory.
struct NormTensors {
  NormCase c;
  Buffer x;
  Buffer residual;
  Buffer weight;
  Buffer out;
  Buffer scale;
  std::vector<std::byte> old_residual;

  NormTensors(const NormCase& norm, const std::vector<std::byte>& first,
              const std::vector<std::byte>& rest, const std::vector<std::byte>& weights,
              float factor)
      : c(norm),
        x(first.size() + shift()),
        residual(rest.size() + shift()),
        weight(weights.size() + shift()),
        out(to_size(c.shape.rows * c.shape.hidden) * size_of(c.shape.out_dtype) + out_shift()),
        scale(sizeof(float)),
        old_residual(rest) {
    x.upload(first.data(), first.size(), shift());
    weight.upload(weights.data(), weights.size(), shift());
    scale.upload(&factor, sizeof(factor));
    restore();
  }

  void restore() {
    residual.upload(old_residual.data(), old_residual.size(), shift());
    out.poison();
  }
  [[nodiscard]] std::size_t shift() const { return c.shift * size_of(c.shape.dtype); }
  [[nodiscard]] std::size_t out_shift() const { return c.shift * size_of(c.shape.out_dtype); }
  [[nodiscard]] bool is_fp8() const { return c.shape.out_dtype != c.shape.dtype; }
  [[nodiscard]] cuda::Norm norm(const void* sum) const {
    return {.shape = c.shape,
            .x = sum,
            .residual = residual.at(shift()),
            .weight = weight.at(shift()),
            .out = out.at(out_shift()),
            .scale = is_fp8() ? scale.at<float>() : nullptr,
            .epsilon = c.epsilon};
  }
  [[nodiscard]] cuda::Norm norm() const { return norm(x.at(shift())); }
  /// Everything in the memory of the new residual, then of the output, what lies beside them too.
  [[nodiscard]] std::vector<std::byte> results() const {
    auto all = residual.download<std::byte>(old_residual.size() + shift());
    const auto bytes = out.download<std::byte>(
        to_size(c.shape.rows * c.shape.hidden) * size_of(c.shape.out_dtype) + out_shift());
    all.insert(all.end(), bytes.begin(), bytes.end());
    return all;
  }
};

inline std::vector<NormTensors> make_tensors(World& world, const NormCase& c, Random& random) {
  const std::int64_t count = c.shape.rows * c.shape.hidden;
  const auto rest = random_elements(random, c.shape.dtype, count, false);
  const auto weights = random_elements(random, c.shape.dtype, c.shape.hidden, false);
  std::vector<NormTensors> tensors;
  for (int r = 0; r < world.size(); ++r) {
    world.enter(r);
    tensors.emplace_back(c, random_elements(random, c.shape.dtype, count, false), rest, weights,
                         kNormScale);
  }
  return tensors;
}

}  // namespace cohort::test
