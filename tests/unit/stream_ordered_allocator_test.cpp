// SPDX-License-Identifier: Apache-2.0
#include "cohort/stream_ordered_allocator.hpp"

#include <cstdint>
#include <optional>

#include "support/catch.hpp"

using namespace cohort;

namespace {

StreamOrderedAllocator with_bytes(std::uint64_t bytes) {
  StreamOrderedAllocator blocks;
  blocks.space().add_range(0, bytes);
  return blocks;
}

}  // namespace

TEST_CASE("freed memory tells its next user which streams had it") {
  auto blocks = with_bytes(1024);
  const auto first = blocks.allocate(1024).value();
  CHECK(blocks.use(first, 1) == 0);
  blocks.use_also(first, 2);
  CHECK_FALSE(blocks.allocate(1));
  blocks.free(first);
  const auto half = blocks.allocate(512).value();
  CHECK(blocks.use(half, 1) == 2);  // its own stream is in order by itself
  blocks.free(half);
  const auto whole = blocks.allocate(1024).value();
  CHECK(blocks.use(whole, 8) == 3);  // of the two halves that are one again
  blocks.free(whole);
  CHECK(blocks.use(blocks.allocate(1024).value(), 4) == 8);
}

TEST_CASE("a block that nobody used goes back with the marks that it had") {
  auto blocks = with_bytes(1024);
  const auto first = blocks.allocate(1024).value();
  static_cast<void>(blocks.use(first, 4));
  blocks.free(first);
  blocks.put_back(blocks.allocate(1024).value());
  CHECK(blocks.space().statistics().live_blocks == 0);
  CHECK(blocks.use(blocks.allocate(1024).value(), 1) == 4);
}

TEST_CASE("marks are replaced on live blocks and on free memory") {
  auto blocks = with_bytes(1024);
  const auto live = blocks.allocate(512).value();
  const auto other = blocks.allocate(512).value();
  static_cast<void>(blocks.use(live, 1));
  static_cast<void>(blocks.use(other, 2));
  blocks.free(other);
  blocks.replace_marks({.gone = 3, .by = 16});
  CHECK(blocks.use(blocks.allocate(512).value(), 1) == 16);
  blocks.free(live);
  CHECK(blocks.use(blocks.allocate(512).value(), 1) == 16);
}

TEST_CASE("a hash of blocks is that of the live ones") {
  auto a = with_bytes(4096);
  auto b = with_bytes(4096);
  CHECK(a.mixed(7) == 7);
  const auto passing = a.allocate(256).value();
  static_cast<void>(a.allocate(300).value());
  static_cast<void>(b.allocate(256).value());
  static_cast<void>(b.allocate(512).value());
  CHECK(a.mixed(7) == b.mixed(7));
  CHECK(a.mixed(7) != a.mixed(8));
  a.put_back(passing);
  CHECK(a.mixed(7) != b.mixed(7));
}
