// SPDX-License-Identifier: Apache-2.0
#include "../bench/decode_engine/attention_splits.hpp"

#include "support/catch.hpp"

using decode_engine::AttentionSplits;
using decode_engine::kAttentionTile;
using decode_engine::kAttentionWaveTiles;
using decode_engine::kMostAttentionSplits;
using decode_engine::split_attention;

namespace {

constexpr std::int64_t kMultiprocessors = 132;

std::int64_t waves_of(std::int64_t heads, std::int64_t batch, std::int64_t count) {
  const std::int64_t blocks = batch * ((heads + kAttentionTile - 1) / kAttentionTile) * count;
  return (blocks + kMultiprocessors - 1) / kMultiprocessors;
}

}  // namespace

TEST_CASE("splits of attention have every token once, and none is empty") {
  for (const int heads : {1, 4, 64, 65, 128}) {
    for (const int batch : {1, 3, 8, 64, 112, 500}) {
      for (const int capacity : {64, 128, 384, 1152, 8320, 131200}) {
        const AttentionSplits splits = split_attention(heads, batch, capacity, kMultiprocessors);
        const std::int64_t tiles = capacity / kAttentionTile;
        CAPTURE(heads, batch, capacity, splits.count, splits.tiles);
        CHECK(splits.count >= 1);
        CHECK(splits.count <= kMostAttentionSplits);
        CHECK(splits.count * splits.tiles >= tiles);
        CHECK((splits.count - 1) * splits.tiles < tiles);
      }
    }
  }
}

TEST_CASE(
    "attention of few sequences takes all multiprocessors once, of many as few waves as fit") {
  const AttentionSplits one = split_attention(64, 1, 131072, kMultiprocessors);
  CHECK(one.count == kMostAttentionSplits);
  CHECK(split_attention(64, 1, 8192, kMultiprocessors).count > 32);
  CHECK(split_attention(64, 1, 64, kMultiprocessors).count == 1);
  CHECK(split_attention(64, kMultiprocessors, 8192, kMultiprocessors).count == 1);
  // Of 224 blocks, two waves would leave 40 multiprocessors idle in the second.
  const AttentionSplits many = split_attention(128, 112, 65536, kMultiprocessors);
  CHECK(many.count > 1);
  CHECK(waves_of(128, 112, many.count) * (many.tiles + kAttentionWaveTiles) <
        waves_of(128, 112, 1) * (65536 / kAttentionTile + kAttentionWaveTiles));
  // Of 112, the idle ones of one wave would not bring memory to answer sooner.
  CHECK(split_attention(64, 112, 131072, kMultiprocessors).count == 1);
}
