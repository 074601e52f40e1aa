// SPDX-License-Identifier: Apache-2.0
#include "cohort/cuda/norm_plan.hpp"

#include <set>

#include "support/catch.hpp"

using namespace cohort;
using namespace cohort::cuda;
using test::contains;

namespace {

constexpr NormShape shape_of(std::int64_t rows, std::int64_t hidden = 7168) {
  return {.rows = rows, .hidden = hidden};
}
constexpr std::int64_t kPlenty = std::int64_t{1} << 40;
constexpr ClusterRoom kAnyClusters{1000, 1000, 1000};

constexpr NormGrid grid_of(const NormShape& shape, std::int64_t most,
                           std::int64_t most_in_clusters) {
  return norm_grid(shape, most, most_in_clusters, kAnyClusters);
}

}  // namespace

TEST_CASE("a row takes whole groups of words, and begins with one", "[norm_plan]") {
  CHECK(shape_of(1).row_bytes() == 14336);
  CHECK(shape_of(1).row_words() == 1792);
  CHECK(shape_of(1).groups() == 30);
  CHECK(shape_of(1, 240).groups() == 1);
  CHECK(shape_of(1, 241).groups() == 2);
  CHECK(shape_of(1, 1).row_words() == 1);
  CHECK(norm_words(shape_of(3)) == 3 * 30 * 64);
  CHECK(norm_lines(shape_of(3)) == 3 * 30 * 4);
}

TEST_CASE("few bytes go in words, more in lines, and what is no single launch in two",
          "[norm_plan]") {
  const auto plan = [](int ranks, std::int64_t rows, std::int64_t words, std::int64_t lines) {
    return norm_plan(ranks, shape_of(rows), words, lines);
  };
  CHECK(norm_plan(2, shape_of(1, 4096), kPlenty, kPlenty) == NormPlan{true, false});
  CHECK(norm_plan(2, shape_of(2, 4096), kPlenty, kPlenty) == NormPlan{true, true});
  CHECK(norm_plan(3, shape_of(1, 4096), kPlenty, kPlenty) == NormPlan{true, true});
  CHECK(plan(2, 1, kPlenty, kPlenty) == NormPlan{true, true});
  CHECK(plan(2, 64, kPlenty, 0) == NormPlan{true, false});
  CHECK(plan(2, 64, 64 * 30 * 64 - 1, 0) == NormPlan{});
  CHECK(plan(2, 64, 0, 64 * 30 * 4) == NormPlan{true, true});
  CHECK(plan(2, 64, 0, 64 * 30 * 4 - 1) == NormPlan{});
  CHECK(plan(2, 0, kPlenty, kPlenty) == NormPlan{});
  CHECK(plan(2, std::int64_t{1} << 24, kPlenty, kPlenty) == NormPlan{});  // indices have 32 bits
  // With many ranks two steps move fewer bytes, and rows are normed behind them.
  CHECK(plan(8, 1, kPlenty, kPlenty).fits);
  CHECK_FALSE(plan(8, 64, kPlenty, kPlenty).fits);
  for (int ranks = 2; ranks <= 8; ++ranks) {
    for (const std::int64_t rows : {1, 4, 16}) {
      const NormShape shape = shape_of(rows);
      CAPTURE(ranks, rows);
      const auto one = all_reduce_plan(ranks, rows * shape.row_bytes(), kPlenty, kPlenty);
      CHECK(plan(ranks, rows, kPlenty, kPlenty).fits == !one.two_steps);
      // What is reserved for the rows is enough.
      const std::int64_t lines = norm_slot_bytes(ranks, shape) / ranks / kLinePayload;
      CHECK(plan(ranks, rows, 0, lines).fits == plan(ranks, rows, 0, kPlenty).fits);
    }
  }
}

TEST_CASE("few rows are shared out to clusters of blocks, while these have room", "[norm_plan]") {
  CHECK(grid_of(shape_of(1), 66, 33) == NormGrid{8, 1});
  CHECK(grid_of(shape_of(4), 66, 33) == NormGrid{8, 4});
  CHECK(grid_of(shape_of(5), 66, 33) == NormGrid{4, 5});
  CHECK(grid_of(shape_of(16), 66, 33) == NormGrid{2, 16});
  CHECK(grid_of(shape_of(17), 66, 33) == NormGrid{1, 17});
  CHECK(grid_of(shape_of(200), 66, 33) == NormGrid{1, 66});
  CHECK(grid_of(shape_of(1), 66, 0) == NormGrid{1, 1});
  CHECK(grid_of(shape_of(1, 240), 66, 33) == NormGrid{1, 1});  // one group
  CHECK(grid_of(shape_of(1, 1024), 66, 33) == NormGrid{2, 1});
  for (std::int64_t rows = 1; rows < 80; ++rows) {
    for (std::int64_t most = 1; most < 80; ++most) {
      const NormGrid grid = grid_of(shape_of(rows), most, most / 2);
      REQUIRE(grid.blocks_of_row * grid.rows <= most);
      // Blocks of a cluster wait for each other, so a cluster has one row.
      REQUIRE((grid.blocks_of_row == 1 || grid.rows == rows));
      REQUIRE(grid.rows >= 1);
      REQUIRE(grid.rows <= rows);
    }
  }
}

TEST_CASE("clusters that the cards have no room for are smaller, or none", "[norm_plan]") {
  const auto grid = [](std::int64_t rows, const ClusterRoom& room) {
    return norm_grid(shape_of(rows), 128, 64, room);
  };
  CHECK(grid(1, {65, 32, 15}) == NormGrid{8, 1});
  CHECK(grid(8, {65, 32, 15}) == NormGrid{8, 8});
  CHECK(grid(8, {65, 32, 7}) == NormGrid{4, 8});  // fewer than the rows
  CHECK(grid(1, {4, 1, 0}) == NormGrid{4, 1});    // parts of the card that are small
  CHECK(grid(2, {4, 1, 0}) == NormGrid{2, 2});
  CHECK(grid(1, {1, 0, 0}) == NormGrid{2, 1});
  CHECK(grid(1, {}) == NormGrid{1, 1});
  CHECK(grid(200, {}) == NormGrid{1, 128});
}

TEST_CASE("rows that the kernels cannot take are named", "[norm_plan]") {
  CHECK(norm_obstacle(shape_of(0)).empty());
  CHECK(norm_obstacle(shape_of(64, 122'880)).empty());
  CHECK_THAT(norm_obstacle(shape_of(64, 122'881)), contains("hidden", "245760", "122881"));
  CHECK_THAT(norm_obstacle(shape_of(1, 0)), contains("shape"));
  CHECK_THAT(norm_obstacle(shape_of(std::int64_t{1} << 31)), contains("shape"));
  CHECK_THAT(norm_obstacle({.rows = 1, .hidden = 8, .dtype = DType::i32, .out_dtype = DType::i32}),
             contains("i32"));
  CHECK_THAT(norm_obstacle({.rows = 1, .hidden = 8, .out_dtype = DType::f32}), contains("f32"));
  CHECK(norm_obstacle({.rows = 1, .hidden = 8, .out_dtype = DType::f8_e4m3}).empty());
}

TEST_CASE("whatever the ranks of a norm have to agree on is in its signature", "[norm_plan]") {
  const NormShape shape = shape_of(4);
  std::set<std::uint32_t> words;
  const auto add = [&](const NormShape& it, float epsilon, int blocks) {
    CHECK(words.insert(signature_of(it, epsilon, blocks).word).second);
    CHECK(signature_of(it, epsilon, blocks).call() == PeerCall::all_reduce_rms_norm);
  };
  add(shape, 1e-5F, 66);
  add(shape, 1e-6F, 66);
  add(shape, 1e-5F, 65);
  add(shape_of(5), 1e-5F, 66);
  add(shape_of(4, 7167), 1e-5F, 66);
  NormShape other = shape;
  other.out_dtype = DType::f8_e4m3;
  add(other, 1e-5F, 66);
  other.dtype = DType::f16;
  add(other, 1e-5F, 66);
}
