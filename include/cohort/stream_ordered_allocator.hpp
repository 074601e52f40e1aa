// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "cohort/hash.hpp"
#include "cohort/offset_allocator.hpp"
#include "cohort/stream.hpp"
#include "cohort/stream_marks.hpp"

/// \file
/// An allocator whose blocks remember the streams that use them, so that what is freed is reused in
/// the order of those streams.

namespace cohort {

/// An `OffsetAllocator`, and for every live block the marks of the streams that use it. A block
/// that is freed leaves them on its memory; who takes the memory next finds them there.
class StreamOrderedAllocator {
 public:
  /// Names a block until it is freed.
  using Block = OffsetAllocator::Block;
  /// A set of streams, see `StreamMarks`.
  using Marks = OffsetAllocator::Marks;

  /// The offsets that it hands out.
  [[nodiscard]] OffsetAllocator& space() noexcept { return space_; }
  /// The same, to look at.
  [[nodiscard]] const OffsetAllocator& space() const noexcept { return space_; }

  /// A block of at least `bytes`, or nothing where none fits. Whoever takes it says so by `use` or
  /// puts it back.
  [[nodiscard]] std::optional<Block> allocate(std::uint64_t bytes) {
    return space_.allocate(bytes);
  }

  /// Streams that are to use a block that was just allocated. Returns the others that its memory
  /// was used on.
  [[nodiscard]] Marks use(Block block, Marks own) {
    if (users_.size() <= block) {
      users_.resize(std::max<std::size_t>(block + 1, users_.size() * 2));
    }
    users_[block] = own;
    return space_.marks(block) & ~own;
  }
  /// Further streams that use a live block.
  void use_also(Block block, Marks marks) noexcept { users_[block] |= marks; }

  /// Frees a block that nobody has used since it was allocated.
  void put_back(Block block) noexcept { space_.free(block, space_.marks(block)); }
  /// Frees a block behind its streams.
  void free(Block block) noexcept { space_.free(block, std::exchange(users_[block], 0)); }

  /// Frees a block behind all that its streams have so far, of those too that gave up their marks
  /// while it lived. `marks`, `replace`: see `StreamMarks::anew`. What it throws leaves the block
  /// in use for good, because nobody could wait for it.
  template <class Replace>
  void release(Block block, StreamMarks& marks, const Replace& replace) {
    if (!unmarked_.empty()) [[unlikely]] {
      for (const StreamRef stream : take_unmarked(block)) {
        users_[block] |= marks.anew(stream, replace);
      }
      static_cast<void>(take_unmarked(block));  // they gave up their marks just now
    }
    free(block);
  }

  /// Whoever has a mark that is gone has another from here on.
  void replace_marks(const StreamMarks::GivenUp& marks) {
    space_.for_each_live([&](Block block) {
      if (block < users_.size()) {
        marks.for_each(users_[block], [&](StreamRef stream) {
          unmarked_.push_back({block, stream});
        });
        users_[block] = marks.replaced(users_[block]);
      }
    });
    space_.replace_marks(marks.gone, marks.by);
  }

  /// `hash`, mixed with where the live blocks lie, in the order of their allocation.
  [[nodiscard]] std::uint64_t mixed(std::uint64_t hash) const noexcept {
    space_.for_each_live([&](Block block) {
      hash = detail::mix(hash, space_.offset(block) ^ std::rotl(space_.size(block), 32));
    });
    return hash;
  }

 private:
  struct Unmarked {
    Block block;
    StreamRef stream;
  };

  /// The streams of a block that gave up their marks; forgets them.
  [[nodiscard]] std::vector<StreamRef> take_unmarked(Block block) {
    std::vector<StreamRef> streams;
    std::erase_if(unmarked_, [&](const Unmarked& one) {
      if (one.block == block) {
        streams.push_back(one.stream);
      }
      return one.block == block;
    });
    return streams;
  }

  OffsetAllocator space_;
  std::vector<Marks> users_;        // by block
  std::vector<Unmarked> unmarked_;  // what lives of the marks that were given up
};

}  // namespace cohort
