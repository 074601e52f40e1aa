// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pthread.h>
#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <string>

#include "cohort/error.hpp"

/// \file
/// Which process an object belongs to. A forked child inherits objects that speak to peers, and
/// runs their destructors at its exit; what it said there would be taken for the parent's word.

namespace cohort {

namespace detail {

/// `getpid` without the system call. Every module of a program may have its own copy: all hold the
/// same number.
struct CurrentProcess {
  inline static constinit std::atomic<pid_t> known{0};  ///< 0 where nobody has asked yet.

  /// Asks the system, once in a process where forks can be watched.
  [[nodiscard, gnu::cold, gnu::noinline]] static pid_t find() noexcept {
    const auto note = [] { known.store(::getpid(), std::memory_order_relaxed); };
    static const int watched = pthread_atfork(nullptr, nullptr, note);
    if (watched == 0) {
      note();
    }
    return ::getpid();
  }
};

/// This process: one load, but for the first time.
[[nodiscard]] inline pid_t current_process() noexcept {
  const pid_t known = CurrentProcess::known.load(std::memory_order_relaxed);
  return known != 0 ? known : CurrentProcess::find();
}

}  // namespace detail

/// Held by what speaks to other processes. Remembers the process that made it; in a child forked
/// from that process, destructors leave the peers alone, and calls throw. Costs nanoseconds.
class OwnerProcess {
 public:
  /// Whether this process made the object; false in a child after fork.
  [[nodiscard]] bool is_here() const noexcept { return pid_ == detail::current_process(); }

  /// Throws `UsageError` in another process than the owner.
  /// @param object  What is used, for the message.
  void check(const std::string& object) const {
    if (!is_here()) {
      throw_elsewhere(object);
    }
  }

 private:
  [[noreturn, gnu::noinline]] void throw_elsewhere(const std::string& object) const {
    throw UsageError(object + ": used in process " + std::to_string(::getpid()) +
                     ", a forked child of its owner, process " + std::to_string(pid_) +
                     "; the child needs groups of its own");
  }

  pid_t pid_ = detail::current_process();
};

/// The mutex of an object that a forked child destroys with its copy of the parent's memory. There
/// it does nothing: a thread that the child has not got may have held it, and nobody else uses the
/// object. For `std::lock_guard` and its like.
class OwnerMutex {
 public:
  /// In the owner, waits for whoever holds it.
  void lock() {
    if (owner_.is_here()) {
      mutex_.lock();
    }
  }
  /// By whoever holds it.
  void unlock() noexcept {
    if (owner_.is_here()) {
      mutex_.unlock();
    }
  }

 private:
  OwnerProcess owner_;
  std::mutex mutex_;
};

}  // namespace cohort
