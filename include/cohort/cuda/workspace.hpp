// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "cohort/cuda/handles.hpp"
#include "cohort/error.hpp"

/// \file
/// Scratch memory of one group's transport, for collectives whose tensors do not lie as NCCL wants
/// them. One call uses it at a time: a group's calls are ordered.

namespace cohort {

class Workspace {
 public:
  explicit Workspace(int device) : device_(device) {}

  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }

  /// Leaks the memory on purpose: for a device that never becomes idle.
  void abandon() noexcept {
    static_cast<void>(memory_.release());
    for (auto& memory : outgrown_) {
      static_cast<void>(memory.release());
    }
    outgrown_.clear();
    bytes_ = 0;
  }

  /// Makes room. Not within a capture. Throws `TransportError`.
  void reserve(std::size_t bytes) {
    if (bytes <= bytes_) {
      return;
    }
    const std::size_t grown = std::max(bytes, 2 * bytes_);
    UniqueMemory fresh = make_memory(device_, grown);
    // Enqueued calls and captured graphs may go on using the memory from before.
    if (memory_) {
      outgrown_.push_back(std::move(memory_));
    }
    memory_ = std::move(fresh);
    bytes_ = grown;
  }

  /// At least `bytes`, on 256 bytes. Grows where `capturing()`, asked only then, is false. Throws
  /// `UsageError` with the numbers where there is too little within a capture, which could not be
  /// undone.
  template <class Capturing>
  [[nodiscard]] std::byte* get(std::size_t bytes, const Capturing& capturing) {
    if (bytes > bytes_) {
      if (capturing()) {
        throw UsageError(fmt::format(
            "the collective needs {} bytes of scratch memory for a layout that has to be packed, "
            "and {} are there; within a capture it cannot grow: reserve it, or make the call once "
            "before the capture",
            bytes, bytes_));
      }
      reserve(bytes);
    }
    return static_cast<std::byte*>(memory_.get());
  }

 private:
  int device_;
  std::size_t bytes_ = 0;
  UniqueMemory memory_;
  std::vector<UniqueMemory> outgrown_;
};

}  // namespace cohort
