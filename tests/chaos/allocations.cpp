// SPDX-License-Identifier: Apache-2.0
// The `new` of programs of chaos. In a file of its own, so that nothing of it is inlined.
#include "chaos/allocations.hpp"

#include <cstdlib>
#include <new>

namespace cohort::chaos {
namespace {

thread_local AllocationFault fault;

void* allocate_or_fail(std::size_t bytes, std::size_t alignment) {
  if (fault.left > 0 && --fault.left == 0) {
    fault.left = fault.again ? 0 : 1;
    throw std::bad_alloc();
  }
  void* const memory =
      alignment <= alignof(std::max_align_t)
          ? std::malloc(bytes + (bytes == 0 ? 1 : 0))
          : std::aligned_alloc(alignment, (bytes + alignment) / alignment * alignment);
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
  return memory;
}

}  // namespace

AllocationFault& allocation_fault() noexcept { return fault; }

}  // namespace cohort::chaos

void* operator new(std::size_t bytes) {
  return cohort::chaos::allocate_or_fail(bytes, alignof(std::max_align_t));
}
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return cohort::chaos::allocate_or_fail(bytes, static_cast<std::size_t>(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
