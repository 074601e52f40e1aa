// SPDX-License-Identifier: Apache-2.0
#include <cohort/cuda/inbox.hpp>

#include <cstdint>

#include "support/catch.hpp"

using namespace cohort;
using cuda::InboxLayout;
using cuda::InboxOptions;

TEST_CASE("an inbox's regions have room and alignment and do not overlap", "[inbox]") {
  for (const int n : {1, 2, 8, 32}) {
    CAPTURE(n);
    const auto layout = InboxLayout::make(
        {.ranks = n, .flag_word_bytes = 1000, .flag_line_bytes = 5000, .max_blocks = 7});
    const std::int64_t lanes = 2 * n;
    CHECK(layout.ll_words == 128);  // 125 words of 8 bytes, in a power of two
    CHECK(layout.lines == 42);      // 41.7 lines of 120 bytes
    CHECK(layout.flag_word_capacity() == 1024);
    CHECK(layout.flag_line_capacity() == 5040);
    CHECK(layout.ll_offset >=
          static_cast<std::int64_t>(sizeof(cuda::InboxControl) +
                                    cuda::kEpochRecords * sizeof(cuda::EpochRecord)) +
              std::int64_t{cuda::kMaxPeers} * 8);
    CHECK(layout.line_offset >= layout.ll_offset + lanes * layout.ll_words * 16);
    CHECK(layout.bytes >= layout.line_offset + lanes * layout.lines * 128);
    CHECK(layout.ll_offset % 16 == 0);
    CHECK(layout.line_offset % 128 == 0);
  }
}

TEST_CASE("an inbox without lines has none", "[inbox]") {
  const auto layout = InboxLayout::make({.ranks = 4});
  CHECK(layout.lines == 0);
  CHECK(layout.bytes == layout.line_offset);
}

TEST_CASE("an impossible inbox is refused", "[inbox]") {
  for (const auto& wrong :
       {InboxOptions{.ranks = 0}, InboxOptions{.ranks = cuda::kMaxPeers + 1},
        InboxOptions{.ranks = 2, .flag_word_bytes = -1},
        InboxOptions{.ranks = 2, .flag_line_bytes = -1}, InboxOptions{.ranks = 2, .max_blocks = 0},
        InboxOptions{.ranks = 2, .max_blocks = cuda::kMaxPeerBlocks + 1}}) {
    CHECK_THROWS_AS(InboxLayout::make(wrong), ConfigError);
  }
}

TEST_CASE("error words name the epoch and the rank, and 0 is no error", "[inbox]") {
  const auto error = cuda::InboxError::decode(
      cuda::InboxError::encode(1234, 30, 31, cuda::PeerCall::merge, cuda::PeerCall::barrier));
  CHECK(static_cast<bool>(error));
  CHECK(error.epoch == 1234);
  CHECK(error.missing_rank == 31);
  CHECK(error.waiting_rank == 30);
  CHECK(error.mine == cuda::PeerCall::merge);
  CHECK(error.theirs == cuda::PeerCall::barrier);
  CHECK(static_cast<bool>(cuda::InboxError::decode(cuda::InboxError::encode(0, 0, 0))));
  CHECK_FALSE(static_cast<bool>(cuda::InboxError::decode(0)));
}

TEST_CASE("an inbox that grows doubles, and stops at the largest lane", "[inbox]") {
  CHECK(cuda::grown_lane_bytes(100, 80) == 160);
  CHECK(cuda::grown_lane_bytes(200, 80) == 200);
  constexpr std::int64_t kMiB = std::int64_t{1} << 20;
  CHECK(cuda::grown_lane_bytes(1500 * kMiB, 1200 * kMiB) == cuda::kMaxLane);
  CHECK_NOTHROW(InboxLayout::make(
      {.ranks = 2, .flag_line_bytes = cuda::grown_lane_bytes(1500 * kMiB, 1200 * kMiB)}));
  // More than a lane can have is still refused.
  CHECK_THROWS_AS(
      InboxLayout::make(
          {.ranks = 2, .flag_line_bytes = cuda::grown_lane_bytes(cuda::kMaxLane + 1, 0)}),
      ConfigError);
}
