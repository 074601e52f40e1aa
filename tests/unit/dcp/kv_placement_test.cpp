// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cohort/dcp/kv_placement.hpp>
#include <cohort/dcp/kv_shard.hpp>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using cohort::dcp::kNoSlot;
using cohort::dcp::KvPlacement;
using cohort::dcp::KvRows;
using cohort::dcp::KvShard;

static_assert(std::is_trivially_copyable_v<KvRows>);  // an argument of kernels
// With 2 ranks, rank 0 has as many of 3 tokens as of 4.
static_assert(KvPlacement{2, 1}.local_count(4, 0) == 2 && KvPlacement{2, 1}.local_count(3, 0) == 2);
static_assert(KvPlacement{2, 2}.slot(5, 0) == 3 && KvPlacement{2, 2}.slot(5, 1) == kNoSlot);

namespace {

/// Tokens handed out one by one, without a formula.
struct HandedOut {
  std::vector<std::int64_t> owner;
  std::vector<std::int64_t> place;

  HandedOut(int ranks, std::int64_t interleave, std::int64_t tokens) {
    std::vector<std::int64_t> held(static_cast<std::size_t>(ranks), 0);
    std::int64_t rank = 0;
    for (std::int64_t in_block = 0; tokens > 0; --tokens) {
      owner.push_back(rank);
      place.push_back(held[static_cast<std::size_t>(rank)]++);
      if (++in_block == interleave) {
        in_block = 0;
        rank = (rank + 1) % ranks;
      }
    }
  }
  [[nodiscard]] std::int64_t count(std::int64_t length, std::int64_t rank) const {
    const auto end = owner.begin() + std::max<std::int64_t>(length, 0);
    return std::count(owner.begin(), end, rank);
  }
  [[nodiscard]] std::int64_t slot(std::int64_t token, std::int64_t rank) const {
    const auto t = static_cast<std::size_t>(token);
    return token >= 0 && owner[t] == rank ? place[t] : kNoSlot;
  }
};

constexpr std::int64_t kMost = 50;

template <class Each>
void for_each_placement(const Each& each) {
  for (int ranks = 1; ranks <= 9; ++ranks) {
    for (const std::int64_t interleave : {1, 2, 3, 4, 16}) {
      INFO(ranks << " ranks, interleave " << interleave);
      each(KvShard(ranks, interleave).placement(), HandedOut(ranks, interleave, kMost));
    }
  }
}

}  // namespace

TEST_CASE("owners, places, counts and slots are those of tokens handed out one by one",
          "[kv_placement]") {
  for_each_placement([](const KvPlacement& placement, const HandedOut& handed) {
    int wrong = 0;
    for (std::int64_t token = -3; token < kMost; ++token) {
      for (std::int64_t rank = 0; rank < placement.ranks; ++rank) {
        wrong += placement.slot(token, rank) != handed.slot(token, rank) ? 1 : 0;
        wrong += placement.local_count(token, rank) != handed.count(token, rank) ? 1 : 0;
      }
      if (token >= 0) {
        const auto t = static_cast<std::size_t>(token);
        wrong += placement.owner(token) != handed.owner[t] ? 1 : 0;
        wrong += placement.local_index(token) != handed.place[t] ? 1 : 0;
      }
    }
    CHECK(wrong == 0);
  });
}

TEST_CASE("each row of a step counts what it attends to and writes its own token",
          "[kv_placement]") {
  for_each_placement([](const KvPlacement& placement, const HandedOut& handed) {
    const std::vector<std::int32_t> lengths = {0, 1, 2, 3, 5, 8, 13, 17, 32, 33, 48, 50, -4};
    const auto batch = static_cast<std::int64_t>(lengths.size());
    int wrong = 0;
    for (std::int64_t q = 1; q <= 5; ++q) {
      std::vector<std::int64_t> seen(lengths.size() * static_cast<std::size_t>(q), 0);
      std::vector<int> writers(seen.size(), 0);
      for (std::int64_t rank = 0; rank < placement.ranks; ++rank) {
        std::vector<std::int32_t> counts(seen.size(), -7);
        std::vector<std::int32_t> whole(lengths.size(), -7);
        std::vector<std::int64_t> slots(2 * seen.size(), -7);
        KvRows rows{.placement = placement, .rank = rank, .batch = batch, .queries = q};
        rows.lengths = lengths.data();
        rows.counts = counts.data();  // [q, B] in memory
        rows.count_batch_stride = 1;
        rows.count_query_stride = batch;
        rows.slots = slots.data();  // with gaps
        rows.slot_batch_stride = 2 * q;
        rows.slot_query_stride = 2;
        KvRows of_whole = rows;
        of_whole.counts = whole.data();
        of_whole.whole_counts = true;
        of_whole.slots = nullptr;
        for (std::int64_t b = 0; b < batch; ++b) {
          const std::int64_t length = lengths[static_cast<std::size_t>(b)];
          for (std::int64_t j = 0; j < q; ++j) {
            rows.place(b, j);
            of_whole.place(b, j);
            const std::int64_t visible = length - (q - 1 - j);
            const auto i = static_cast<std::size_t>(b * q + j);
            const std::int32_t count = counts[static_cast<std::size_t>(j * batch + b)];
            wrong += count != handed.count(visible, rank) ? 1 : 0;
            wrong += slots[2 * i] != handed.slot(visible - 1, rank) ? 1 : 0;
            wrong += slots[2 * i + 1] != -7 ? 1 : 0;
            seen[i] += count;
            writers[i] += slots[2 * i] != kNoSlot ? 1 : 0;
          }
          wrong += whole[static_cast<std::size_t>(b)] != handed.count(length, rank) ? 1 : 0;
        }
      }
      // All ranks together: every token is seen once, and each new one is written by one rank.
      for (std::size_t i = 0; i < seen.size(); ++i) {
        const std::int64_t visible = std::max<std::int64_t>(
            lengths[i / static_cast<std::size_t>(q)] - (q - 1 - static_cast<std::int64_t>(i) % q),
            0);
        wrong += seen[i] != visible ? 1 : 0;
        wrong += writers[i] != (visible > 0 ? 1 : 0) ? 1 : 0;
      }
    }
    CHECK(wrong == 0);
  });
}

TEST_CASE("ragged drafts: a sequence's first rows are its new tokens, the others padding",
          "[kv_placement]") {
  for_each_placement([](const KvPlacement& placement, const HandedOut& handed) {
    constexpr std::int64_t kRows = 4;
    const std::vector<std::int32_t> lengths = {7, 7, 7, 7, 7, 2, 3, 0, -5, 7, 7};
    const std::vector<std::int32_t> fresh = {0, 1, 2, 3, 4, 3, 4, 2, 4, 9, -2};
    const std::vector<std::int64_t> rows_of = {0, 1, 2, 3, 4, 3, 4, 2, 4, 4, 0};
    const auto batch = static_cast<std::int64_t>(lengths.size());
    int wrong = 0;
    for (std::int64_t rank = 0; rank < placement.ranks; ++rank) {
      std::vector<std::int32_t> gaps(2 * fresh.size(), 99);
      std::vector<std::int32_t> counts(lengths.size() * kRows, -7);
      std::vector<std::int32_t> whole(lengths.size(), -7);
      std::vector<std::int64_t> slots(counts.size(), -7);
      KvRows rows{.placement = placement, .rank = rank, .batch = batch, .queries = kRows};
      for (std::size_t b = 0; b < fresh.size(); ++b) {
        gaps[2 * b] = fresh[b];
      }
      rows.lengths = lengths.data();
      rows.new_tokens = gaps.data();
      rows.new_token_stride = 2;
      rows.counts = counts.data();
      rows.count_batch_stride = kRows;
      rows.count_query_stride = 1;
      rows.slots = slots.data();
      rows.slot_batch_stride = kRows;
      rows.slot_query_stride = 1;
      KvRows of_whole = rows;
      of_whole.counts = whole.data();
      of_whole.count_batch_stride = 1;
      of_whole.whole_counts = true;
      of_whole.slots = nullptr;
      for (std::size_t i = 0; i < counts.size(); ++i) {
        const std::size_t b = i / kRows;
        const auto j = static_cast<std::int64_t>(i % kRows);
        rows.place(static_cast<std::int64_t>(b), j);
        of_whole.place(static_cast<std::int64_t>(b), j);
        const std::int64_t visible = j < rows_of[b] ? lengths[b] - (rows_of[b] - 1 - j) : 0;
        wrong += counts[i] != handed.count(visible, rank) ? 1 : 0;
        wrong += slots[i] != handed.slot(visible - 1, rank) ? 1 : 0;
        wrong += whole[b] != handed.count(lengths[b], rank) ? 1 : 0;
      }
    }
    CHECK(wrong == 0);
  });
}

TEST_CASE("slots in pages", "[kv_placement]") {
  // Rank 1 of 2 has tokens 1, 3, 5 ...: the new tokens 7 and 9 are its 3rd and 4th, from 0.
  const std::vector<std::int32_t> lengths = {10, 10, 10};
  const std::vector<std::int32_t> pages = {7, 2, 9, 7, -1, 9, 4, 5, 6};
  std::vector<std::int64_t> slots(3 * 4, -7);
  KvRows rows{.placement = {2, 1}, .rank = 1, .batch = 3, .queries = 4};
  rows.lengths = lengths.data();
  rows.slots = slots.data();
  rows.slot_batch_stride = 4;
  rows.slot_query_stride = 1;
  rows.pages = pages.data();
  rows.page_batch_stride = 3;
  rows.page_stride = 1;
  rows.page_tokens = 2;
  rows.pages_of_sequence = 3;
  const auto placed = [&] {
    for (std::int64_t row = 0; row < 12; ++row) {
      rows.place(row / 4, row % 4);
    }
    return slots;
  };
  // 3 is the second of page 1; 4 the first of page 2.
  CHECK(placed() == std::vector<std::int64_t>{-1, 5, -1, 18, -1, -1, -1, 18, -1, 11, -1, 12});
  rows.pages_of_sequence = 2;  // no page for 4
  CHECK(placed() == std::vector<std::int64_t>{-1, 5, -1, -1, -1, -1, -1, -1, -1, 11, -1, -1});
  const std::vector<std::int32_t> large(9, 2'000'000'000);  // beyond 32 bits
  rows.pages = large.data();
  CHECK(placed()[1] == 4'000'000'001);
}
