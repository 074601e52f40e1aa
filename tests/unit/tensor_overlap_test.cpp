// SPDX-License-Identifier: Apache-2.0
#include "cohort/tensor_overlap.hpp"

#include <limits>
#include <random>
#include <set>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;

namespace {

/// Every byte of a view, the simple way.
std::set<std::intptr_t> bytes_of(const TensorView& view) {
  std::set<std::intptr_t> bytes;
  Dims index(std::vector<std::int64_t>(static_cast<std::size_t>(view.ndim()), 0));
  for (std::int64_t flat = 0; flat < view.numel(); ++flat) {
    std::int64_t rest = flat;
    std::int64_t offset = 0;
    for (int i = view.ndim() - 1; i >= 0; --i) {
      offset += rest % view.shape()[i] * view.strides()[i];
      rest /= view.shape()[i];
    }
    const auto size = static_cast<std::int64_t>(size_of(view.dtype()));
    for (std::int64_t byte = 0; byte < size; ++byte) {
      bytes.insert(reinterpret_cast<std::intptr_t>(view.data()) + offset * size + byte);
    }
  }
  return bytes;
}

}  // namespace

TEST_CASE("views overlap where an element of both has a byte", "[overlap]") {
  std::vector<float> memory(64);
  const TensorView all(memory.data(), DType::f32, {8, 8});
  CHECK(overlap(all, all));
  CHECK(overlap(all.slice(0, 0, 4), all.slice(0, 3, 4)));
  CHECK_FALSE(overlap(all.slice(0, 0, 4), all.slice(0, 4, 4)));
  CHECK_FALSE(overlap(all.slice(1, 0, 4), all.slice(1, 4, 4)));  // side by side in every row
  CHECK(overlap(all.slice(1, 0, 5), all.slice(1, 4, 4)));
  CHECK(overlap(all.slice(1, 0, 1), all.transpose(0, 1).slice(1, 7, 1)));
  CHECK_FALSE(overlap(all.slice(0, 0, 0), all));
  CHECK(is_apart(all.slice(0, 0, 4), all.slice(0, 4, 4)));
  CHECK(is_apart(all.slice(0, 4, 4), all.slice(0, 0, 4)));
  CHECK_FALSE(is_apart(all.slice(1, 0, 4), all.slice(1, 4, 4)));
  CHECK(is_apart(all, all.slice(0, 0, 0)));
  const TensorView back(memory.data() + 31, DType::f32, {4}, {-8});  // from row 3 to the first
  CHECK_FALSE(is_apart(back, all.slice(0, 0, 1)));
  CHECK(is_apart(back, all.slice(0, 4, 4)));
  CHECK_FALSE(is_apart(TensorView(memory.data(), DType::f32, {2}, {std::int64_t{1} << 60}), all));
  CHECK(identical(all, all));
  CHECK_FALSE(identical(all, all.transpose(0, 1)));
  CHECK_FALSE(identical(all.slice(0, 0, 4), all.slice(0, 1, 4)));
}

TEST_CASE("views overlap themselves where two elements share a byte", "[overlap]") {
  std::vector<float> memory(64);
  const auto repeats = [&](const Dims& shape, const Dims& strides) {
    return overlaps_itself(TensorView(memory.data() + 32, DType::f32, shape, strides));
  };
  CHECK(repeats({8, 4}, {0, 1}));
  CHECK(repeats({8, 4}, {3, 1}));
  CHECK(repeats({2}, {0}));
  CHECK_FALSE(repeats({8, 4}, {4, 1}));
  CHECK_FALSE(repeats({8, 4}, {5, 1}));
  CHECK_FALSE(repeats({4, 8}, {1, 4}));
  CHECK_FALSE(repeats({1, 4}, {0, 1}));
  CHECK_FALSE(repeats({0, 4}, {0, 1}));
  CHECK_FALSE(repeats({2, 3}, {3, 2}));  // 0 2 4 and 3 5 7
  CHECK(repeats({2, 4}, {6, 2}));        // 0 2 4 6 and 6 8 10 12
  CHECK_FALSE(repeats({}, {}));
}

TEST_CASE("whether a view overlaps itself is exact for all strides", "[overlap]") {
  std::mt19937 random(11);
  std::vector<std::uint16_t> memory(4096);
  int repeated = 0;
  int wrong = 0;
  for (int round = 0; round < 4000; ++round) {
    std::vector<std::int64_t> shape;
    std::vector<std::int64_t> strides;
    for (auto left = 1 + random() % 4; left > 0; --left) {
      shape.push_back(static_cast<std::int64_t>(random() % 5));
      strides.push_back(static_cast<std::int64_t>(random() % 41) - 20);
    }
    const TensorView view(memory.data() + 2048, DType::f16, Dims(shape), Dims(strides));
    const bool expected = bytes_of(view).size() < view.bytes();
    repeated += expected ? 1 : 0;
    wrong += overlaps_itself(view) != expected ? 1 : 0;
  }
  CHECK(wrong == 0);
  CHECK(repeated > 200);
  CHECK(repeated < 3500);
}

TEST_CASE("overlap is exact for all strides", "[overlap]") {
  std::mt19937 random(7);
  std::vector<std::uint16_t> memory(4096);
  int together = 0;
  int wrong = 0;
  for (int round = 0; round < 4000; ++round) {
    const auto view = [&] {
      const auto ndim = 1 + random() % 3;
      std::vector<std::int64_t> shape;
      std::vector<std::int64_t> strides;
      for (unsigned i = 0; i < ndim; ++i) {
        shape.push_back(static_cast<std::int64_t>(random() % 5));
        strides.push_back(static_cast<std::int64_t>(random() % 41) - 20);
      }
      return TensorView(memory.data() + 2048 + random() % 64, DType::f16, Dims(shape),
                        Dims(strides));
    };
    const auto a = view();
    const auto b = view();
    const auto bytes = bytes_of(a);
    bool expected = false;
    for (const auto byte : bytes_of(b)) {
      expected = expected || bytes.count(byte) != 0;
    }
    together += expected ? 1 : 0;
    wrong += overlap(a, b) != expected || overlap(b, a) != expected ? 1 : 0;
  }
  CHECK(wrong == 0);
  CHECK(together > 200);
  CHECK(together < 3500);
}

TEST_CASE("rows side by side are told apart whatever their number", "[overlap]") {
  const auto at = [](std::int64_t address) { return reinterpret_cast<void*>(address); };
  constexpr std::int64_t kRows = std::int64_t{1} << 32;
  const TensorView all(at(1 << 20), DType::f32, {kRows, 3, 2, 64}, {768, 256, 64, 1});
  CHECK_FALSE(overlap(all.slice(2, 0, 1), all.slice(2, 1, 1)));
  CHECK_FALSE(overlap(all.slice(3, 0, 32), all.slice(3, 32, 32)));
  CHECK(overlap(all.slice(3, 0, 33), all.slice(3, 32, 32)));
  CHECK_FALSE(overlap(all.slice(1, 0, 2), all.slice(1, 2, 1)));
  CHECK(overlap(all.slice(0, 5, kRows - 5), all.slice(1, 2, 1)));
  CHECK_FALSE(overlaps_itself(all.transpose(0, 3)));
}

TEST_CASE("strides that would need a long search, or reach too far, are taken to overlap",
          "[overlap]") {
  const auto at = [](std::int64_t address) { return reinterpret_cast<void*>(address); };
  // Elements apart, strides within half a percent of each other: 19^7 differences.
  Dims shape{10, 10, 10, 10, 10, 10, 10};
  Dims strides = shape;
  std::int64_t step = 1;
  for (int i = 6; i >= 0; --i, step *= 10) {
    strides[i] = 200'000'000 + step;
  }
  const TensorView tangled(at(1 << 20), DType::u8, shape, strides);
  CHECK(overlaps_itself(tangled));
  const std::int64_t far = std::numeric_limits<std::int64_t>::max() / 2;
  const TensorView endless(at(1 << 20), DType::f32, {4, 4}, {far, 1});
  CHECK(overlaps_itself(TensorView(at(1 << 20), DType::f32, {4, 4}, {1, far})));
  CHECK(overlap(endless, tangled));
}
