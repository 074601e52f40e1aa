// SPDX-License-Identifier: Apache-2.0
#include "cohort/offset_allocator.hpp"

#include <algorithm>
#include <iterator>
#include <map>
#include <random>
#include <vector>

#include "support/catch.hpp"

using cohort::OffsetAllocator;

namespace {

constexpr std::uint64_t kUnit = OffsetAllocator::kAlignment;

/// What must hold, kept the simple way: live blocks by offset, and the free bytes between them.
class Model {
 public:
  void add_range(std::uint64_t begin, std::uint64_t bytes) { ranges_[begin] = begin + bytes; }

  /// Whether [offset, offset + size) lies in a range and overlaps no live block; then it is live.
  [[nodiscard]] bool take(std::uint64_t offset, std::uint64_t size) {
    auto range = ranges_.upper_bound(offset);
    if (range == ranges_.begin() || offset + size > std::prev(range)->second) {
      return false;
    }
    const auto next = live_.lower_bound(offset);
    if (next != live_.end() && next->first < offset + size) {
      return false;
    }
    if (next != live_.begin() && std::prev(next)->second > offset) {
      return false;
    }
    live_[offset] = offset + size;
    used_ += size;
    return true;
  }

  void give_back(std::uint64_t offset) {
    used_ -= live_.at(offset) - offset;
    live_.erase(offset);
  }

  [[nodiscard]] std::uint64_t used() const { return used_; }

  [[nodiscard]] std::uint64_t largest_gap() const {
    std::uint64_t largest = 0;
    for (const auto& [begin, end] : ranges_) {
      std::uint64_t free_from = begin;
      for (auto block = live_.lower_bound(begin); block != live_.end() && block->first < end;
           ++block) {
        largest = std::max(largest, block->first - free_from);
        free_from = block->second;
      }
      largest = std::max(largest, end - free_from);
    }
    return largest;
  }

 private:
  std::map<std::uint64_t, std::uint64_t> ranges_;
  std::map<std::uint64_t, std::uint64_t> live_;
  std::uint64_t used_ = 0;
};

/// Sizes from a byte to megabytes, most of them small, some exact multiples of the unit.
std::uint64_t random_size(std::mt19937_64& random) {
  const auto bits = random() % 16;
  const std::uint64_t size = random() % (std::uint64_t{64} << bits) + 1;
  return random() % 4 == 0 ? OffsetAllocator::rounded(size) : size;
}

}  // namespace

TEST_CASE("sizes are rounded up to the alignment, and nothing takes a unit", "[offset_allocator]") {
  CHECK(OffsetAllocator::rounded(0) == 256);
  CHECK(OffsetAllocator::rounded(1) == 256);
  CHECK(OffsetAllocator::rounded(256) == 256);
  CHECK(OffsetAllocator::rounded(257) == 512);
  CHECK(OffsetAllocator::rounded(~std::uint64_t{0}) > OffsetAllocator::kMaxRequest);
}

TEST_CASE("where a block goes depends on what lives, not on what was", "[offset_allocator]") {
  std::mt19937_64 random(23);
  OffsetAllocator one;
  OffsetAllocator other;
  for (const std::uint64_t range : {0U, 1U, 2U}) {
    one.add_range(range << 44, 4096 * kUnit);
    other.add_range(range << 44, 4096 * kUnit);
  }
  using Pair = std::pair<OffsetAllocator::Block, OffsetAllocator::Block>;
  std::vector<Pair> live;
  bool equal = true;
  const auto allocate = [&] {
    const auto size = random_size(random) % (64 * kUnit);
    const auto a = one.allocate(size);
    const auto b = other.allocate(size);
    equal = equal && a.has_value() == b.has_value() && (!a || one.offset(*a) == other.offset(*b));
    if (a && b) {
      live.emplace_back(*a, *b);
    }
  };
  for (int round = 0; round < 2000; ++round) {
    while (live.size() < 300) {
      allocate();
    }
    std::shuffle(live.begin(), live.end(), random);
    std::vector<Pair> dead(live.end() - 150, live.end());
    live.resize(live.size() - 150);
    for (const auto& pair : dead) {
      one.free(pair.first);
    }
    std::shuffle(dead.begin(), dead.end(), random);
    for (const auto& pair : dead) {
      other.free(pair.second);
    }
    // What one of them alone takes and returns leaves no trace.
    if (const auto own = one.allocate(random_size(random))) {
      one.free(*own);
    }
  }
  CHECK(equal);
}

TEST_CASE("the smallest block that fits is taken, and of equals the first", "[offset_allocator]") {
  constexpr std::uint64_t kBytes = 2000 * kUnit;
  OffsetAllocator allocator;
  allocator.add_range(0, kBytes);
  std::map<std::uint64_t, std::pair<std::uint64_t, OffsetAllocator::Block>> live;  // by offset
  const auto best = [&](std::uint64_t size) {
    std::pair<std::uint64_t, std::uint64_t> found{kBytes + 1, 0};  // size, offset
    std::uint64_t begin = 0;
    const auto look = [&](std::uint64_t end) {
      if (end - begin >= size) {
        found = std::min(found, {end - begin, begin});
      }
    };
    for (const auto& [offset, block] : live) {
      look(offset);
      begin = offset + block.first;
    }
    look(kBytes);
    return found;
  };
  std::mt19937_64 random(7);
  std::vector<std::uint64_t> last;  // of the temporaries, which come back soon
  for (int i = 0; i < 20'000; ++i) {
    // Classes of one size and of several; more blocks come than go until little is free.
    const std::uint64_t size = (1 + random() % (random() % 4 == 0 ? 150 : 12)) * kUnit;
    const auto [fit, offset] = best(size);
    const auto block = allocator.allocate(size);
    REQUIRE(block.has_value() == (fit <= kBytes));
    if (block) {
      REQUIRE(allocator.offset(*block) == offset);
      live[offset] = {size, *block};
      last.push_back(offset);
    }
    const std::size_t most = i % 2000 < 1000 ? 3 : 100;
    while (!last.empty() && (last.size() > most || !block)) {
      const std::size_t at = random() % 2 == 0 ? last.size() - 1 : random() % last.size();
      allocator.free(live.at(last[at]).second);
      live.erase(last[at]);
      last.erase(last.begin() + static_cast<std::ptrdiff_t>(at));
      if (!block && random() % 3 == 0) {
        break;
      }
    }
    if (random() % 64 == 0 && !last.empty()) {
      last.erase(last.begin());  // lives on
    }
  }
  CHECK(live.size() > 100);
}

TEST_CASE("live blocks are visited in the order of their allocation", "[offset_allocator]") {
  OffsetAllocator allocator;
  allocator.add_range(0, 64 * kUnit);
  std::vector<OffsetAllocator::Block> blocks;
  for (int i = 0; i < 5; ++i) {
    blocks.push_back(*allocator.allocate(kUnit));
  }
  const auto visited = [&] {
    std::vector<std::uint64_t> offsets;
    allocator.for_each_live(
        [&](auto block) { offsets.push_back(allocator.offset(block) / kUnit); });
    return offsets;
  };
  CHECK(visited() == std::vector<std::uint64_t>{0, 1, 2, 3, 4});
  allocator.free(blocks[2]);
  allocator.free(blocks[0]);
  CHECK(visited() == std::vector<std::uint64_t>{1, 3, 4});
  blocks[0] = *allocator.allocate(kUnit);
  CHECK(visited() == std::vector<std::uint64_t>{1, 3, 4, 0});
  for (const int i : {4, 0, 1, 3}) {
    allocator.free(blocks[static_cast<std::size_t>(i)]);
  }
  CHECK(visited().empty());
}

TEST_CASE("blocks can be had at the back and directly in front of another", "[offset_allocator]") {
  OffsetAllocator allocator;
  allocator.add_range(0, 16 * kUnit);
  const auto front = *allocator.allocate(3 * kUnit);
  const auto separator = *allocator.allocate(kUnit);
  allocator.free(front);  // a gap of 3, and 12 at the end
  const auto a = allocator.allocate_at_back(2 * kUnit);
  REQUIRE(a);
  CHECK(allocator.offset(*a) == 14 * kUnit);  // of the largest, not in the gap that would fit best
  CHECK(allocator.free_before(14 * kUnit) == 10 * kUnit);
  CHECK(allocator.free_before(4 * kUnit) == 0);
  const auto b = allocator.allocate_in_front_of(*a, 4 * kUnit);
  REQUIRE(b);
  CHECK(allocator.offset(*b) == 10 * kUnit);
  CHECK_FALSE(allocator.allocate_in_front_of(*a, kUnit));  // b is there
  CHECK_FALSE(allocator.allocate_in_front_of(*b, 7 * kUnit));
  CHECK_FALSE(allocator.allocate_at_back(7 * kUnit));
  CHECK(allocator.statistics().largest_free == 6 * kUnit);
  const auto c = allocator.allocate_in_front_of(*b, 6 * kUnit);
  REQUIRE(c);
  CHECK_FALSE(allocator.allocate_in_front_of(*c, kUnit));
  CHECK(allocator.statistics().used == 13 * kUnit);
  for (const auto block : {separator, *b, *a, *c}) {
    allocator.free(block);
  }
  CHECK(allocator.statistics().largest_free == 16 * kUnit);
  // Of equal ones the last.
  allocator.add_range(20 * kUnit, 16 * kUnit);
  CHECK(allocator.offset(*allocator.allocate_at_back(kUnit)) == 35 * kUnit);
  CHECK_FALSE(allocator.allocate_at_back(OffsetAllocator::kMaxRequest + 1));
}

TEST_CASE("a million random operations keep to the model", "[offset_allocator]") {
  std::mt19937_64 random(17);
  OffsetAllocator allocator;
  OffsetAllocator twin;  // the same calls, as on another rank
  Model model;
  const auto add_range = [&](std::uint64_t offset, std::uint64_t bytes) {
    allocator.add_range(offset, bytes);
    twin.add_range(offset, bytes);
    model.add_range(offset, bytes);
  };
  std::uint64_t capacity = 0;
  for (const std::uint64_t number : {0U, 1U, 2U, 3U}) {
    const std::uint64_t bytes = (std::uint64_t{16} << 20) + number * 3 * kUnit;
    add_range(number << 44, bytes);
    capacity += bytes;
  }

  struct Live {
    OffsetAllocator::Block block;
    OffsetAllocator::Block twin;
  };
  std::vector<Live> live;
  std::uint64_t peak = 0;
  int refused = 0;
  bool overlap = false;
  bool unaligned = false;
  bool unequal = false;
  bool too_small = false;
  bool refused_though_it_fits = false;
  for (int step = 0; step < 1'000'000; ++step) {
    // The balance swings, so that the space is at times nearly full and at times nearly empty.
    const bool growing = step / 50'000 % 2 == 0;
    if (live.empty() || random() % 100 < (growing ? 55U : 45U)) {
      const auto size = random_size(random);
      const bool at_back = random() % 8 == 0;
      const auto block = at_back ? allocator.allocate_at_back(size) : allocator.allocate(size);
      const auto other = at_back ? twin.allocate_at_back(size) : twin.allocate(size);
      unequal = unequal || block.has_value() != other.has_value();
      if (!block) {
        ++refused;
        refused_though_it_fits =
            refused_though_it_fits ||
            (refused % 64 == 0 && model.largest_gap() >= OffsetAllocator::rounded(size));
        continue;
      }
      const auto offset = allocator.offset(*block);
      unaligned = unaligned || offset % kUnit != 0;
      unequal = unequal || twin.offset(*other) != offset;
      too_small = too_small || allocator.size(*block) != OffsetAllocator::rounded(size);
      overlap = overlap || !model.take(offset, allocator.size(*block));
      live.push_back({*block, *other});
      peak = std::max(peak, model.used());
    } else {
      const auto index = random() % live.size();
      model.give_back(allocator.offset(live[index].block));
      allocator.free(live[index].block);
      twin.free(live[index].twin);
      live[index] = live.back();
      live.pop_back();
    }
    if (step % 20'000 == 0) {
      const auto statistics = allocator.statistics();
      REQUIRE(statistics.used == model.used());
      REQUIRE(statistics.peak == peak);
      REQUIRE(statistics.live_blocks == live.size());
      REQUIRE(statistics.largest_free == model.largest_gap());
    }
  }
  CHECK_FALSE(overlap);
  CHECK_FALSE(unaligned);
  CHECK_FALSE(unequal);
  CHECK_FALSE(too_small);
  CHECK_FALSE(refused_though_it_fits);
  CHECK(refused > 0);  // the space was full at times

  for (const auto& entry : live) {
    allocator.free(entry.block);
  }
  const auto statistics = allocator.statistics();
  CHECK(statistics.capacity == capacity);
  CHECK(statistics.used == 0);
  CHECK(statistics.largest_free == (std::uint64_t{16} << 20) + 9 * kUnit);
  for (const std::uint64_t number : {3U, 2U, 1U, 0U}) {  // each range is one block again
    const auto block = allocator.allocate((std::uint64_t{16} << 20) + number * 3 * kUnit);
    REQUIRE(block);
    CHECK(allocator.offset(*block) == number << 44);
  }
}

TEST_CASE("a block that fits exactly is found", "[offset_allocator]") {
  for (const std::uint64_t units :
       {1U, 31U, 32U, 33U, 63U, 64U, 65U, 97U, 1000U, 4095U, 4097U, 123457U}) {
    OffsetAllocator allocator;
    allocator.add_range(0, units * kUnit);
    CHECK(allocator.statistics().largest_free == units * kUnit);
    CHECK_FALSE(allocator.allocate(units * kUnit + 1));
    REQUIRE(allocator.allocate(units * kUnit));
    CHECK_FALSE(allocator.allocate(1));
    CHECK(allocator.statistics().largest_free == 0);
  }
}

TEST_CASE("requests beyond any memory are refused", "[offset_allocator]") {
  OffsetAllocator allocator;
  CHECK_FALSE(allocator.allocate(1));
  allocator.add_range(0, kUnit);
  CHECK_FALSE(allocator.allocate(~std::uint64_t{0}));
  CHECK_FALSE(allocator.allocate(std::uint64_t{1} << 60));
  CHECK(allocator.allocate(1));
}

TEST_CASE("ranges that adjoin are one", "[offset_allocator]") {
  OffsetAllocator allocator;
  allocator.add_range(4 * kUnit, 4 * kUnit);
  allocator.add_range(12 * kUnit, 4 * kUnit);
  CHECK(allocator.statistics().largest_free == 4 * kUnit);
  allocator.add_range(8 * kUnit, 4 * kUnit);
  CHECK(allocator.statistics().largest_free == 12 * kUnit);
  const auto all = allocator.allocate(12 * kUnit);
  REQUIRE(all);
  CHECK(allocator.offset(*all) == 4 * kUnit);
}

TEST_CASE("marks unite when blocks coalesce and follow the space", "[offset_allocator]") {
  OffsetAllocator allocator;
  allocator.add_range(0, 8 * kUnit);
  const auto a = *allocator.allocate(2 * kUnit);
  const auto b = *allocator.allocate(2 * kUnit);
  const auto c = *allocator.allocate(4 * kUnit);
  CHECK(allocator.marks(a) == 0);
  allocator.free(a, 0b001);
  allocator.free(c, 0b100);
  const auto again = *allocator.allocate(kUnit);
  CHECK(allocator.offset(again) == 0);
  CHECK(allocator.marks(again) == 0b001);
  allocator.free(b, 0b010);  // joins the rest of a and all of c
  const auto joint = *allocator.allocate(7 * kUnit);
  CHECK(allocator.marks(joint) == 0b111);
  allocator.free(joint, 0b1000);
  CHECK(allocator.clear_marks() == 0b1000);
  CHECK(allocator.clear_marks() == 0);
  CHECK(allocator.marks(*allocator.allocate(7 * kUnit)) == 0);
}
