// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cohort/host/host_ops.hpp>
#include <limits>
#include <vector>

#include "support/catch.hpp"
#include "support/host_site.hpp"

using namespace cohort;
using namespace cohort::host;
using namespace cohort::test;

namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

TensorView view(std::vector<float>& values, const Dims& shape) {
  return TensorView(values.data(), DType::f32, shape);
}

std::vector<float> counted(std::size_t count) {
  std::vector<float> values(count);
  for (std::size_t i = 0; i < count; ++i) {
    values[i] = static_cast<float>(i);
  }
  return values;
}

}  // namespace

TEST_CASE("copy follows strides and converts f32 to the half types", "[host]") {
  HostOps ops;
  auto from = counted(6);
  std::vector<float> to(6);
  ops.copy(view(from, {2, 3}).transpose(0, 1), view(to, {3, 2}), {});
  CHECK(to == std::vector<float>{0, 3, 1, 4, 2, 5});

  std::vector<float> odd(200);
  for (std::size_t i = 0; i < odd.size(); ++i) {
    odd[i] = 1.0F / static_cast<float>(i + 1);
  }
  std::vector<BFloat16> bf16(100);
  std::vector<Half> f16(100);
  const TensorView every_second(odd.data(), DType::f32, Dims{100}, Dims{2});
  ops.copy(every_second, TensorView(bf16.data(), DType::bf16, Dims{100}), {});
  ops.copy(every_second, TensorView(f16.data(), DType::f16, Dims{100}), {});
  for (std::size_t i = 0; i < 100; ++i) {
    CHECK(bf16[i].bits == float_to_bf16(odd[2 * i]));
    CHECK(f16[i].bits == float_to_f16(odd[2 * i]));
  }
  CHECK_THROWS_MATCHES(ops.copy(TensorView(f16.data(), DType::f16, Dims{100}),
                                TensorView(odd.data(), DType::f32, Dims{100}), {}),
                       UsageError, says("f16 to f32"));
}

TEST_CASE("pack_query puts the rotary part behind the latent one", "[host]") {
  HostOps ops;
  auto nope = counted(2 * 2 * 3);
  auto pe = counted(2 * 2 * 2);
  for (auto& x : pe) {
    x += 100;
  }
  std::vector<float> packed(2 * 2 * 5);
  ops.pack_query(view(nope, {2, 2, 3}), view(pe, {2, 2, 2}), view(packed, {2, 2, 5}), {});
  CHECK(packed == std::vector<float>{0, 1, 2, 100, 101, 3, 4,  5,  102, 103,
                                     6, 7, 8, 104, 105, 9, 10, 11, 106, 107});
}

TEST_CASE("two ranks of equal mass weigh one half each", "[host]") {
  HostOps ops;
  std::vector<float> out{2, 4, 6, 8};       // [1, 2, 2]
  std::vector<float> lses{1, 0, 1, kNone};  // [2, 1, 2]
  std::vector<float> corrected(4, -1);
  const MergeArguments e = by_head(1, view(out, {1, 2, 2}), view(lses, {1, 2}), {});
  MergeArguments two = e;
  two.partials.base = LseBase::two;
  ops.correct_partial(e.partials, view(lses, {2, 1, 2}), 0, view(corrected, {1, 2, 2}), {});
  CHECK(corrected == std::vector<float>{1, 2, 6, 8});
  ops.correct_partial(two.partials, view(lses, {2, 1, 2}), 1, view(corrected, {1, 2, 2}), {});
  CHECK(corrected == std::vector<float>{1, 2, 0, 0});  // empty: zeros
  std::vector<float> merged(2);
  two.lse = view(merged, {1, 2});
  ops.merge_lse(view(lses, {2, 1, 2}), two, 0, {});
  CHECK(merged == std::vector<float>{2, 0});  // log2(2^1 + 2^1), and rank 0 alone
}

TEST_CASE("pieces carry each rank's heads, and merge to the weighted mean", "[host]") {
  HostOps ops;
  const std::int64_t batch = 3;
  const std::int64_t heads = 2;  // of one rank
  const std::int64_t dim = 5;
  const int n = 2;
  const auto piece = dcp::packed_piece(batch, heads, dim, sizeof(float));
  // What both ranks send to rank 1.
  std::vector<std::byte> arrived(static_cast<std::size_t>(n) * piece.bytes);
  for (int r = 0; r < n; ++r) {
    auto out = counted(static_cast<std::size_t>(batch * heads * n * dim));
    std::vector<float> lse(static_cast<std::size_t>(batch * heads * n), 1.5F);
    for (auto& x : out) {
      x += static_cast<float>(r) * 1000;
    }
    lse[2] = r == 0 ? kNone : 0.0F;                    // row (0, 2): rank 1 alone
    lse[3] = std::numeric_limits<float>::quiet_NaN();  // row (0, 3): all empty
    out[3 * 5] = std::numeric_limits<float>::quiet_NaN();
    std::vector<std::byte> pieces(static_cast<std::size_t>(n) * piece.bytes);
    const TensorView pieces_view(pieces.data(), DType::u8,
                                 Dims{n, static_cast<std::int64_t>(piece.bytes)});
    ops.pack_partial(
        by_head(n, view(out, {batch, heads * n, dim}), view(lse, {batch, heads * n}), {}),
        pieces_view, {});
    std::memcpy(arrived.data() + static_cast<std::size_t>(r) * piece.bytes,
                pieces.data() + piece.bytes, piece.bytes);
  }
  std::vector<float> merged(static_cast<std::size_t>(batch * heads * dim), -1.0F);
  std::vector<float> lse(static_cast<std::size_t>(batch * heads), -1.0F);
  std::vector<float> any(static_cast<std::size_t>(batch * heads * n * dim));
  MergeArguments into =
      by_head(n, view(any, {batch, heads * n, dim}), view(any, {batch, heads * n}),
              view(merged, {batch, heads, dim}), view(lse, {batch, heads}));
  const TensorView arrived_view(arrived.data(), DType::u8,
                                Dims{n, static_cast<std::int64_t>(piece.bytes)});
  ops.merge_pieces(arrived_view, into, 1, {});
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t j = 0; j < heads; ++j) {
      for (std::int64_t i = 0; i < dim; ++i) {
        const auto source = static_cast<float>((b * 4 + 2 + j) * dim + i);
        const float expected = b == 0 && j == 0   ? source + 1000
                               : b == 0 && j == 1 ? 0
                                                  : source + 500;
        CHECK(merged[static_cast<std::size_t>((b * heads + j) * dim + i)] == expected);
      }
    }
  }
  CHECK(lse[0] == 0.0F);
  CHECK(lse[1] == kNone);
  CHECK(lse[2] == 1.5F + std::log(2.0F));
  std::vector<float> again(merged.size());
  into.merged = view(again, {batch, heads, dim});
  into.lse.reset();
  ops.merge_pieces(arrived_view, into, 1, {});
  CHECK(again == merged);
}

TEST_CASE("what a group's only rank has is merged without pieces to the same bits", "[host]") {
  HostOps ops;
  const std::int64_t batch = 5;
  const std::int64_t heads = 3;
  const std::int64_t dim = 71;
  const auto piece = dcp::packed_piece(batch, heads, dim, sizeof(float));
  for (const std::int64_t splits : {1, 3}) {
    for (int kind = 0; kind < 8; ++kind) {
      const auto rows = static_cast<std::size_t>(splits * batch * heads);
      auto out = counted(rows * static_cast<std::size_t>(dim));
      std::vector<float> lse(rows);
      for (std::size_t i = 0; i < rows; ++i) {
        lse[i] = i % 7 == 2 ? kNone : static_cast<float>(i % 5) * 0.3F;
      }
      std::vector<float> sink = {0.25F, kNone, -1.0F};
      std::vector<std::int32_t> tokens = {1, 0, 3, -1, 9};
      Partials partials{.out = view(out, {splits, batch, heads, dim}),
                        .lse = view(lse, {splits, batch, heads}),
                        .base = (kind & 4) != 0 ? LseBase::two : LseBase::e};
      if ((kind & 1) != 0) {
        partials.sink = view(sink, {heads});
      }
      if ((kind & 2) != 0) {
        partials.local_tokens = TensorView(tokens.data(), DType::i32, {batch});
      }
      std::vector<float> merged[2];
      std::vector<float> merged_lse[2];
      std::vector<std::byte> pieces(piece.bytes);
      const TensorView pieces_view(pieces.data(), DType::u8,
                                   Dims{1, static_cast<std::int64_t>(piece.bytes)});
      for (std::size_t way = 0; way < 2; ++way) {
        merged[way].assign(static_cast<std::size_t>(batch * heads * dim), -5.0F);
        merged_lse[way].assign(static_cast<std::size_t>(batch * heads), -5.0F);
        const MergeArguments arguments{.partials = partials,
                                       .rows = {MergeResult::by_head, batch, heads, 1},
                                       .merged = view(merged[way], {batch, heads, dim}),
                                       .lse = view(merged_lse[way], {batch, heads})};
        if (way == 0) {
          ops.pack_partial(arguments, pieces_view, {});
          ops.merge_pieces(pieces_view, arguments, 0, {});
        } else {
          CHECK(ops.merge_alone(arguments, {}));
        }
      }
      CHECK(merged[1] == merged[0]);
      CHECK(merged_lse[1] == merged_lse[0]);
    }
  }
}

TEST_CASE("operations are captured with their arguments", "[host]") {
  HostOps ops;
  HostStream stream;
  auto from = counted(4);
  std::vector<float> to(4);
  stream.begin_capture();
  ops.copy(view(from, {4}), view(to, {4}), stream);
  const auto graph = stream.end_capture();
  CHECK(to == std::vector<float>(4));
  from[1] = 9;
  graph->launch(stream);
  CHECK(to == std::vector<float>{0, 9, 2, 3});
}
