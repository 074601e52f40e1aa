// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

/// \file
/// Allocations of this program's `new` that fail on one thread.

namespace cohort::chaos {

/// Which allocation fails next.
struct AllocationFault {
  int left = 0;        ///< Until one fails, that one included; 0 for none.
  bool again = false;  ///< Whether those behind it succeed.
};

/// Of this thread.
[[nodiscard]] AllocationFault& allocation_fault() noexcept;

/// Behind it no allocation of this thread fails.
class FailingAllocations {
 public:
  FailingAllocations() = default;
  FailingAllocations(const FailingAllocations&) = delete;
  FailingAllocations& operator=(const FailingAllocations&) = delete;
  ~FailingAllocations() { allocation_fault() = {}; }
};

}  // namespace cohort::chaos
