// SPDX-License-Identifier: Apache-2.0
#include "../bench/decode_engine/attention_splits.hpp"

#include "support/catch.hpp"

using decode_engine::attention_divisions;
using decode_engine::AttentionSize;
using decode_engine::AttentionSplits;
using decode_engine::AttentionTime;
using decode_engine::kAttentionTile;
using decode_engine::kMostAttentionSplits;
using decode_engine::kMostClusterBlocks;
using decode_engine::sharing_blocks;
using decode_engine::split_attention;

namespace {

constexpr std::int64_t kMultiprocessors = 132;

std::int64_t blocks_of(std::int64_t heads, std::int64_t batch, const AttentionSplits& splits) {
  return AttentionSize{heads, batch, 1, kMultiprocessors}.blocks() * splits.count;
}

}  // namespace

TEST_CASE("splits of attention have every token once, and none is empty") {
  for (const int heads : {1, 4, 64, 65, 128, 129, 256}) {
    for (const int batch : {1, 3, 8, 64, 112, 500}) {
      for (const int capacity : {64, 128, 384, 1152, 8320, 131200}) {
        const std::int64_t tiles = capacity / kAttentionTile;
        for (const AttentionSplits& splits :
             attention_divisions({heads, batch, capacity, kMultiprocessors})) {
          CAPTURE(heads, batch, capacity, splits.count, splits.tiles, splits.together);
          REQUIRE(splits.count >= 1);
          REQUIRE(splits.count <= kMostAttentionSplits);
          REQUIRE(splits.count * splits.tiles >= tiles);
          REQUIRE((splits.count - 1) * splits.tiles < tiles);
          REQUIRE(splits.parts() == (splits.together ? 1 : splits.count));
        }
      }
    }
  }
}

TEST_CASE("splits are a cluster only where all blocks of a sequence fit in one") {
  for (const int heads : {1, 64, 65, 128, 129, 192, 256}) {
    bool any = false;
    for (const AttentionSplits& splits : attention_divisions({heads, 8, 2048, kMultiprocessors})) {
      const std::int64_t of_sequence = (heads + kAttentionTile - 1) / kAttentionTile * splits.count;
      if (splits.together) {
        CAPTURE(heads, splits.count);
        CHECK(of_sequence <= kMostClusterBlocks);
        CHECK(of_sequence == sharing_blocks(heads) * splits.count);
        CHECK((splits.count == 2 || splits.count == 4 || splits.count == 8));
        any = true;
      }
    }
    CHECK(any == (heads <= 128));
  }
}

TEST_CASE("the division that takes least is the one that is taken") {
  for (const int batch : {1, 8, 64}) {
    const AttentionSize size{128, batch, 4096, kMultiprocessors};
    const AttentionSplits taken = split_attention(128, batch, 4096, kMultiprocessors);
    for (const AttentionSplits& splits : attention_divisions(size)) {
      CHECK(AttentionTime::of(size, taken) <= AttentionTime::of(size, splits));
    }
  }
}

TEST_CASE(
    "attention of one sequence takes most multiprocessors once, of many as few waves as fit") {
  const AttentionSplits one = split_attention(64, 1, 131072, kMultiprocessors);
  CHECK(one.count > 100);
  CHECK_FALSE(one.together);
  CHECK(split_attention(64, 1, 8192, kMultiprocessors).count > 32);
  CHECK(split_attention(64, 1, 64, kMultiprocessors) == AttentionSplits{});
  CHECK(split_attention(64, kMultiprocessors, 8192, kMultiprocessors).count == 1);
  // Of 224 blocks, two waves would leave 40 multiprocessors idle in the second.
  CHECK(split_attention(128, 112, 65536, kMultiprocessors).count > 1);
  // Of 112, the idle ones of one wave would not bring memory to answer sooner.
  CHECK(split_attention(64, 112, 131072, kMultiprocessors).count == 1);
}

TEST_CASE("many rows of a few splits are combined in clusters") {
  // A second kernel would have a block for each of 4096 heads of a sequence.
  const AttentionSplits pairs = split_attention(64, 64, 4096, kMultiprocessors);
  CHECK(pairs.together);
  CHECK(pairs.count == 2);
  CHECK(split_attention(128, 8, 512, kMultiprocessors).together);
  // One sequence has more to gain from more splits.
  CHECK_FALSE(split_attention(128, 1, 8192, kMultiprocessors).together);
}

TEST_CASE("the second kernel's blocks suit the number of rows and parts") {
  const auto combined_of = [](std::int64_t heads, std::int64_t batch, std::int64_t count) {
    return decode_engine::combined({.count = count, .tiles = 4}, {heads, batch, 1, 132});
  };
  CHECK(combined_of(64, 16, 8) ==
        AttentionSplits{.count = 8, .tiles = 4, .sets = 1, .ahead = true});
  CHECK(combined_of(64, 8, 8) == AttentionSplits{.count = 8, .tiles = 4, .sets = 1, .ahead = true});
  CHECK(combined_of(64, 8, 16) == AttentionSplits{.count = 16, .tiles = 4, .sets = 4});
  CHECK(combined_of(64, 1, 8) == AttentionSplits{.count = 8, .tiles = 4, .sets = 4, .ahead = true});
  CHECK(combined_of(64, 1, 64) == AttentionSplits{.count = 64, .tiles = 4, .sets = 4});
  CHECK(combined_of(64, 1, 1) == AttentionSplits{.count = 1, .tiles = 4});
}

TEST_CASE("clusters of four blocks and more leave some multiprocessors idle") {
  const AttentionSize size{128, 8, 8192, kMultiprocessors};
  const AttentionSplits apart{.count = 8, .tiles = 16};
  const AttentionSplits together{.count = 4, .tiles = 32, .together = true};
  CHECK(AttentionTime::at_once(size, apart) == kMultiprocessors);
  CHECK(AttentionTime::at_once(size, together) == 120);
  CHECK(blocks_of(128, 8, split_attention(128, 8, 8192, kMultiprocessors)) <= kMultiprocessors);
}

TEST_CASE("a card of one multiprocessor has room for one block at a time") {
  const AttentionSize size{16, 1, 1 << 20, 1};
  CHECK(AttentionTime::at_once(size, {.count = 4, .tiles = 4096, .together = true}) == 1);
  const AttentionSplits splits = split_attention(16, 1, 1 << 20, 1);
  CHECK(splits.count * splits.tiles * kAttentionTile >= 1 << 20);
}
