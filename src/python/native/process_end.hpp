// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pthread.h>
#include <unistd.h>

#include <atomic>

/// \file
/// The end of the interpreter.

namespace cohort::python {

/// A call that returns to an interpreter that has ended would end the process out of turn: Python
/// ends such a thread, in the middle of frames that may not be left so. It stays here instead until
/// the process has ended.
class ProcessEnd {
 public:
  /// By the thread that ends the interpreter, which may go on calling.
  static void begin() {
    of_process().ending_thread.store(pthread_self());
    of_process().is_ending.store(true);
  }

  /// What an operator holds while it runs: its end is the return to the interpreter.
  struct Return {
    Return() = default;
    Return(const Return&) = delete;
    Return& operator=(const Return&) = delete;
    ~Return() {
      if (of_process().is_ending.load(std::memory_order_relaxed)) {
        stay();
      }
    }
  };

 private:
  std::atomic<bool> is_ending{false};
  std::atomic<pthread_t> ending_thread{};

  static ProcessEnd& of_process() noexcept {
    static ProcessEnd end;
    return end;
  }

  static void stay() noexcept {
    while (pthread_equal(of_process().ending_thread.load(), pthread_self()) == 0) {
      pause();
    }
  }
};

inline void interpreter_ends() { ProcessEnd::begin(); }

}  // namespace cohort::python
