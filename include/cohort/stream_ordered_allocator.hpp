// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "cohort/hash.hpp"
#include "cohort/offset_allocator.hpp"

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
  void free(Block block) noexcept { space_.free(block, users_[block]); }

  /// Whoever has a mark of `gone` has `by` from here on.
  void replace_marks(Marks gone, Marks by) noexcept {
    space_.replace_marks(gone, by);
    for (auto& users : users_) {
      users = OffsetAllocator::replaced(users, gone, by);
    }
  }

  /// `hash`, mixed with where the live blocks lie, in the order of their allocation.
  [[nodiscard]] std::uint64_t mixed(std::uint64_t hash) const noexcept {
    space_.for_each_live([&](Block block) {
      hash = detail::mix(hash, space_.offset(block) ^ std::rotl(space_.size(block), 32));
    });
    return hash;
  }

 private:
  OffsetAllocator space_;
  std::vector<Marks> users_;  // by block
};

}  // namespace cohort
