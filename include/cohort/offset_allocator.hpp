// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

/// \file
/// A deterministic sub-allocator over offsets: it never touches the memory that it hands out, so it
/// serves host and device segments alike and is tested without either.
///
/// Best fit, and of equal fits the lowest offset; neighbours coalesce at once. Where a block goes
/// is therefore a function of which blocks are live, not of how they came to be: ranks with the
/// same live blocks go on alike even if they released others in different orders. Free blocks are
/// in pairing heaps (M. L. Fredman, R. Sedgewick, D. D. Sleator and R. E. Tarjan, "The pairing
/// heap", Algorithmica 1, 1986), one for each class of sizes, so allocation and release take O(log
/// n) amortized; a large block also looks at the smaller free ones of its class. The first block of
/// a class lies beside its heap: what is taken and given back in turn, as temporaries of a step
/// are, touches none.

namespace cohort {

/// Hands out offsets in a range: best fit, coalescing, the same for the same calls.
class OffsetAllocator {
 public:
  /// Names a block until it is freed.
  using Block = std::uint32_t;
  /// A set of marks that a free block carries, such as the streams that still use its memory.
  /// Blocks that coalesce unite their marks.
  using Marks = std::uint64_t;

  /// Alignment of every offset and size, in bytes.
  static constexpr std::uint64_t kAlignment = 256;
  /// The largest request that any memory could serve, in bytes.
  static constexpr std::uint64_t kMaxRequest = std::uint64_t{1} << 60;

  /// What is in use.
  struct Statistics {
    std::uint64_t capacity = 0;      ///< Bytes of all ranges.
    std::uint64_t used = 0;          ///< Bytes of live blocks, rounding included.
    std::uint64_t peak = 0;          ///< Largest `used` so far.
    std::uint64_t largest_free = 0;  ///< Bytes of the largest block that could be allocated.
    std::uint64_t live_blocks = 0;   ///< Blocks in use.
  };

  /// The size that a request takes; requests of 0 take one unit, so every block has an offset of
  /// its own. What is beyond `kMaxRequest` stays beyond it.
  [[nodiscard]] static constexpr std::uint64_t rounded(std::uint64_t bytes) noexcept {
    constexpr std::uint64_t kMost = std::numeric_limits<std::uint64_t>::max() / kAlignment;
    const std::uint64_t units = bytes / kAlignment + (bytes % kAlignment != 0 ? 1 : 0);
    return std::clamp<std::uint64_t>(units, 1, kMost) * kAlignment;
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
  [[nodiscard, gnu::always_inline]] std::optional<Block> allocate(std::uint64_t bytes) {
    const Block block = allocate_or_none(bytes);
    return block == kNone ? std::nullopt : std::optional(block);
  }

  /// The same from the back of the largest free block: for what shall stay out of the way of blocks
  /// that come and go, and of the gaps between them.
  [[nodiscard]] std::optional<Block> allocate_at_back(std::uint64_t bytes) {
    const std::uint64_t size = rounded(bytes);
    const std::uint32_t found = largest();
    if (found == kNone || nodes_[found].size < size) {
      return std::nullopt;
    }
    return take_back(found, size);
  }

  /// A block of at least `bytes` directly in front of a live one, or nothing where that is not
  /// free.
  [[nodiscard]] std::optional<Block> allocate_in_front_of(Block block, std::uint64_t bytes) {
    const std::uint64_t size = rounded(bytes);
    const std::uint32_t previous = nodes_[block].previous;
    if (previous == kNone || nodes_[previous].used || nodes_[previous].size < size) {
      return std::nullopt;
    }
    return take_back(previous, size);
  }

  /// Bytes of the free block that ends at `end`; 0 where there is none.
  [[nodiscard]] std::uint64_t free_before(std::uint64_t end) const noexcept {
    for (const auto& node : nodes_) {
      if (node.size != 0 && !node.used && node.offset + node.size == end) {
        return node.size;
      }
    }
    return 0;
  }

  /// Returns a live block, which then carries `marks` besides those of the neighbours it joins.
  void free(Block block, Marks marks = 0) noexcept {
    nodes_[block].used = false;
    nodes_[block].marks = marks;
    statistics_.used -= nodes_[block].size;
    --statistics_.live_blocks;
    unlink(block);
    insert_free(coalesce(block));
  }

  /// Of a live block, in bytes.
  [[nodiscard]] std::uint64_t offset(Block block) const noexcept { return nodes_[block].offset; }
  /// Of a live block, in bytes, rounded up to the alignment.
  [[nodiscard]] std::uint64_t size(Block block) const noexcept { return nodes_[block].size; }
  /// The marks of the free space that a live block was cut from.
  [[nodiscard]] Marks marks(Block block) const noexcept { return nodes_[block].marks; }

  /// Calls `visit(block)` for every live block, in the order in which they were allocated.
  template <class Visit>
  void for_each_live(const Visit& visit) const {
    for (std::uint32_t block = oldest_; block != kNone; block = nodes_[block].right) {
      visit(Block{block});
    }
  }

  /// The marks of all free space.
  [[nodiscard]] Marks free_marks() const noexcept {
    Marks all = 0;
    for (const auto& node : nodes_) {
      all |= node.used ? 0 : node.marks;
    }
    return all;
  }
  /// Forgets the marks of all free space, and says which there were.
  Marks clear_marks() noexcept {
    Marks all = 0;
    for (auto& node : nodes_) {
      if (!node.used) {
        all |= std::exchange(node.marks, 0);
      }
    }
    return all;
  }

  /// `marks` with those of `gone`, where there are any, replaced by `by`.
  [[nodiscard]] static constexpr Marks replaced(Marks marks, Marks gone, Marks by) noexcept {
    return (marks & gone) == 0 ? marks : (marks & ~gone) | by;
  }
  /// The same for all memory, live and free.
  void replace_marks(Marks gone, Marks by) noexcept {
    for (auto& node : nodes_) {
      node.marks = replaced(node.marks, gone, by);
    }
  }

  /// What is in use now, and was at the peak.
  [[nodiscard]] Statistics statistics() const noexcept {
    Statistics result = statistics_;
    const std::uint32_t found = largest();
    result.largest_free = found == kNone ? 0 : nodes_[found].size;
    return result;
  }

 private:
  static constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();

  struct Node {
    std::uint64_t offset = 0;
    std::uint64_t size = 0;  // 0 in a node without a block
    Marks marks = 0;
    std::uint32_t previous = kNone;  // neighbours in memory
    std::uint32_t next = kNone;
    // Of a block in a heap its first child and its next sibling, of a live one those allocated
    // before and after it, of a node without a block (right only) the next such node.
    std::uint32_t left = kNone;
    std::uint32_t right = kNone;
    std::uint32_t up = kNone;  // in a heap the sibling before it, of the first the parent
    bool used = false;
  };

  /// The block's number alone: out of line, an optional is stored in two pieces and loaded as one
  /// word, for which a processor waits.
  [[nodiscard]] Block allocate_or_none(std::uint64_t bytes) {
    const std::uint64_t size = rounded(bytes);
    const std::uint32_t found = bytes > kMaxRequest ? kNone : find(size);
    return found == kNone ? kNone : take(found, size);
  }

  std::uint32_t new_node(const Node& node) {
    if (unused_ == kNone) {
      nodes_.push_back(node);
      return static_cast<std::uint32_t>(nodes_.size() - 1);
    }
    const std::uint32_t index = unused_;
    unused_ = nodes_[index].right;
    nodes_[index] = node;
    return index;
  }

  /// Makes the front of a free block live.
  Block take(std::uint32_t found, std::uint64_t size) {
    remove_free(found);
    if (nodes_[found].size != size) {
      insert_free(split(found, size));
    }
    return make_live(found);
  }

  /// Makes the back of a free block live.
  Block take_back(std::uint32_t found, std::uint64_t size) {
    remove_free(found);
    if (nodes_[found].size == size) {
      return make_live(found);
    }
    const std::uint32_t back = split(found, nodes_[found].size - size);
    insert_free(found);
    return make_live(back);
  }

  Block make_live(std::uint32_t index) {
    nodes_[index].used = true;
    link(index);
    statistics_.used += nodes_[index].size;
    statistics_.peak = std::max(statistics_.peak, statistics_.used);
    ++statistics_.live_blocks;
    return index;
  }

  // The list of live blocks.

  void link(std::uint32_t index) noexcept {
    nodes_[index].left = newest_;
    nodes_[index].right = kNone;
    (newest_ == kNone ? oldest_ : nodes_[newest_].right) = index;
    newest_ = index;
  }

  void unlink(std::uint32_t index) noexcept {
    const auto [before, after] = std::pair(nodes_[index].left, nodes_[index].right);
    (before == kNone ? oldest_ : nodes_[before].right) = after;
    (after == kNone ? newest_ : nodes_[after].left) = before;
  }

  // The heaps of free blocks, each ordered by size and then by offset. Classes ascend with the
  // size: one for each of the smallest sizes, then eight an octave.

  static constexpr std::uint64_t kExact = 64;  // sizes in units of the alignment
  static constexpr std::size_t kClasses = 64 + 8 * 46;

  /// Whether all blocks of a class have one size.
  [[nodiscard]] static constexpr bool is_exact(std::size_t of) noexcept { return of < kExact; }

  [[nodiscard]] static constexpr std::size_t class_of(std::uint64_t size) noexcept {
    const std::uint64_t units = size / kAlignment;
    if (units <= kExact) {
      return static_cast<std::size_t>(units - 1);
    }
    const auto octave = static_cast<unsigned>(std::bit_width(units)) - 1;  // 6 and more
    return std::min(kClasses - 1, 64 + (octave - 6) * std::size_t{8} +
                                      static_cast<std::size_t>((units >> (octave - 3)) & 7));
  }

  /// The first class from `begin` on that has a block, or `kClasses`.
  [[nodiscard]] std::size_t first_filled(std::size_t begin) const noexcept {
    std::size_t word = begin / 64;
    if (word >= filled_.size()) {
      return kClasses;
    }
    std::uint64_t bits = filled_[word] & (~std::uint64_t{0} << (begin % 64));
    while (bits == 0) {
      if (++word == filled_.size()) {
        return kClasses;
      }
      bits = filled_[word];
    }
    return word * 64 + static_cast<std::size_t>(std::countr_zero(bits));
  }

  /// The free blocks of a class: the first of them, or none where it was taken since, and a heap of
  /// the others, which all come behind the first.
  struct Bin {
    std::uint32_t first = kNone;
    std::uint32_t root = kNone;
  };

  [[nodiscard]] bool is_filled(std::size_t of) const noexcept {
    return (filled_[of / 64] >> (of % 64) & 1) != 0;
  }
  void note_filled(std::size_t of) noexcept { filled_[of / 64] |= std::uint64_t{1} << (of % 64); }
  void note_empty(std::size_t of) noexcept { filled_[of / 64] &= ~(std::uint64_t{1} << (of % 64)); }

  /// The first block of a class that has some.
  [[nodiscard]] std::uint32_t first_of(std::size_t of) const noexcept {
    const Bin& bin = bins_[of];
    return bin.first != kNone ? bin.first : bin.root;
  }

  [[nodiscard]] bool less(std::uint32_t a, std::uint32_t b) const noexcept {
    const Node& x = nodes_[a];
    const Node& y = nodes_[b];
    return x.size != y.size ? x.size < y.size : x.offset < y.offset;
  }

  /// The smallest free block of at least `size`, of several the one with the lowest offset.
  [[nodiscard]] std::uint32_t find(std::uint64_t size) const noexcept {
    const std::size_t own = class_of(size);
    if (is_filled(own)) [[likely]] {
      const std::uint32_t found = is_exact(own) ? first_of(own) : find_in(own, size);
      if (found != kNone) [[likely]] {
        return found;
      }
    }
    const std::size_t first = first_filled(own + 1);
    return first < kClasses ? first_of(first) : kNone;
  }

  /// The same in one class. Blocks below a large enough one are larger and not looked at.
  [[nodiscard]] std::uint32_t find_in(std::size_t of, std::uint64_t size) const noexcept {
    std::uint32_t best = bins_[of].first;
    if (best != kNone && nodes_[best].size >= size) {
      return best;
    }
    best = kNone;
    for (std::uint32_t node = bins_[of].root; node != kNone;) {
      const bool fits = nodes_[node].size >= size;
      if (fits && (best == kNone || less(node, best))) {
        best = node;
      }
      node = following(node, !fits);
    }
    return best;
  }

  /// The largest free block, of several the one with the highest offset.
  [[nodiscard]] std::uint32_t largest() const noexcept {
    for (std::size_t word = filled_.size(); word-- > 0;) {
      if (filled_[word] != 0) {
        const auto last = 63 - static_cast<unsigned>(std::countl_zero(filled_[word]));
        const Bin& bin = bins_[word * 64 + last];
        std::uint32_t best = bin.root != kNone ? bin.root : bin.first;
        for (std::uint32_t node = bin.root; node != kNone; node = following(node, true)) {
          best = less(best, node) ? node : best;
        }
        return best;
      }
    }
    return kNone;
  }

  /// The next block of a heap in pre-order, with or without those below `node`.
  [[nodiscard]] std::uint32_t following(std::uint32_t node, bool descends) const noexcept {
    if (descends && nodes_[node].left != kNone) {
      return nodes_[node].left;
    }
    while (nodes_[node].right == kNone) {
      std::uint32_t child = node;
      while (true) {  // back over the siblings before it to the parent
        const std::uint32_t up = nodes_[child].up;
        if (up == kNone) {
          return kNone;
        }
        const bool is_parent = nodes_[up].left == child;
        child = up;
        if (is_parent) {
          break;
        }
      }
      node = child;
    }
    return nodes_[node].right;
  }

  /// Joins two heaps.
  std::uint32_t meld(std::uint32_t a, std::uint32_t b) noexcept {
    if (less(b, a)) {
      std::swap(a, b);
    }
    const std::uint32_t child = nodes_[a].left;
    nodes_[b].up = a;
    nodes_[b].right = child;
    if (child != kNone) {
      nodes_[child].up = b;
    }
    nodes_[a].left = b;
    return a;
  }

  /// Joins the heaps of a list of siblings, in pairs and then from the last pair to the first.
  std::uint32_t meld_siblings(std::uint32_t first) noexcept {
    if (first == kNone || nodes_[first].right == kNone) [[likely]] {
      if (first != kNone) {
        nodes_[first].up = kNone;
      }
      return first;
    }
    std::uint32_t pairs = kNone;
    while (first != kNone) {
      const std::uint32_t a = first;
      const std::uint32_t b = nodes_[a].right;
      first = b == kNone ? kNone : nodes_[b].right;
      const std::uint32_t pair = b == kNone ? a : meld(a, b);
      nodes_[pair].right = pairs;
      pairs = pair;
    }
    std::uint32_t all = kNone;
    while (pairs != kNone) {
      const std::uint32_t pair = pairs;
      pairs = nodes_[pair].right;
      all = all == kNone ? pair : meld(all, pair);
    }
    nodes_[all].up = kNone;
    nodes_[all].right = kNone;
    return all;
  }

  void insert_free(std::uint32_t index) noexcept {
    const std::size_t of = class_of(nodes_[index].size);
    Bin& bin = bins_[of];
    note_filled(of);
    if (bin.first == kNone) {
      if (bin.root == kNone || less(index, bin.root)) [[likely]] {
        bin.first = index;
        return;
      }
    } else if (less(index, bin.first)) {
      std::swap(bin.first, index);
    }
    nodes_[index].left = nodes_[index].right = nodes_[index].up = kNone;
    bin.root = bin.root == kNone ? index : meld(bin.root, index);
  }

  void remove_free(std::uint32_t index) noexcept {
    const std::size_t of = class_of(nodes_[index].size);
    Bin& bin = bins_[of];
    if (index == bin.first) [[likely]] {
      bin.first = kNone;
      if (bin.root == kNone) {
        note_empty(of);
      }
      return;
    }
    const auto [left, right, up] =
        std::tuple(nodes_[index].left, nodes_[index].right, nodes_[index].up);
    if (up == kNone) {
      bin.root = meld_siblings(left);
      if (bin.root == kNone && bin.first == kNone) {
        note_empty(of);
      }
      return;
    }
    (nodes_[up].left == index ? nodes_[up].left : nodes_[up].right) = right;
    if (right != kNone) {
      nodes_[right].up = up;
    }
    if (left != kNone) {
      bin.root = meld(bin.root, meld_siblings(left));
    }
  }

  /// Cuts a block that is in no heap and larger than `size` behind its first `size` bytes. Returns
  /// the rest, which is in no heap either.
  std::uint32_t split(std::uint32_t index, std::uint64_t size) {
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
    return rest;
  }

  /// Joins a block that is in no heap with its free neighbours. Returns the joint block.
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
    nodes_[next] = {.right = unused_};
    unused_ = next;
  }

  std::vector<Node> nodes_;
  std::uint32_t unused_ = kNone;  // nodes without a block, linked by `right`
  std::array<Bin, kClasses> bins_{};
  std::array<std::uint64_t, (kClasses + 63) / 64> filled_{};  // a bit for each class with a block
  std::uint32_t oldest_ = kNone;                              // of the live blocks
  std::uint32_t newest_ = kNone;
  Statistics statistics_;
};

}  // namespace cohort
