// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <chrono>
#include <condition_variable>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "cohort/call_time.hpp"
#include "cohort/cuda/handles.hpp"
#include "cohort/log.hpp"

/// \file
/// Waiting for a card within a limit, before memory that its kernels may use is unmapped: the
/// driver's functions for that do not wait.

namespace cohort {

namespace detail {

/// One wait for everything that a card has to do, on a thread that may outlive the caller.
class DrainAttempt {
 public:
  static std::shared_ptr<DrainAttempt> start(int device) {
    const auto attempt = std::make_shared<DrainAttempt>();
    std::thread([attempt, device] { attempt->finish(wait_for_all(device)); }).detach();
    return attempt;
  }

  /// Whether it has ended by then.
  [[nodiscard]] bool ended_by(std::chrono::steady_clock::time_point deadline) {
    std::unique_lock lock(mutex_);
    return changed_.wait_until(lock, deadline, [this] { return ended_; });
  }
  [[nodiscard]] bool idle() {
    const std::lock_guard lock(mutex_);
    return idle_;
  }

 private:
  /// A card that is lost runs nothing either.
  static bool wait_for_all(int device) noexcept {
    try {
      const DeviceGuard guard(device);
      const RelaxedCapture relaxed;
      const cudaError_t code = cudaDeviceSynchronize();
      static_cast<void>(cudaGetLastError());
      return code < cudaErrorStreamCaptureUnsupported || code > cudaErrorStreamCaptureWrongThread;
    } catch (const std::exception& error) {
      log(LogLevel::warning, error.what());
      return true;
    }
  }
  void finish(bool idle) {
    const std::lock_guard lock(mutex_);
    idle_ = idle;
    ended_ = true;
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  bool ended_ = false;
  bool idle_ = false;
};

/// The attempts under way, by device. Never destroyed: their threads may be the last to run.
struct DrainAttempts {
  std::mutex mutex;
  std::map<int, std::shared_ptr<DrainAttempt>> under_way;

  static DrainAttempts& get() {
    static auto* const all = new DrainAttempts;
    return *all;
  }
  struct Joined {
    std::shared_ptr<DrainAttempt> attempt;
    bool fresh = false;
  };
  /// Joins the attempt that does not end, if there is one, so that a stuck card costs one thread.
  Joined join(int device) {
    const std::lock_guard lock(mutex);
    auto& attempt = under_way[device];
    const bool fresh =
        attempt == nullptr || attempt->ended_by(std::chrono::steady_clock::time_point::min());
    if (fresh) {
      attempt = DrainAttempt::start(device);
    }
    return {attempt, fresh};
  }
};

}  // namespace detail

/// Whether everything that the process has enqueued on the card so far, on any stream and by any
/// graph, is done within the limit. False where a capture forbids to ask.
[[nodiscard]] inline bool device_idle_within(int device, std::chrono::milliseconds limit) noexcept {
  try {
    const auto deadline = detail::deadline_after(limit);
    bool fresh = false;
    do {
      const auto joined = detail::DrainAttempts::get().join(device);
      if (!joined.attempt->ended_by(deadline) || !joined.attempt->idle()) {
        return false;
      }
      fresh = joined.fresh;  // one that was under way before knows nothing of what came since
    } while (!fresh);
    return true;
  } catch (const std::exception& error) {
    log(LogLevel::warning, error.what());
    return false;
  }
}

}  // namespace cohort
