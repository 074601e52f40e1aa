// SPDX-License-Identifier: Apache-2.0
#include <bit>

#include "norm_tensors.cuh"

// The norm alone, against the order of its sums as documented, bit by bit, and against fp64.

namespace cohort::test {
namespace {

/// What a row is multiplied with, by the documented order of its sums: what the residual becomes is
/// `y`. But for the reciprocal root, which the card takes within two units in the last place.
float norm_factor(const NormShape& shape, const std::vector<float>& y, float epsilon) {
  const auto per_word = static_cast<std::int64_t>(8 / size_of(shape.dtype));
  std::vector<float> groups;
  const auto butterfly = [](std::vector<float> values) {
    for (std::size_t distance = 16; distance > 0; distance /= 2) {
      const std::vector<float> before = values;
      for (std::size_t i = 0; i < 32; ++i) {
        values[i] = before[i] + before[i ^ distance];
      }
    }
    return values[0];
  };
  for (std::int64_t group = 0; group < shape.groups(); ++group) {
    std::vector<float> threads(32, 0.0F);
    for (std::int64_t t = 0; t < 32; ++t) {
      const std::int64_t first = (group * 4 + t / 8) * 15 + t % 8 * 2;
      for (std::int64_t word = first; word < first + (t % 8 == 7 ? 1 : 2); ++word) {
        for (std::int64_t e = word * per_word; e < (word + 1) * per_word; ++e) {
          const float value = e < shape.hidden ? y[to_size(e)] : 0.0F;
          threads[to_size(t)] = std::fma(value, value, threads[to_size(t)]);
        }
      }
    }
    groups.push_back(butterfly(threads));
  }
  std::vector<float> lanes(32, 0.0F);
  for (std::size_t i = 0; i < groups.size(); ++i) {
    lanes[i % 32] += groups[i];
  }
  const float mean = butterfly(lanes) * (1.0F / static_cast<float>(shape.hidden));
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(mean + epsilon)));
}

/// Whether an element of the output is that of the residual, the factor and the weight.
bool is_normed(const NormTensors& it, const std::byte* there, float y, float factor, float weight) {
  const float normed = y * factor * weight;
  if (it.is_fp8()) {
    const float inverse = 1.0F / kNormScale;
    return static_cast<std::uint8_t>(*there) == float_to_f8_e4m3(normed * inverse);
  }
  std::byte want[4];
  encode(it.c.shape.dtype, normed, want);
  return std::memcmp(want, there, size_of(it.c.shape.dtype)) == 0;
}

std::vector<float> floats_of(DType dtype, const std::byte* from, std::int64_t count) {
  std::vector<float> values;
  for (std::int64_t i = 0; i < count; ++i) {
    values.push_back(static_cast<float>(decode(dtype, from + to_size(i) * size_of(dtype))));
  }
  return values;
}

/// The norm alone against its definition: bits of the residual and of every row of the output, and
/// the rows near what fp64 gives.
void test_alone(Tally& tally, World& world, const NormCase& c, Random& random) {
  const auto& shape = c.shape;
  auto tensors = make_tensors(world, c, random);
  NormTensors& it = tensors[0];
  world.enter(0);
  const auto x = it.x.download<std::byte>(to_size(shape.rows * shape.row_bytes()) + it.shift());
  const auto weights = it.weight.download<std::byte>(to_size(shape.row_bytes()) + it.shift());
  cuda::rms_norm(it.norm(), world.stream(0));
  finish(world.stream(0));
  const auto got = it.results();
  const std::byte* residual = got.data() + it.shift();
  const std::byte* out = got.data() + it.shift() * 1 + it.old_residual.size() + it.out_shift();
  const auto weight = floats_of(shape.dtype, weights.data() + it.shift(), shape.hidden);
  bool same_residual = true;
  bool same_bits = true;
  bool near_fp64 = true;
  for (std::int64_t row = 0; row < shape.rows; ++row) {
    const std::size_t at = to_size(row * shape.row_bytes());
    const auto a = floats_of(shape.dtype, x.data() + it.shift() + at, shape.hidden);
    const auto b = floats_of(shape.dtype, it.old_residual.data() + at, shape.hidden);
    const auto y = floats_of(shape.dtype, residual + at, shape.hidden);
    double squares = 0;
    for (std::int64_t i = 0; i < shape.hidden; ++i) {
      std::byte want[4];
      encode(shape.dtype, a[to_size(i)] + b[to_size(i)], want);
      same_residual =
          same_residual && std::memcmp(want, residual + at + to_size(i) * size_of(shape.dtype),
                                       size_of(shape.dtype)) == 0;
      squares += static_cast<double>(y[to_size(i)]) * static_cast<double>(y[to_size(i)]);
    }
    const double exact = 1.0 / std::sqrt(squares / static_cast<double>(shape.hidden) +
                                         static_cast<double>(c.epsilon));
    const float factor = norm_factor(shape, y, c.epsilon);
    const std::byte* const normed = out + to_size(row * shape.hidden) * size_of(shape.out_dtype);
    bool one_factor = false;
    for (std::uint32_t bits = std::bit_cast<std::uint32_t>(factor) - 2, i = 0; i < 5; ++i) {
      bool all = true;
      for (std::size_t k = 0; k < y.size(); ++k) {
        all = all && is_normed(it, normed + k * size_of(shape.out_dtype), y[k],
                               std::bit_cast<float>(bits + i), weight[k]);
      }
      one_factor = one_factor || all;
    }
    same_bits = same_bits && one_factor;
    for (std::size_t k = 0; k < y.size(); ++k) {
      const double wanted = exact * static_cast<double>(y[k]) * static_cast<double>(weight[k]);
      const std::byte* const there = normed + k * size_of(shape.out_dtype);
      if (it.is_fp8()) {
        const double scaled = std::clamp(wanted / static_cast<double>(kNormScale), -448.0, 448.0);
        const auto got_there =
            static_cast<double>(f8_e4m3_to_float(static_cast<std::uint8_t>(*there)));
        near_fp64 = near_fp64 &&
                    std::abs(got_there - scaled) <= std::abs(scaled) * 0x1p-4 * 1.001 + 0x1p-10;
      } else {
        near_fp64 = near_fp64 && std::abs(decode(shape.dtype, there) - wanted) <=
                                     std::abs(wanted) * (roundoff(shape.dtype) + 0x1p-18) + 1e-7;
      }
    }
  }
  const std::string what = norm_name(c, 1, PeerPath::automatic);
  tally.expect(same_residual, "the residual of a norm: " + what);
  tally.expect(same_bits, "the documented order of a norm: " + what);
  tally.expect(near_fp64, "a norm beside fp64: " + what);
}

/// NaN and infinity come out where they belong, and fp8 keeps within its numbers.
void test_special_values(Tally& tally, World& world) {
  const NormCase c{.shape = {.rows = 2, .hidden = 8, .out_dtype = DType::f8_e4m3}};
  std::vector<std::byte> x(32);
  std::vector<std::byte> zero(32);
  std::vector<std::byte> ones(16);
  for (std::size_t i = 0; i < 16; ++i) {
    encode(DType::bf16, i == 9 ? NAN : i < 8 ? 1.0F : 2.0F, x.data() + 2 * i);
    encode(DType::bf16, 0.0F, zero.data() + 2 * i);
  }
  for (std::size_t i = 0; i < 8; ++i) {
    encode(DType::bf16, i == 0 ? 1000.0F : i == 1 ? -1000.0F : 1.0F, ones.data() + 2 * i);
  }
  world.enter(0);
  NormTensors it(c, x, zero, ones, 1.0F);
  cuda::rms_norm(it.norm(), world.stream(0));
  finish(world.stream(0));
  const auto out = it.out.download<std::uint8_t>(16);
  bool good = out[0] == 0x7e && out[1] == 0xfe;
  for (std::size_t i = 2; i < 8; ++i) {
    good = good && out[i] == 0x38;
  }
  for (std::size_t i = 8; i < 16; ++i) {
    good = good && (out[i] & 0x7f) == 0x7f;
  }
  tally.expect(good, "large values and NaN in f8_e4m3");
}

}  // namespace

void test_norms_alone(Tally& tally) {
  World world(1, 64 << 10, 64 << 10);
  Random random(702);
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    for (const std::int64_t hidden : {1, 7, 64, 241, 2880, 7168, 16384}) {
      for (const std::size_t shift : {0, 1}) {
        test_alone(tally, world, {.shape = {3, hidden, dtype, dtype}, .shift = shift}, random);
        test_alone(tally, world, {.shape = {3, hidden, dtype, DType::f8_e4m3}, .shift = shift},
                   random);
      }
    }
  }
  test_special_values(tally, world);
}

}  // namespace cohort::test
