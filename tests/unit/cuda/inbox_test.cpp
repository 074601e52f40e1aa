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
                                    cuda::kEpochRecords * sizeof(cuda::EpochRecord)));
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

TEST_CASE("slots alternate and flags stay valid where the lower half of an epoch wraps",
          "[inbox]") {
  CHECK(cuda::next_epoch(0) == 1);
  std::uint64_t epoch = (std::uint64_t{1} << 32) - 8;
  for (int i = 0; i < 20; ++i) {
    const std::uint64_t next = cuda::next_epoch(epoch);
    CHECK(next > epoch);
    CHECK((next & 1) != (epoch & 1));
    CHECK(static_cast<std::uint32_t>(next) != 0);  // the flag of memory never written
    epoch = next;
  }
}

TEST_CASE("error words name the epoch and the rank, and 0 is no error", "[inbox]") {
  const auto error = cuda::InboxError::decode(cuda::InboxError::encode(1234, 31));
  CHECK(static_cast<bool>(error));
  CHECK(error.epoch == 1234);
  CHECK(error.missing_rank == 31);
  CHECK(static_cast<bool>(cuda::InboxError::decode(cuda::InboxError::encode(0, 0))));
  CHECK_FALSE(static_cast<bool>(cuda::InboxError::decode(0)));
}
