// SPDX-License-Identifier: Apache-2.0
#include "cohort/tensor.hpp"

#include <array>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using cohort::test::says;

namespace {

/// Counts what comes back.
class Counting : public MemoryOwner {
 public:
  void release(std::uint64_t block) noexcept override { released.push_back(block); }
  void record_stream(std::uint64_t block, StreamRef) override { recorded.push_back(block); }

  std::vector<std::uint64_t> released;
  std::vector<std::uint64_t> recorded;
};

std::array<float, 24> numbers() {
  std::array<float, 24> values{};
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<float>(i);
  }
  return values;
}

}  // namespace

TEST_CASE("dims are a short list", "[tensor]") {
  const Dims dims{2, 3, 4};
  CHECK(dims.size() == 3);
  CHECK(dims[2] == 4);
  CHECK(dims == Dims{2, 3, 4});
  CHECK_FALSE(dims == Dims{2, 3});
  CHECK_FALSE(dims == Dims{2, 3, 5});
  CHECK(to_string(dims) == "(2,3,4)");
  CHECK(to_string(Dims{}) == "()");
  CHECK_THROWS_MATCHES((Dims{1, 1, 1, 1, 1, 1, 1, 1, 1}), UsageError, says("9", "8"));
}

TEST_CASE("element counts are exact or refused", "[tensor]") {
  CHECK(numel(Dims{}) == 1);
  CHECK(numel({2, 3, 4}) == 24);
  CHECK(numel({2, 0, 4}) == 0);
  CHECK_THROWS_MATCHES(numel({2, -1}), UsageError,
                       says("shape: expected extents >= 0, got (2,-1)"));
  CHECK_THROWS_AS(numel({0, -1}), UsageError);
  constexpr auto kMax = std::numeric_limits<std::int64_t>::max();
  CHECK_THROWS_MATCHES(numel({kMax, 2}, "all_gather x"), UsageError,
                       says("all_gather x: expected fewer than 2^59 elements, got (9223"));
  CHECK(bytes_of({2, 3}, DType::bf16) == 12);
  CHECK_THROWS_MATCHES(bytes_of({2, 3}, static_cast<DType>(99)), UsageError,
                       says("dtype: expected an element type, got number 99"));
  CHECK_THROWS_AS(numel({kMax, 2, 0}), UsageError);
  CHECK(contiguous_strides({2, 3, 4}) == Dims{12, 4, 1});
  CHECK(contiguous_strides({1, std::int64_t{1} << 40, std::int64_t{1} << 40}).size() == 3);
}

TEST_CASE("dimensions count from both ends", "[tensor]") {
  CHECK(normalize_dim(0, 3, "x dim") == 0);
  CHECK(normalize_dim(-1, 3, "x dim") == 2);
  CHECK(normalize_dim(-3, 3, "x dim") == 0);
  CHECK_THROWS_MATCHES(normalize_dim(3, 3, "x dim"), UsageError, says("x dim", "[-3, 3)", "3"));
  CHECK_THROWS_AS(normalize_dim(-4, 3, "x dim"), UsageError);
  CHECK_THROWS_AS(normalize_dim(0, 0, "x dim"), UsageError);
}

TEST_CASE("a list of one stride is strides", "[tensor]") {
  auto values = numbers();
  const TensorView every_third(values.data(), DType::f32, {8}, {3}, Device{});
  CHECK(every_third.strides() == Dims{3});
  CHECK(every_third.slice(0, 7, 1).data_as<float>() == &values[21]);
}

TEST_CASE("views address what they say", "[tensor]") {
  auto values = numbers();
  const TensorView view(values.data(), DType::f32, {2, 3, 4});
  CHECK(view.numel() == 24);
  CHECK(view.bytes() == 96);
  CHECK(view.size(-1) == 4);
  CHECK(view.is_contiguous());
  CHECK(to_string(view) == "f32(2,3,4) on host");

  const auto slice = view.slice(-2, 1, 2);
  CHECK(slice.shape() == Dims{2, 2, 4});
  CHECK(*slice.data_as<float>() == 4.0F);
  CHECK_FALSE(slice.is_contiguous());
  const auto one_more = view.transpose(0, 1).unsqueeze();
  CHECK(one_more.shape() == Dims{1, 3, 2, 4});
  CHECK(one_more.strides() == Dims{0, 4, 12, 1});
  CHECK(one_more.data() == view.data());
  CHECK(one_more.numel() == 24);
  CHECK_THROWS_AS(one_more.unsqueeze().unsqueeze().unsqueeze().unsqueeze().unsqueeze(), UsageError);
  const auto transposed = view.transpose(0, -1);
  CHECK(transposed.shape() == Dims{4, 3, 2});
  CHECK(transposed.strides() == Dims{1, 4, 12});
  CHECK(view.reshape({6, 4}).strides() == Dims{4, 1});
  CHECK(view.slice(0, 1, 1).is_contiguous());
  CHECK(view.slice(1, 0, 0).is_contiguous());  // of no elements
  CHECK_FALSE(transposed.is_contiguous());
  CHECK_FALSE(one_more.is_contiguous());
  CHECK_FALSE(ConstTensorView(transposed).is_contiguous());
  CHECK(transposed.transpose(0, 2).is_contiguous());
  CHECK(view.unsqueeze().is_contiguous());
  CHECK(ConstTensorView(view).is_contiguous());
  CHECK(TensorView(values.data(), DType::f32, {2, 12}, {12, 1}).is_contiguous());
  CHECK_FALSE(TensorView(values.data(), DType::f32, {2, 6}, {12, 1}).is_contiguous());

  CHECK_THROWS_MATCHES(view.slice(1, 2, 2), UsageError, says("slice", "[2, 2+2)", "3"));
  CHECK_THROWS_AS(view.slice(1, -1, 1), UsageError);
  CHECK_THROWS_AS(view.slice(1, 1, std::numeric_limits<std::int64_t>::max()), UsageError);
  CHECK_THROWS_AS(view.slice(3, 0, 1), UsageError);
  CHECK_THROWS_AS(slice.reshape({16}), UsageError);
  CHECK_THROWS_AS(view.reshape({23}), UsageError);
  CHECK_THROWS_MATCHES(view.data_as<double>(), UsageError, says("f32", "f64"));
}

TEST_CASE("views that cannot be are refused", "[tensor]") {
  float value = 0;
  CHECK_THROWS_MATCHES(TensorView(nullptr, DType::f32, {2}), UsageError, says("data", "null"));
  CHECK_THROWS_MATCHES(TensorView(&value, DType::f32, {1}, {1, 1}), UsageError, says("strides"));
  CHECK_THROWS_AS(TensorView(&value, DType::f32, {-1}), UsageError);
  constexpr std::int64_t kBig = std::int64_t{1} << 40;
  CHECK_THROWS_MATCHES(TensorView(&value, DType::f32, {kBig, kBig}), UsageError, says("2^59"));
  CHECK_THROWS_MATCHES(TensorView(&value, DType::f32, {0, kBig, kBig}), UsageError, says("2^59"));
  CHECK(TensorView(nullptr, DType::f32, {0, 4}).numel() == 0);
  CHECK(TensorView(nullptr, DType::f32, {0, 4}).slice(1, 1, 2).data() == nullptr);
}

TEST_CASE("bytes can be viewed as elements of another type", "[tensor]") {
  auto values = numbers();
  const TensorView view(values.data(), DType::f32, {2, 3, 4});
  const auto bytes = view.reinterpret(DType::u8);
  CHECK(bytes.shape() == Dims{2, 3, 16});
  CHECK(bytes.strides() == Dims{48, 16, 1});
  CHECK(bytes.dtype() == DType::u8);
  const auto half = bytes.slice(2, 8, 8).reinterpret(DType::f32);
  CHECK(half.shape() == Dims{2, 3, 2});
  CHECK(half.strides() == Dims{12, 4, 1});
  CHECK(*half.data_as<float>() == 2.0F);
  CHECK(view.reinterpret(DType::i32).strides() == view.strides());
  CHECK(view.transpose(0, 1).reinterpret(DType::f64).strides() == Dims{2, 6, 1});
  CHECK(view.slice(2, 1, 1).reinterpret(DType::f16).shape() == Dims{2, 3, 2});
  CHECK(view.slice(2, 1, 0).reinterpret(DType::f64).shape() == Dims{2, 3, 0});
  CHECK(TensorView(nullptr, DType::u8, {0, 8}).reinterpret(DType::f64).shape() == Dims{0, 1});

  for (const TensorView& any : {view, view.slice(0, 0, 0)}) {
    CHECK_THROWS_MATCHES(any.reinterpret(static_cast<DType>(99)), UsageError,
                         says("reinterpret dtype", "number 99"));
  }
  CHECK_THROWS_MATCHES(view.slice(2, 0, 3).reinterpret(DType::f64), UsageError,
                       says("reinterpret", "f32(2,3,3)", "f64"));                // the row
  CHECK_THROWS_AS(view.slice(2, 1, 2).reinterpret(DType::f64), UsageError);      // the memory
  CHECK_THROWS_AS(view.transpose(0, 2).reinterpret(DType::u8), UsageError);      // gaps
  CHECK_THROWS_AS(TensorView(values.data(), DType::f32, Dims{2, 2}, Dims{3, 1})  // the step
                      .reinterpret(DType::f64),
                  UsageError);
  CHECK_THROWS_AS(TensorView(values.data(), DType::f32, Dims{}).reinterpret(DType::u8), UsageError);

  // Nothing is stepped over where there is one row or none, so its stride may be any.
  constexpr std::int64_t kFar = std::numeric_limits<std::int64_t>::max();
  const TensorView row(values.data(), DType::f32, Dims{1, 4}, Dims{kFar, 1});
  CHECK(row.reinterpret(DType::u8).shape() == Dims{1, 16});
  CHECK(row.reinterpret(DType::u8).strides() == Dims{0, 1});
  CHECK(row.slice(0, 1, 0).data() == values.data());
  CHECK(row.slice(0, 1, 0).reinterpret(DType::f64).shape() == Dims{0, 2});
  CHECK_THROWS_AS(TensorView(values.data(), DType::f32, Dims{2, 4}, Dims{kFar, 1})  // no memory
                      .reinterpret(DType::u8),
                  UsageError);
}

TEST_CASE("mutable views convert to constant ones, not back", "[tensor]") {
  auto values = numbers();
  const TensorView view(values.data(), DType::f32, {24});
  const ConstTensorView constant = view;
  CHECK(constant.data() == view.data());
  STATIC_REQUIRE(std::is_same_v<decltype(constant.data_as<float>()), const float*>);
  STATIC_REQUIRE_FALSE(std::is_convertible_v<ConstTensorView, TensorView>);
}

TEST_CASE("a tensor gives its memory back once", "[tensor]") {
  auto values = numbers();
  const auto owner = std::make_shared<Counting>();
  const TensorView view(values.data(), DType::f32, {24});
  {
    Tensor tensor(view, owner, 7);
    tensor.record_stream({});
    Tensor moved = std::move(tensor);
    CHECK(moved.data() == values.data());
    CHECK(tensor.numel() == 0);  // NOLINT(bugprone-use-after-move)
    CHECK(owner->released.empty());
    Tensor other(view, owner, 8);
    other = std::move(moved);
    CHECK(owner->released == std::vector<std::uint64_t>{8});
    auto& same = other;
    other = std::move(same);
    CHECK(owner->released.size() == 1);
    other.reset();
    CHECK(other.data() == nullptr);
  }
  CHECK(owner->released == std::vector<std::uint64_t>{8, 7});
  CHECK(owner->recorded == std::vector<std::uint64_t>{7});
  CHECK(owner.use_count() == 1);
}

TEST_CASE("an owner may keep the share that a tensor leaves", "[tensor]") {
  class Keeping final : public Counting {
   public:
    void take_back(std::uint64_t block, std::shared_ptr<MemoryOwner>& self) noexcept override {
      release(block);
      kept = std::move(self);
    }
    std::shared_ptr<MemoryOwner> kept;
  };
  auto values = numbers();
  auto owner = std::make_shared<Keeping>();
  const std::weak_ptr<Keeping> alive = owner;
  auto* const raw = owner.get();
  Tensor tensor(values.data(), DType::f32, {4, 6}, Counted{24}, Device{}, std::move(owner), 3);
  CHECK(tensor.numel() == 24);
  CHECK(tensor.view().strides() == Dims{6, 1});
  CHECK(tensor.view().is_contiguous());
  tensor.reset();
  CHECK(raw->released == std::vector<std::uint64_t>{3});
  CHECK(alive.use_count() == 1);
  CHECK(tensor.data() == nullptr);
  tensor.reset();
  CHECK(raw->released.size() == 1);
  raw->kept.reset();
  CHECK(alive.expired());
}

TEST_CASE("a tensor can be viewed as a smaller one", "[tensor]") {
  auto values = numbers();
  Tensor tensor(TensorView(values.data(), DType::f32, {6, 4}), nullptr, 0);
  tensor.shrink_to({3, 5});
  CHECK(tensor.view().strides() == Dims{5, 1});
  CHECK_THROWS_MATCHES(tensor.shrink_to({16}), UsageError, says("(16)", "(3,5)"));
}
