#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

/// \file
/// A deterministic sub-allocator over offsets: it never touches the memory that it hands out, so it
/// serves host and device segments alike and is tested without either.
///
/// Two-level segregated fit: M. Masmano, I. Ripoll, A. Crespo and J. Real, "TLSF: a new dynamic
/// memory allocator for real-time systems", ECRTS 2004. Allocation and release take constant time;
/// neighbours coalesce at once. The same calls give the same offsets on every rank.

namespace cohort {

class OffsetAllocator {
 public:
  /// Names a block until it is freed.
  using Block = std::uint32_t;
  /// A set of marks that a free block carries, such as the streams that still use its memory.
  /// Blocks that coalesce unite their marks.
  using Marks = std::uint64_t;

  /// Alignment of every offset and size, in bytes.
  static constexpr std::uint64_t kAlignment = 256;

  struct Statistics {
    std::uint64_t capacity = 0;      ///< Bytes of all ranges.
    std::uint64_t used = 0;          ///< Bytes of live blocks, rounding included.
    std::uint64_t peak = 0;          ///< Largest `used` so far.
    std::uint64_t largest_free = 0;  ///< Bytes of the largest block that could be allocated.
    std::uint64_t live_blocks = 0;
  };

  OffsetAllocator() { heads_.fill(kNone); }

  /// The size that a request takes; requests of 0 take one unit, so every block has an offset of
  /// its own.
  [[nodiscard]] static constexpr std::uint64_t rounded(std::uint64_t bytes) noexcept {
    const std::uint64_t units = bytes / kAlignment + (bytes % kAlignment != 0 ? 1 : 0);
    return std::max<std::uint64_t>(units, 1) * kAlignment;
  }

  /// Adds free space [offset, offset + bytes), both multiples of `kAlignment`, disjoint from what
  /// was added before. Space that adjoins an earlier range is one with it.
  void add_range(std::uint64_t offset, std::uint64_t bytes, Marks marks = 0) {
    // Rare, so a scan for the neighbours beats an index that every other call would keep up.
    std::uint32_t previous = kNone;
    std::uint32_t next = kNone;
    for (std::uint32_t i = 0; i < nodes_.size(); ++i) {
      if (nodes_[i].size != 0 && nodes_[i].offset + nodes_[i].size == offset) {
        previous = i;
      } else if (nodes_[i].size != 0 && nodes_[i].offset == offset + bytes) {
        next = i;
      }
    }
    const Block block = new_node(
        {.offset = offset, .size = bytes, .marks = marks, .previous = previous, .next = next});
    if (previous != kNone) {
      nodes_[previous].next = block;
    }
    if (next != kNone) {
      nodes_[next].previous = block;
    }
    statistics_.capacity += bytes;
    insert_free(coalesce(block));
  }

  /// A block of at least `bytes`, or nothing where no free block is large enough.
  [[nodiscard]] std::optional<Block> allocate(std::uint64_t bytes) {
    if (bytes > kMaxRequest) {
      return std::nullopt;
    }
    const std::uint64_t size = rounded(bytes);
    const std::uint32_t found = find(size);
    if (found == kNone) {
      return std::nullopt;
    }
    remove_free(found);
    split(found, size);
    nodes_[found].used = true;
    statistics_.used += size;
    statistics_.peak = std::max(statistics_.peak, statistics_.used);
    ++statistics_.live_blocks;
    return found;
  }

  /// Returns a live block, which then carries `marks` besides those of the neighbours it joins.
  void free(Block block, Marks marks = 0) noexcept {
    nodes_[block].used = false;
    nodes_[block].marks = marks;
    statistics_.used -= nodes_[block].size;
    --statistics_.live_blocks;
    insert_free(coalesce(block));
  }

  [[nodiscard]] std::uint64_t offset(Block block) const noexcept { return nodes_[block].offset; }
  [[nodiscard]] std::uint64_t size(Block block) const noexcept { return nodes_[block].size; }
  /// The marks of the free space that a live block was cut from.
  [[nodiscard]] Marks marks(Block block) const noexcept { return nodes_[block].marks; }

  /// Forgets the marks of all free space.
  void clear_marks() noexcept {
    for (auto& node : nodes_) {
      if (!node.used) {
        node.marks = 0;
      }
    }
  }

  [[nodiscard]] Statistics statistics() const noexcept {
    Statistics result = statistics_;
    if (levels_ != 0) {
      const auto level = static_cast<std::size_t>(std::bit_width(levels_) - 1);
      const auto slot = static_cast<std::size_t>(std::bit_width(slots_[level]) - 1);
      for (auto node = heads_[level * kSlots + slot]; node != kNone;
           node = nodes_[node].next_free) {
        result.largest_free = std::max(result.largest_free, nodes_[node].size);
      }
    }
    return result;
  }

 private:
  static constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();
  static constexpr std::uint64_t kMaxRequest = std::uint64_t{1} << 60;
  static constexpr unsigned kSlotBits = 5;
  static constexpr std::size_t kSlots = std::size_t{1} << kSlotBits;
  static constexpr std::size_t kLevels = 64;

  struct Node {
    std::uint64_t offset = 0;
    std::uint64_t size = 0;  // 0 in a node without a block
    Marks marks = 0;
    std::uint32_t previous = kNone;  // neighbours in memory
    std::uint32_t next = kNone;
    std::uint32_t previous_free = kNone;  // the list of one size class
    std::uint32_t next_free = kNone;
    bool used = false;
  };

  struct Class {
    std::size_t level = 0;
    std::size_t slot = 0;
  };

  /// The size class of a block: the power of two below it in units, and one of 32 steps between
  /// that and the next.
  [[nodiscard]] static constexpr Class class_of(std::uint64_t size) noexcept {
    const std::uint64_t units = size / kAlignment;
    const auto width = static_cast<unsigned>(std::bit_width(units));
    if (width <= kSlotBits) {
      return {0, static_cast<std::size_t>(units)};
    }
    const unsigned level = width - kSlotBits;
    return {level, static_cast<std::size_t>(units >> (level - 1)) & (kSlots - 1)};
  }

  [[nodiscard]] static constexpr bool is_class_minimum(std::uint64_t size) noexcept {
    const std::uint64_t units = size / kAlignment;
    const auto width = static_cast<unsigned>(std::bit_width(units));
    return width <= kSlotBits + 1 ||
           (units & ((std::uint64_t{1} << (width - kSlotBits - 1)) - 1)) == 0;
  }

  std::uint32_t new_node(const Node& node) {
    if (unused_ == kNone) {
      nodes_.push_back(node);
      return static_cast<std::uint32_t>(nodes_.size() - 1);
    }
    const std::uint32_t index = unused_;
    unused_ = nodes_[index].next_free;
    nodes_[index] = node;
    return index;
  }

  /// The free block to use for `size`: the head of the smallest class whose every block fits.
  /// Where there is none, the class of `size` itself is searched, so that space is never refused
  /// although a block that fits exists.
  [[nodiscard]] std::uint32_t find(std::uint64_t size) const noexcept {
    const Class own = class_of(size);
    Class from = own;
    if (!is_class_minimum(size)) {
      from.slot += 1;
      if (from.slot == kSlots) {
        from = {own.level + 1, 0};
      }
    }
    if (from.level < kLevels) {
      const std::uint32_t in_level =
          slots_[from.level] & (~std::uint32_t{0} << static_cast<unsigned>(from.slot));
      if (in_level != 0) {
        return heads_[from.level * kSlots + static_cast<std::size_t>(std::countr_zero(in_level))];
      }
      const std::uint64_t above =
          from.level + 1 < kLevels ? levels_ & (~std::uint64_t{0} << (from.level + 1)) : 0;
      if (above != 0) {
        const auto level = static_cast<std::size_t>(std::countr_zero(above));
        return heads_[level * kSlots + static_cast<std::size_t>(std::countr_zero(slots_[level]))];
      }
    }
    for (auto node = heads_[own.level * kSlots + own.slot]; node != kNone;
         node = nodes_[node].next_free) {
      if (nodes_[node].size >= size) {
        return node;
      }
    }
    return kNone;
  }

  void insert_free(std::uint32_t index) noexcept {
    const auto [level, slot] = class_of(nodes_[index].size);
    auto& head = heads_[level * kSlots + slot];
    nodes_[index].previous_free = kNone;
    nodes_[index].next_free = head;
    if (head != kNone) {
      nodes_[head].previous_free = index;
    }
    head = index;
    slots_[level] |= std::uint32_t{1} << static_cast<unsigned>(slot);
    levels_ |= std::uint64_t{1} << static_cast<unsigned>(level);
  }

  void remove_free(std::uint32_t index) noexcept {
    Node& node = nodes_[index];
    const auto [level, slot] = class_of(node.size);
    if (node.next_free != kNone) {
      nodes_[node.next_free].previous_free = node.previous_free;
    }
    if (node.previous_free != kNone) {
      nodes_[node.previous_free].next_free = node.next_free;
      return;
    }
    heads_[level * kSlots + slot] = node.next_free;
    if (node.next_free == kNone) {
      slots_[level] &= ~(std::uint32_t{1} << static_cast<unsigned>(slot));
      if (slots_[level] == 0) {
        levels_ &= ~(std::uint64_t{1} << static_cast<unsigned>(level));
      }
    }
  }

  /// Cuts `size` off the front of a block that is in no list; the rest becomes free.
  void split(std::uint32_t index, std::uint64_t size) {
    if (nodes_[index].size == size) {
      return;
    }
    const std::uint32_t rest = new_node({.offset = nodes_[index].offset + size,
                                         .size = nodes_[index].size - size,
                                         .marks = nodes_[index].marks,
                                         .previous = index,
                                         .next = nodes_[index].next});
    nodes_[index].size = size;
    nodes_[index].next = rest;
    if (nodes_[rest].next != kNone) {
      nodes_[nodes_[rest].next].previous = rest;
    }
    insert_free(rest);
  }

  /// Joins a block that is in no list with its free neighbours. Returns the joint block.
  std::uint32_t coalesce(std::uint32_t index) noexcept {
    if (const auto next = nodes_[index].next; next != kNone && !nodes_[next].used) {
      remove_free(next);
      absorb(index, next);
    }
    if (const auto previous = nodes_[index].previous; previous != kNone && !nodes_[previous].used) {
      remove_free(previous);
      absorb(previous, index);
      return previous;
    }
    return index;
  }

  void absorb(std::uint32_t index, std::uint32_t next) noexcept {
    nodes_[index].size += nodes_[next].size;
    nodes_[index].marks |= nodes_[next].marks;
    nodes_[index].next = nodes_[next].next;
    if (nodes_[index].next != kNone) {
      nodes_[nodes_[index].next].previous = index;
    }
    nodes_[next] = {.next_free = unused_};
    unused_ = next;
  }

  std::vector<Node> nodes_;
  std::uint32_t unused_ = kNone;  // nodes without a block, linked by next_free
  std::array<std::uint32_t, kLevels * kSlots> heads_{};
  std::array<std::uint32_t, kLevels> slots_{};
  std::uint64_t levels_ = 0;
  Statistics statistics_;
};

}  // namespace cohort
