// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "cohort/owner_process.hpp"

/// \file
/// Parts of symmetric memory that somebody else's allocator divides further.

namespace cohort {

/// The parts of a segment in which equal tensors need not lie at equal offsets on all ranks: the
/// part itself does, and an allocator that the library does not know hands out pieces of it, which
/// it may split, cache and reuse in another order on each rank. What reaches a peer by the own
/// offset stays away from them. Thread-safe; a look costs one load where there are none.
class LooseParts {
 public:
  /// These bytes are one from here on.
  void add(const void* begin, std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    parts_.push_back({reinterpret_cast<std::uintptr_t>(begin), bytes});
    count_.store(parts_.size(), std::memory_order_release);
  }
  /// The one that begins there is none any more.
  void remove(const void* begin) noexcept {
    const std::lock_guard lock(mutex_);
    std::erase_if(parts_, [at = reinterpret_cast<std::uintptr_t>(begin)](const Part& part) {
      return part.begin == at;
    });
    count_.store(parts_.size(), std::memory_order_release);
  }
  /// Whether any of these bytes lies in one.
  [[nodiscard]] bool hold(const void* data, std::size_t bytes) const noexcept {
    if (count_.load(std::memory_order_acquire) == 0) [[likely]] {
      return false;
    }
    const auto begin = reinterpret_cast<std::uintptr_t>(data);
    const std::lock_guard lock(mutex_);
    return std::any_of(parts_.begin(), parts_.end(), [&](const Part& part) {
      return begin < part.begin + part.bytes && part.begin < begin + bytes;
    });
  }

 private:
  struct Part {
    std::uintptr_t begin;
    std::size_t bytes;
  };

  mutable OwnerMutex mutex_;
  std::vector<Part> parts_;
  std::atomic<std::size_t> count_{0};
};

}  // namespace cohort
