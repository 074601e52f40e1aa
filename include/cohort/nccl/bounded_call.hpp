#pragma once

#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

/// \file
/// Calls that may never return, with a time limit. Needs no CUDA and no NCCL.

namespace cohort::detail {

/// Runs `work` on a thread of its own and waits for it. False at the limit: the thread then goes
/// on, and `work` with all that it holds is leaked on purpose, because nothing can end it from
/// outside. What `work` throws is thrown here.
[[nodiscard]] inline bool call_within(std::chrono::milliseconds limit, std::function<void()> work) {
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    std::function<void()> work;
    std::exception_ptr error;
    bool done = false;
  };
  const auto state = std::make_shared<State>();
  state->work = std::move(work);
  std::thread helper([state] {
    std::exception_ptr error;
    try {
      state->work();
    } catch (...) {
      error = std::current_exception();
    }
    const std::lock_guard lock(state->mutex);
    state->error = error;
    state->done = true;
    state->changed.notify_one();
  });
  bool done = false;
  {
    std::unique_lock lock(state->mutex);
    done = state->changed.wait_for(lock, limit, [&] { return state->done; });
  }
  if (!done) {
    helper.detach();
    return false;
  }
  helper.join();
  if (state->error) {
    std::rethrow_exception(state->error);
  }
  return true;
}

}  // namespace cohort::detail
