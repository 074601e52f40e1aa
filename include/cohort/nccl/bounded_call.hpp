// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "cohort/log.hpp"

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

/// A call of NCCL on a thread of its own, which may outlive everyone who waits for it.
class DetachedCall {
 public:
  [[nodiscard]] static std::shared_ptr<DetachedCall> start(std::function<int()> work) {
    const auto call = std::make_shared<DetachedCall>();
    std::thread([call, work = std::move(work)] {
      int result = -1;
      try {
        result = work();
      } catch (const std::exception& error) {
        log(LogLevel::error, error.what());
      }
      const std::lock_guard lock(call->mutex_);
      call->result_ = result;
      call->changed_.notify_all();
    }).detach();
    return call;
  }

  /// Its result, or nothing at the limit.
  [[nodiscard]] std::optional<int> result_within(std::chrono::milliseconds limit) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, limit, [this] { return result_.has_value(); });
    return result_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::optional<int> result_;
};

}  // namespace cohort::detail
