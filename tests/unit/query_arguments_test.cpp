// SPDX-License-Identifier: Apache-2.0
#include "cohort/query_arguments.hpp"

#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using detail::QueryParts;
using test::says;

// What is gathered, in every layout and type: support/decode_checks.hpp.

namespace {

constexpr Caller kCaller{"dcp[0]", 1, 3};
const Device kHost{};

/// Tensors of one test, each in memory of its own.
class Tensors {
 public:
  [[nodiscard]] TensorView make(const Dims& shape, DType dtype = DType::f32) {
    auto& memory = memory_.emplace_back(static_cast<std::size_t>(numel(shape)) + 1);
    return {memory.data(), dtype, shape};
  }

 private:
  std::vector<std::vector<double>> memory_;
};

}  // namespace

TEST_CASE("parts of one type are gathered as they are, others as bytes", "[dcp]") {
  Tensors tensors;
  const auto nope = tensors.make({2, 4, 8});
  const QueryParts same(nope, tensors.make({2, 4, 6}));
  CHECK(same.nope.dtype() == DType::f32);
  CHECK(same.gathered_shape(kCaller, kHost) == Dims{2, 12, 14});
  const QueryParts mixed(nope, tensors.make({2, 4, 6}, DType::f16));
  CHECK(mixed.types.nope == DType::f32);
  CHECK(mixed.types.pe == DType::f16);
  CHECK(mixed.nope.dtype() == DType::u8);
  CHECK(mixed.pe.dtype() == DType::u8);
  CHECK(mixed.gathered_shape(kCaller, kHost) == Dims{2, 12, 8 * 4 + 6 * 2});
}

TEST_CASE("parts that make no query are named", "[dcp]") {
  Tensors tensors;
  const auto nope = tensors.make({2, 2, 8});
  const auto pe = tensors.make({2, 2, 4});
  const auto half = tensors.make({2, 2, 4}, DType::f16);
  const auto refused = [&](const ConstTensorView& a, const ConstTensorView& b, std::string_view who,
                           std::string_view why) {
    CHECK_THROWS_MATCHES(QueryParts(a, b).gathered_shape(kCaller, kHost), UsageError,
                         says(std::string(who), std::string(why)));
  };
  refused(nope.reshape({4, 8}), pe, "gather_query q_nope", "[B, H/n, Dn]");
  refused(nope, pe.reshape({4, 4}), "gather_query q_pe", "[B, H/n, Dr]");
  refused(tensors.make({8, 2, 2}).transpose(0, 2), pe, "gather_query q_nope", "without gaps");
  refused(nope, tensors.make({4, 2, 2}).transpose(0, 2), "gather_query q_pe", "without gaps");
  refused(nope, pe.slice(0, 0, 1), "gather_query q_pe", "expected f32(2,2,4)");
  refused(nope, half.slice(1, 0, 1), "gather_query q_pe", "expected u8(2,2,8)");
  auto* const odd = static_cast<std::byte*>(nope.data()) + 1;
  const TensorView crooked(odd, DType::f32, {2, 2, 4});
  refused(crooked, pe, "gather_query q_nope", "a multiple of 4 bytes");
  refused(nope, crooked, "gather_query q_pe", "a multiple of 4 bytes");
  refused(crooked, half, "gather_query q_nope", "a multiple of 4 bytes");
  refused(half, crooked, "gather_query q_pe", "a multiple of 4 bytes");
  const TensorView no_type(nope.data(), static_cast<DType>(99), {2, 2, 4});
  refused(no_type, pe, "gather_query q_nope", "number 99");
  refused(nope, no_type, "gather_query q_pe", "number 99");
  const std::int64_t many = std::int64_t{1} << 57;
  refused(TensorView(nullptr, DType::f32, {0, many, 1}),
          TensorView(nullptr, DType::f32, {0, many, 1}), "gather_query q", "2^59");
  const Device elsewhere{DeviceKind::cuda, 0};
  const TensorView far(nope.data(), DType::f32, {2, 2, 8}, elsewhere);
  refused(far, pe, "gather_query q_nope", "group dcp[0]");
}

TEST_CASE("what cannot take the whole query is named", "[dcp]") {
  Tensors tensors;
  const auto nope = tensors.make({2, 2, 8});
  const auto pe = tensors.make({2, 2, 4});
  const auto half = tensors.make({2, 2, 4}, DType::f16);
  const auto q = tensors.make({2, 6, 12});
  QueryParts(nope, pe).check_into(q, kCaller, kHost);
  const auto refused = [&](const TensorView& into, const ConstTensorView& with,
                           std::string_view why) {
    CHECK_THROWS_MATCHES(QueryParts(nope, with).check_into(into, kCaller, kHost), UsageError,
                         says("gather_query q:", std::string(why)));
  };
  refused(q, half, "expected u8(2,6,40), got f32");
  refused(q.slice(2, 0, 8), pe, "expected f32(2,6,12)");
  const auto wide = tensors.make({2, 6, 24});
  refused(TensorView(wide.data(), DType::f32, {2, 6, 12}, {144, 24, 2}), pe, "without gaps");
  CHECK_THROWS_AS(QueryParts(nope, pe).check_into(
                      TensorView(wide.data(), DType::f32, {2, 6, 12}, {144, 0, 1}), kCaller, kHost),
                  UsageError);
  const auto memory = tensors.make({2, 6, 12});
  const TensorView inside(memory.data(), DType::f32, {2, 2, 8});
  CHECK_THROWS_AS(QueryParts(inside, pe).check_into(memory, kCaller, kHost), UsageError);
}
