// SPDX-License-Identifier: Apache-2.0
#include <cohort/host/strided.hpp>
#include <cstdint>
#include <numeric>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using namespace cohort::host;

namespace {

const std::byte* bytes_of(const std::vector<std::int32_t>& values) {
  return reinterpret_cast<const std::byte*>(values.data());
}
std::byte* bytes_of(std::vector<std::int32_t>& values) {
  return reinterpret_cast<std::byte*>(values.data());
}

std::vector<std::int32_t> counted(std::size_t count) {
  std::vector<std::int32_t> values(count);
  std::iota(values.begin(), values.end(), 0);
  return values;
}

/// The elements in row-major order, by indices alone.
std::vector<std::int32_t> walk(const std::vector<std::int32_t>& memory, const Dims& shape,
                               const Dims& strides) {
  std::vector<std::int32_t> found;
  for (std::int64_t flat = 0; flat < numel(shape); ++flat) {
    std::int64_t rest = flat;
    std::int64_t at = 0;
    for (int d = shape.size() - 1; d >= 0; --d) {
      at += rest % shape[d] * strides[d];
      rest /= shape[d];
    }
    found.push_back(memory[static_cast<std::size_t>(at)]);
  }
  return found;
}

struct Case {
  Dims shape;
  Dims strides;
};

const std::vector<Case> kCases = {
    {Dims{24}, Dims{1}},
    {Dims{2, 3, 4}, Dims{12, 4, 1}},
    {Dims{2, 3, 4}, Dims{1, 2, 6}},
    {Dims{4, 6}, Dims{6, 1}},
    {Dims{4, 3}, Dims{6, 2}},
    {Dims{2, 3, 2}, Dims{12, 4, 1}},
    {Dims{1, 5, 1}, Dims{9, 2, 7}},
    {Dims{3, 4}, Dims{0, 1}},
    {Dims{}, Dims{}},
};

}  // namespace

TEST_CASE("dimensions without gaps between them become one", "[host]") {
  CHECK(collapse(Dims{2, 3, 4}, Dims{12, 4, 1}).ndim == 1);
  CHECK(collapse(Dims{2, 3, 4}, Dims{12, 4, 1}).contiguous());
  const Layout slice = collapse(Dims{2, 3, 4}, Dims{12, 4, 1}, 1, 2);
  CHECK(slice.ndim == 2);
  CHECK(slice.numel == 16);
  CHECK(slice.shape[1] == 8);
  CHECK_FALSE(slice.contiguous());
  CHECK(collapse(Dims{4, 3}, Dims{1, 4}).ndim == 2);
  CHECK(collapse(Dims{5}, Dims{3}).ndim == 1);
  CHECK_FALSE(collapse(Dims{5}, Dims{3}).contiguous());
  CHECK(collapse(Dims{1, 1}, Dims{7, 3}).contiguous());
  CHECK(collapse(Dims{}, Dims{}).numel == 1);
  CHECK(collapse(Dims{3, 0, 2}, Dims{1, 1, 1}).numel == 0);
}

TEST_CASE("copies between any strides keep the row-major order", "[host]") {
  const auto memory = counted(64);
  for (const auto& [shape, strides] : kCases) {
    const auto expected = walk(memory, shape, strides);
    std::vector<std::int32_t> dense(expected.size(), -1);
    const auto count = static_cast<std::int64_t>(expected.size());
    copy(bytes_of(dense), dense_layout(count), bytes_of(memory), collapse(shape, strides), 4);
    CHECK(dense == expected);
    if (shape == Dims{3, 4}) {
      continue;  // its elements share memory
    }
    std::vector<std::int32_t> back(64, -1);
    copy(bytes_of(back), collapse(shape, strides), bytes_of(dense), dense_layout(count), 4);
    CHECK(walk(back, shape, strides) == expected);
    CHECK(std::count(back.begin(), back.end(), -1) == 64 - count);
  }
}

TEST_CASE("a walk can start anywhere and stop anywhere", "[host]") {
  const auto memory = counted(64);
  for (const auto& [shape, strides] : kCases) {
    const auto expected = walk(memory, shape, strides);
    const Layout layout = collapse(shape, strides);
    for (std::int64_t first = 0; first < layout.numel; ++first) {
      for (const std::int64_t step : {1, 2, 5}) {
        ReadCursor reader(bytes_of(memory), layout, 4, first);
        std::vector<std::int32_t> found;
        for (std::int64_t at = first; at < layout.numel; at += step) {
          const std::int64_t count = std::min(step, layout.numel - at);
          std::vector<std::int32_t> part(static_cast<std::size_t>(count));
          WriteCursor writer(bytes_of(part), dense_layout(count), 4);
          copy(writer, reader, count);
          found.insert(found.end(), part.begin(), part.end());
        }
        CHECK(found == std::vector<std::int32_t>(expected.begin() + first, expected.end()));
      }
    }
  }
}

TEST_CASE("elements of every size are copied whole", "[host]") {
  const auto element = static_cast<std::size_t>(GENERATE(1, 2, 4, 8));
  std::vector<std::byte> from(8 * 16);
  for (std::size_t i = 0; i < from.size(); ++i) {
    from[i] = static_cast<std::byte>(i);
  }
  std::vector<std::byte> to(8 * element);
  copy(to.data(), dense_layout(8), from.data(), collapse(Dims{8}, Dims{2}), element);
  for (std::size_t i = 0; i < to.size(); ++i) {
    CHECK(to[i] == static_cast<std::byte>(i / element * 2 * element + i % element));
  }
}

TEST_CASE("the extent of a view covers negative strides", "[host]") {
  std::vector<std::int32_t> memory(64);
  const auto extent = [&](Dims shape, Dims strides) {
    return extent_of(TensorView(memory.data() + 32, DType::i32, shape, strides));
  };
  CHECK(extent(Dims{4}, Dims{1}).end == 16);
  CHECK(extent(Dims{4}, Dims{-2}).begin == -24);
  CHECK(extent(Dims{4}, Dims{-2}).end == 4);
  CHECK(extent(Dims{2, 3}, Dims{8, 2}).end == 52);
  CHECK(extent(Dims{2, 0}, Dims{8, 2}).end == 0);
}
