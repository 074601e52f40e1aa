// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <cohort/host/slot_copy.hpp>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using namespace cohort::host;

namespace {

constexpr std::byte kUntouched{0xee};

std::vector<std::byte> numbered(std::size_t bytes) {
  std::vector<std::byte> values(bytes);
  for (std::size_t i = 0; i < bytes; ++i) {
    values[i] = static_cast<std::byte>((i * 7 + i / 251) & 0x7f);
  }
  return values;
}

}  // namespace

TEST_CASE("a copy into a slot copies what it should and nothing else, of any size", "[host]") {
  const auto from = numbered(9000);
  for (const std::size_t bytes : {0U, 1U, 63U, 64U, 65U, 1023U, 1024U, 1025U, 4096U, 8191U}) {
    for (const std::size_t skip : {0U, 1U, 4U, 60U}) {
      std::vector<std::byte> to(9000, kUntouched);
      copy_to_slot(to.data() + 64, from.data() + skip, bytes);
      const auto begin = to.begin() + 64;
      const auto end = begin + static_cast<std::ptrdiff_t>(bytes);
      CHECK(std::equal(begin, end, from.begin() + static_cast<std::ptrdiff_t>(skip)));
      CHECK(std::all_of(to.begin(), begin, [](std::byte b) { return b == kUntouched; }));
      CHECK(std::all_of(end, to.end(), [](std::byte b) { return b == kUntouched; }));
    }
  }
}

TEST_CASE("a cursor's elements come without gaps, and it moves on", "[host]") {
  const auto from = numbered(4 * 64 * 64);
  // [64, 64] of four bytes: all of it, every row's first 40, and every other element.
  for (const auto& [shape, strides] :
       {std::pair{Dims{64, 64}, Dims{64, 1}}, std::pair{Dims{64, 40}, Dims{64, 1}},
        std::pair{Dims{64, 32}, Dims{64, 2}}}) {
    const Layout layout = collapse(shape, strides);
    std::vector<std::byte> expected(static_cast<std::size_t>(layout.numel) * 4);
    copy(expected.data(), dense_layout(layout.numel), from.data(), layout, 4);
    for (const std::int64_t first : {std::int64_t{0}, std::int64_t{33}, layout.numel / 2}) {
      std::vector<std::byte> to(expected.size() + 8, kUntouched);
      ReadCursor cursor(from.data(), layout, 4);
      copy_to_slot(to.data(), cursor, first);
      copy_to_slot(to.data() + first * 4, cursor, layout.numel - first);
      CHECK(std::equal(expected.begin(), expected.end(), to.begin()));
      CHECK(to[expected.size()] == kUntouched);
    }
  }
}

TEST_CASE("who sees what was stored behind a copy sees all of the copy", "[host]") {
  constexpr std::size_t kBytes = 16 * 1024;
  constexpr std::uint64_t kRounds = 2000;
  std::vector<std::byte> slot(kBytes);
  std::atomic<std::uint64_t> said{0};
  std::atomic<std::uint64_t> seen{0};
  std::atomic<std::uint64_t> wrong{0};
  std::jthread reader([&] {
    for (std::uint64_t round = 1; round <= kRounds; ++round) {
      while (said.load(std::memory_order_acquire) < round) {
        std::this_thread::yield();
      }
      const auto value = static_cast<std::byte>(round);
      wrong += static_cast<std::uint64_t>(
          std::count_if(slot.begin(), slot.end(), [&](std::byte b) { return b != value; }));
      seen.store(round, std::memory_order_release);
    }
  });
  std::vector<std::byte> own(kBytes);
  for (std::uint64_t round = 1; round <= kRounds; ++round) {
    std::fill(own.begin(), own.end(), static_cast<std::byte>(round));
    copy_to_slot(slot.data(), own.data(), kBytes);
    said.store(round, std::memory_order_release);
    while (seen.load(std::memory_order_acquire) < round) {
      std::this_thread::yield();
    }
  }
  reader.join();
  CHECK(wrong == 0);
}

TEST_CASE("few bytes wait for a slot's lines", "[host]") {
  CHECK(waits_for_lines(0));
  CHECK(waits_for_lines(1023));
  CHECK(waits_for_lines(1024) == waits_for_lines(1 << 20));  // as the processor has it
}
