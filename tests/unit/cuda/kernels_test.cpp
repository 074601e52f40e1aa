// SPDX-License-Identifier: Apache-2.0
#include <cohort/cuda/kernels.hpp>

#include <cuda_runtime_api.h>

#include "support/catch.hpp"
#include "support/skip.hpp"

// What the launchers decide before any launch. The kernels' own tests need a GPU: tests/gpu.

using namespace cohort;
using cuda::InboxLayout;
using cuda::MergeShape;
using cuda::PeerPath;

namespace {

constexpr std::int64_t kKiB = 1024;

/// An inbox of two ranks with room for so many bytes by either path.
InboxLayout inbox(std::int64_t word_bytes, std::int64_t line_bytes) {
  return InboxLayout::make(
      {.ranks = 2, .flag_word_bytes = word_bytes, .flag_line_bytes = line_bytes});
}

constexpr MergeShape kSmall{1, 128, 512, DType::bf16};
constexpr MergeShape kLarge{128, 128, 512, DType::bf16};

cuda::Query query(std::int64_t batch) {
  static const char memory = 0;  // not read
  return {
      .nope = &memory, .pe = &memory, .batch = batch, .heads = 64, .nope_dim = 512, .pe_dim = 64};
}

}  // namespace

TEST_CASE("small merges go in flag words and large ones in flag lines", "[kernels]") {
  const auto both = inbox(1024 * kKiB, 16 * 1024 * kKiB);
  CHECK(cuda::choose_merge_path(both, {1, 64, 512, DType::bf16}) == PeerPath::flag_word);
  CHECK(cuda::choose_merge_path(both, kSmall) == PeerPath::flag_line);
  CHECK(cuda::choose_merge_path(both, kLarge) == PeerPath::flag_line);
  MergeShape split = kSmall;  // where words are faster for longer
  split.splits = 4;
  CHECK(cuda::choose_merge_path(both, split) == PeerPath::flag_word);
  split.batch = 2;
  CHECK(cuda::choose_merge_path(both, split) == PeerPath::flag_line);
  cuda::Query few = query(1);
  few.heads = 16;
  CHECK(cuda::choose_query_path(both, few) == PeerPath::flag_word);
  CHECK(cuda::choose_query_path(both, query(1)) == PeerPath::flag_line);
  CHECK(cuda::choose_query_path(both, query(128)) == PeerPath::flag_line);
  CHECK(cuda::choose_share_path(both, 0) == PeerPath::flag_word);
  CHECK(cuda::choose_share_path(both, 32 * kKiB) == PeerPath::flag_word);
  CHECK(cuda::choose_share_path(both, 1024 * kKiB) == PeerPath::flag_line);
}

TEST_CASE("a path that has no room gives way to the other", "[kernels]") {
  const auto lines = inbox(1 * kKiB, 16 * 1024 * kKiB);
  const auto words = inbox(16 * 1024 * kKiB, 0);
  CHECK(cuda::choose_merge_path(lines, kSmall) == PeerPath::flag_line);
  CHECK(cuda::choose_merge_path(words, kLarge) == PeerPath::flag_word);
  CHECK(cuda::choose_query_path(lines, query(1)) == PeerPath::flag_line);
  CHECK(cuda::choose_query_path(words, query(128)) == PeerPath::flag_word);
  CHECK(cuda::choose_share_path(lines, 2 * kKiB) == PeerPath::flag_line);
  CHECK(cuda::choose_share_path(words, 1024 * kKiB) == PeerPath::flag_word);
}

TEST_CASE("what fits by neither path is refused with the numbers", "[kernels]") {
  const auto none = inbox(1 * kKiB, 1 * kKiB);
  CHECK_THROWS_AS(cuda::choose_merge_path(none, kSmall), UsageError);
  CHECK_THROWS_AS(cuda::choose_query_path(none, query(1)), UsageError);
  CHECK_THROWS_AS(cuda::choose_share_path(none, cuda::max_share_bytes(none) + 1), UsageError);
  CHECK(cuda::max_share_bytes(inbox(1 * kKiB, 2 * kKiB)) >= 2 * kKiB);
  // The LSEs of a merge in lines travel as flag words.
  CHECK_THROWS_AS(cuda::choose_merge_path(inbox(1 * kKiB, 16 * 1024 * kKiB), kLarge), UsageError);
}

TEST_CASE("a lane holds the payload, and as flag words the LSEs as well", "[kernels]") {
  CHECK(cuda::merge_lane_bytes(kSmall, 2, PeerPath::flag_line) == 64 * 512 * 2);
  CHECK(cuda::merge_lane_bytes(kSmall, 2, PeerPath::flag_word) == 64 * 512 * 2 + 256 * 8);
  // An empty call still signals.
  CHECK(cuda::merge_lane_bytes({0, 128, 512, DType::bf16}, 2, PeerPath::flag_word) == 8);
  CHECK(cuda::query_lane_bytes(query(2), PeerPath::flag_line) == 2 * 64 * 576 * 2);
  CHECK(cuda::query_lane_bytes(query(0), PeerPath::flag_word) == 8);
}

TEST_CASE("the tables of paths grow and end with what takes all", "[kernels]") {
  for (const auto table :
       {cuda::merge_path_table(), cuda::query_path_table(), cuda::share_path_table()}) {
    REQUIRE_FALSE(table.empty());
    for (std::size_t i = 1; i < table.size(); ++i) {
      CHECK(table[i - 1].max_bytes_sent < table[i].max_bytes_sent);
    }
    CHECK(table.back().max_bytes_sent == INT64_MAX);
  }
}

TEST_CASE("local kernels have nothing to do for a shape without elements", "[kernels]") {
  for (const MergeShape& shape :
       {MergeShape{0, 2, 64}, MergeShape{1, 0, 64}, MergeShape{1, 2, 0}, MergeShape{0, 0, 0}}) {
    CAPTURE(shape.batch, shape.heads, shape.dim);
    // A launch would throw: no pointer is valid.
    CHECK_NOTHROW(
        cuda::correct_partial(shape, 2, 0, {}, nullptr, nullptr, 0, 0, shape.dtype, nullptr));
    CHECK_NOTHROW(cuda::pack_partial(shape, 2, {}, nullptr, nullptr));
    CHECK_NOTHROW(cuda::merge_pieces(shape, 2, 0, nullptr, {}, {}, nullptr));
    CHECK_NOTHROW(cuda::choose_merge_path(inbox(1 * kKiB, 0), shape));
  }
}

TEST_CASE("peer kernels come to their launch with a shape without elements", "[kernels]") {
  cuda::PeerTable table;  // without memory: on a machine without a card no launch succeeds
  table.layout = inbox(1 * kKiB, 0);
  table.size = 2;
  int cards = 0;
  if (test::skip_if(cudaGetDeviceCount(&cards) == cudaSuccess && cards > 0,
                    "there is a card, which would run the kernels")) {
    return;
  }
  for (const MergeShape& shape :
       {MergeShape{0, 2, 64}, MergeShape{1, 0, 64}, MergeShape{1, 2, 0}}) {
    CHECK_THROWS_AS(cuda::peer_merge(table, shape, {}, {}, nullptr), TransportError);
  }
  for (const cuda::Query& query :
       {cuda::Query{.batch = 0, .heads = 2, .nope_dim = 64},
        cuda::Query{.batch = 1, .heads = 0, .nope_dim = 64}, cuda::Query{.batch = 1, .heads = 2}}) {
    CHECK_THROWS_AS(cuda::peer_gather_query(table, query, nullptr, 0, 0, nullptr), TransportError);
  }
}
