// SPDX-License-Identifier: Apache-2.0
#include "cohort/call_record.hpp"

#include <array>
#include <cstdint>
#include <set>
#include <utility>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;

TEST_CASE("what ranks must agree on is in the signature", "[call_record]") {
  const auto of = [](const Dims& shape, const std::vector<std::int64_t>& sizes, DType dtype) {
    return trace_record(TraceCall::all_gather, shape, dtype, 1, sizes, 0);
  };
  const TraceRecord mine = of({2, 3, 4, 5, 6, 7}, {3, 5}, DType::f16);
  CHECK(mine.ndim == 6);
  CHECK(mine.extents == std::array<std::uint32_t, 5>{2, 3, 4, 5, 6});
  CHECK(of({2, 5, 4, 5, 6, 7}, {3, 5}, DType::f16).signature == mine.signature);
  CHECK(of({2, 3, 4, 5, 6, 7}, {5, 3}, DType::f16).signature != mine.signature);
  CHECK(of({2, 3, 4, 5, 6, 8}, {3, 5}, DType::f16).signature != mine.signature);
  CHECK(of({2, 3, 4, 5, 6, 7}, {3, 5}, DType::bf16).signature != mine.signature);
  CHECK(of({2, 3}, {3, 3}, DType::f16).signature == of({2, 3}, {}, DType::f16).signature);
  CHECK(of({2, 3}, {}, DType::f16).signature != of({2, 5}, {}, DType::f16).signature);
  CHECK(of({2, 3}, {3, 4}, DType::f16).signature != of({2, 3}, {}, DType::f16).signature);
  CHECK(of({0, 3}, {3, 4}, DType::f16).signature != of({3}, {3, 4}, DType::f16).signature);
}

TEST_CASE("each extent is in the signature, whether or not a record has room for it",
          "[call_record]") {
  constexpr std::int64_t kWide = std::int64_t{1} << 32;
  const auto of = [](const Dims& shape) {
    return trace_record(TraceCall::all_reduce, shape, DType::f16, 0, {}, 0).signature;
  };
  for (const Dims& shape : {Dims{2, 3, 4, 5, 6}, Dims{2, 3, 4, 5, 6, 7, 8, 9}}) {
    std::set<std::uint32_t> signatures{of(shape)};
    for (int d = 0; d < shape.size(); ++d) {
      for (const std::int64_t more : {std::int64_t{1}, kWide, 2 * kWide}) {
        Dims other = shape;
        other[d] += more;
        CHECK(signatures.insert(of(other)).second);
      }
      for (int e = 0; e < d; ++e) {
        Dims other = shape;
        std::swap(other[d], other[e]);
        CHECK(signatures.insert(of(other)).second);
      }
    }
  }
}

TEST_CASE("each argument of a call is in the signature", "[call_record]") {
  std::set<std::uint32_t> signatures;
  for (const TraceCall call : {TraceCall::all_gather, TraceCall::merge_attention}) {
    for (const Dims& shape : {Dims{}, Dims{1}, Dims{8}, Dims{8, 1}, Dims{1, 8}}) {
      for (const int dim : {0, 1}) {
        for (const int variant : {-1, 0, 1, 255}) {
          for (const DType dtype : {DType::u8, DType::f32}) {
            CHECK(signatures.insert(trace_record(call, shape, dtype, dim, {}, variant).signature)
                      .second);
          }
        }
      }
    }
  }
}

TEST_CASE("a record has room for five extents of 32 bits, and zeros behind the last",
          "[call_record]") {
  const auto record =
      trace_record(TraceCall::send, {std::int64_t{1} << 33, 0, 7}, DType::bf16, 0, {}, 3);
  CHECK(record.extents == std::array<std::uint32_t, 5>{0xffffffffU, 0, 7, 0, 0});
  CHECK(record.call == TraceCall::send);
  CHECK(record.dtype == DType::bf16);
  CHECK(record.ndim == 3);
  CHECK(record.variant == 3);
  CHECK(record.sequence == 0);
  CHECK(trace_record(TraceCall::barrier, {}, DType::u8, 0, {}, 0).extents ==
        std::array<std::uint32_t, 5>{});
}
