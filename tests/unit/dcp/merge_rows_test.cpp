// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <cohort/dcp/merge_rows.hpp>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using dcp::MergeRows;
using dcp::RowBlock;

TEST_CASE("by head and by token every row is one rank's, in rank order", "[dcp]") {
  const std::vector<std::int64_t> counts{2, 0, 1};
  for (const MergeRows& rows :
       {MergeRows{MergeResult::by_head, 3, 6, 3}, MergeRows{MergeResult::replicated, 3, 6, 3},
        MergeRows{MergeResult::by_token, 3, 6, 3, counts}}) {
    std::array<int, 18> owners{};
    owners.fill(-1);
    std::int64_t widest = 0;
    for (int r = 0; r < 3; ++r) {
      const auto block = rows.of(r);
      widest = std::max(widest, block.rows());
      for (std::int64_t i = 0; i < block.rows(); ++i) {
        const auto place = block.place(i, i / block.heads);
        int& owner = owners[static_cast<std::size_t>(place.token * 6 + place.head)];
        CHECK(owner == -1);
        owner = r;
      }
    }
    CHECK(widest == rows.widest());
    for (std::size_t i = 0; i < owners.size(); ++i) {
      const auto by_token = static_cast<int>(i / 6 < 2 ? 0 : 2);
      const int expected =
          rows.result == MergeResult::by_token ? by_token : static_cast<int>(i % 6 / 2);
      CHECK(owners[i] == expected);
    }
  }
}

TEST_CASE("where every rank merges everything its rows are all", "[dcp]") {
  const MergeRows rows{MergeResult::replicated, 3, 4, 2, {}, true};
  for (int r = 0; r < 2; ++r) {
    const auto block = rows.of(r);
    CHECK(block.rows() == 12);
    CHECK(block.place(7, 1).token == 1);
    CHECK(block.place(7, 1).head == 3);
  }
  CHECK(rows.widest() == 12);
}

TEST_CASE("tokens are shared out evenly, the first ranks having one more", "[dcp]") {
  for (const int n : {1, 2, 3, 8}) {
    for (std::int64_t batch = 0; batch < 20; ++batch) {
      std::int64_t sum = 0;
      for (int r = 0; r < n; ++r) {
        const std::int64_t count = MergeRows::even_count(batch, n, r);
        CHECK(count >= MergeRows::even_count(batch, n, n - 1));
        CHECK(MergeRows::even_count(batch, n, 0) - count <= 1);
        sum += count;
      }
      CHECK(sum == batch);
    }
  }
}

TEST_CASE("results have names", "[dcp]") {
  CHECK(to_string(MergeResult::by_head) == "by_head");
  CHECK(to_string(MergeResult::by_token) == "by_token");
  CHECK(to_string(MergeResult::replicated) == "replicated");
}

// Kernels have 32-bit indices.
static_assert(RowBlock<std::uint32_t>{5, 2, 3, 4}.place(6, 1).token == 6);
static_assert(RowBlock<std::uint32_t>{5, 2, 3, 4}.place(6, 1).head == 5);
