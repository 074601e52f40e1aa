// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>

#include "cohort/log.hpp"
#include "cohort/owner_process.hpp"
#include "cohort/poll_pause.hpp"

/// \file
/// What one thread at a time works on, and any thread may give blocks back to.

namespace cohort::detail {

/// Lets releases come from any thread, at any time, without locks: the thread that works on what
/// the gate guards frees directly; what others give back waits in a list for its next work, as a
/// `GivenBack` that says all that a later free needs.
///
/// The work moves from thread to thread, in the user's order. A release that began on the old
/// thread while it was still the right one is waited for, some nanoseconds, by the new one.
template <class GivenBack>
class ReleaseGate {
 public:
  ReleaseGate() = default;
  ReleaseGate(const ReleaseGate&) = delete;
  ReleaseGate& operator=(const ReleaseGate&) = delete;
  ~ReleaseGate() {
    take([](const GivenBack&) {});
  }

  /// The calling thread works from here on. Calls `free` with what others gave back, oldest first.
  template <class Free>
  void enter(const Free& free) noexcept {
    if (worker_.load(std::memory_order_relaxed) != self()) [[unlikely]] {
      take_over();
    }
    if (given_back_.load(std::memory_order_relaxed) != nullptr) [[unlikely]] {
      take(free);
    }
  }

  /// By any thread: calls `free` now, or has the next work free what `note()` returns. Never waits.
  template <class Free, class Note>
  void release(const Free& free, const Note& note) noexcept {
    std::uintptr_t worker = self();
    if (worker_.load(std::memory_order_relaxed) == worker &&
        worker_.compare_exchange_strong(worker, worker | kReleasing, std::memory_order_acquire,
                                        std::memory_order_relaxed)) [[likely]] {
      free();
      worker_.store(worker, std::memory_order_release);
      return;
    }
    auto* const entry = new (std::nothrow) Entry{note(), nullptr};
    if (entry == nullptr) {
      log(LogLevel::error, "no memory to note a block that another thread gave back; it is lost");
      return;
    }
    entry->next = given_back_.load(std::memory_order_relaxed);
    while (!given_back_.compare_exchange_weak(entry->next, entry, std::memory_order_release,
                                              std::memory_order_relaxed)) {
    }
  }

 private:
  struct Entry {
    GivenBack given;
    Entry* next;
  };

  static constexpr std::uintptr_t kReleasing = 1;

  /// Names the calling thread.
  [[nodiscard]] static std::uintptr_t self() noexcept {
    alignas(2) static thread_local char place;
    return reinterpret_cast<std::uintptr_t>(&place);
  }

  void take_over() noexcept {
    std::uintptr_t before = worker_.load(std::memory_order_relaxed) & ~kReleasing;
    PollPause pause;
    while (!worker_.compare_exchange_strong(before, self(), std::memory_order_acq_rel,
                                            std::memory_order_relaxed)) {
      if (!owner_.is_here()) {  // a forked child has not got the thread that is releasing
        worker_.store(self(), std::memory_order_relaxed);
        return;
      }
      before &= ~kReleasing;
      pause();
    }
  }

  template <class Free>
  void take(const Free& free) noexcept {
    Entry* oldest = nullptr;
    for (Entry* newer = given_back_.exchange(nullptr, std::memory_order_acquire);
         newer != nullptr;) {
      oldest = std::exchange(newer, std::exchange(newer->next, oldest));
    }
    while (oldest != nullptr) {
      const std::unique_ptr<Entry> done(std::exchange(oldest, oldest->next));
      free(done->given);
    }
  }

  OwnerProcess owner_;
  std::atomic<std::uintptr_t> worker_{0};  // its name, and whether it is releasing
  std::atomic<Entry*> given_back_{nullptr};
};

}  // namespace cohort::detail
