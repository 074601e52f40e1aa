// SPDX-License-Identifier: Apache-2.0
#include <numeric>

#include "world.cuh"

// Strided copy, fill and the sum of pieces against the host.

namespace cohort::test {
namespace {

/// A random shape whose dimensions lie in a random order with gaps in memory.
struct Layout {
  std::vector<std::int64_t> strides;
  std::int64_t elements = 0;  ///< Span in memory.
};

Layout random_layout(Random& random, const std::vector<std::int64_t>& shape, bool gaps) {
  std::vector<std::size_t> order(shape.size());
  std::iota(order.begin(), order.end(), 0);
  if (random() % 2 == 0) {
    std::shuffle(order.begin(), order.end(), random);
  }
  Layout layout{std::vector<std::int64_t>(shape.size()), 1};
  for (std::size_t k = order.size(); k-- > 0;) {
    layout.strides[order[k]] = layout.elements;
    layout.elements *= shape[order[k]];
    layout.elements += gaps ? static_cast<std::int64_t>(random() % 3) * 8 : 0;
  }
  return layout;
}

bool copies_right(Random& random, DType dtype) {
  const auto ndim = 1 + random() % 5;
  std::vector<std::int64_t> shape;
  for (unsigned d = 0; d < ndim; ++d) {
    const std::int64_t choices[] = {1, 2, 3, 7, 8, 16, 33};
    shape.push_back(choices[random() % 7]);
  }
  const std::size_t element = size_of(dtype);
  const Layout in = random_layout(random, shape, random() % 2 == 0);
  const Layout out = random_layout(random, shape, random() % 2 == 0);
  const std::size_t shift = random() % 3 == 0 ? element : 0;  // unaligned bases
  Buffer from(to_size(in.elements) * element + 16);
  Buffer to(to_size(out.elements) * element + 16);
  std::vector<std::byte> source(to_size(in.elements) * element + 16);
  for (auto& byte : source) {
    byte = static_cast<std::byte>(random());
  }
  from.upload(source.data(), source.size());
  cuda::strided_copy(from.at(shift), in.strides, to.at(shift), out.strides, shape, dtype, nullptr);
  COHORT_CHECK(cudaDeviceSynchronize());
  const auto result = to.download<std::byte>(to_size(out.elements) * element + 16);
  std::vector<std::byte> want(result.size(), std::byte{0xff});
  std::vector<std::int64_t> index(shape.size(), 0);
  while (true) {
    std::int64_t a = 0;
    std::int64_t b = 0;
    for (std::size_t d = 0; d < shape.size(); ++d) {
      a += index[d] * in.strides[d];
      b += index[d] * out.strides[d];
    }
    std::memcpy(want.data() + shift + to_size(b) * element,
                source.data() + shift + to_size(a) * element, element);
    std::size_t d = 0;
    while (d < shape.size() && ++index[d] == shape[d]) {
      index[d++] = 0;
    }
    if (d == shape.size()) {
      break;
    }
  }
  return want == result;  // gaps and borders must be untouched
}

void test_fill(Tally& tally) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::i32}) {
    for (const std::int64_t count : {1, 3, 7, 8, 9, 4095, 4097}) {
      const std::size_t element = size_of(dtype);
      Buffer out(to_size(count) * element + 32);
      cuda::fill(out.at(element), count, dtype, 3.0, nullptr);
      COHORT_CHECK(cudaDeviceSynchronize());
      const auto bytes = out.download<std::byte>(to_size(count) * element + 2 * element);
      bool good = bytes[element - 1] == std::byte{0xff} && bytes.back() == std::byte{0xff};
      for (std::int64_t i = 0; i < count; ++i) {
        const std::byte* at = bytes.data() + to_size(i + 1) * element;
        std::int32_t integer = 0;
        std::memcpy(&integer, at, std::min<std::size_t>(element, 4));
        good = good && (dtype == DType::i32 ? integer == 3 : decode(dtype, at) == 3.0);
      }
      tally.expect(good, fmt::format("fill {} of {}", count, to_string(dtype)));
    }
  }
}

void test_reduce(Tally& tally) {
  Random random(11);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const int n : {1, 2, 5, 8, 11}) {
      for (const std::int64_t count : {1, 7, 8, 129, 5000}) {
        const std::size_t element = size_of(dtype);
        const auto in = random_elements(random, dtype, n * count, false);
        Buffer pieces(in.size());
        Buffer out(to_size(count) * element);
        pieces.upload(in.data(), in.size());
        cuda::reduce_pieces(pieces.at(), n, count, out.at(), count, dtype, nullptr);
        COHORT_CHECK(cudaDeviceSynchronize());
        const auto result = out.download<std::byte>(to_size(count) * element);
        bool good = true;
        for (std::int64_t i = 0; i < count; ++i) {
          float sum = -0.0F;  // the documented order, so the bits are known
          for (int p = 0; p < n; ++p) {
            sum += static_cast<float>(decode(dtype, in.data() + to_size(p * count + i) * element));
          }
          std::byte want[4];
          encode(dtype, sum, want);
          good = good && std::memcmp(want, result.data() + to_size(i) * element, element) == 0;
        }
        tally.expect(good,
                     fmt::format("reduce_pieces n={} count={} {}", n, count, to_string(dtype)));
      }
    }
  }
}

}  // namespace

void test_local(Tally& tally) {
  Random random(7);
  for (const DType dtype : {DType::u8, DType::bf16, DType::f32, DType::f64}) {
    for (int i = 0; i < 60; ++i) {
      tally.expect(copies_right(random, dtype),
                   fmt::format("strided_copy number {} of {}", i, to_string(dtype)));
    }
  }
  test_fill(tally);
  test_reduce(tally);
}

}  // namespace cohort::test
