// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>

#include "cohort/call_time.hpp"
#include "cohort/error.hpp"
#include "cohort/log.hpp"
#include "cohort/owner_process.hpp"
#include "cohort/poll_pause.hpp"
#include "cohort/process_state.hpp"
#include "cohort/wait_look.hpp"

/// \file
/// Calls that may never return, with a time limit, and an end that waits for no call. Needs no CUDA
/// and no NCCL.

namespace cohort::detail {

/// The calls that are under way on threads of their own. Where the process leaves while one is, the
/// exit handlers of CUDA would take down what it uses, and crash it: the first call of all
/// therefore asks for a handler before theirs, which waits a while for those that may still end and
/// then leaves at once, with the status that the process has. A forked child has none of them.
class CallsUnderWay {
 public:
  /// From its beginning to its end one call is under way.
  class Call {
   public:
    Call() { get().add(1); }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;
    ~Call() { get().add(-1); }
  };

 private:
  static constexpr std::chrono::seconds kPatience{2};
  static constexpr std::chrono::milliseconds kPause{1};

  /// How many there are, and in which process: a child forked during a call inherits the number
  /// without the thread, and would inherit a lock without the one to open it.
  struct Count {
    pid_t process = 0;
    std::int32_t calls = 0;
  };

  static CallsUnderWay& get() {
    static CallsUnderWay& all = process_wide<CallsUnderWay>("calls under way 2");
    return all;
  }
  void add(std::int32_t calls) {
    const pid_t here = current_process();
    Count now = count_.load();
    while (
        !count_.compare_exchange_weak(now, {here, (now.process == here ? now.calls : 0) + calls})) {
    }
    if (!asked_.exchange(true)) {
      static_cast<void>(::on_exit([](int status, void*) { get().leave(status); }, nullptr));
    }
  }
  [[nodiscard]] bool any() const noexcept {
    const Count now = count_.load();
    return now.process == current_process() && now.calls > 0;
  }
  void leave(int status) {
    const auto end = std::chrono::steady_clock::now() + kPatience;
    while (any()) {
      if (std::chrono::steady_clock::now() >= end) {
        log(LogLevel::warning,
            "the process leaves without its other exit handlers: a call of NCCL does not end");
        flush(stdout);
        flush(stderr);
        ::_exit(status);
      }
      nap(kPause);
    }
  }
  /// Nothing where another thread is inside, perhaps for good.
  static void flush(std::FILE* file) noexcept {
    if (::ftrylockfile(file) == 0) {
      std::fflush(file);
      ::funlockfile(file);
    }
  }

  std::atomic<Count> count_{};
  static_assert(std::atomic<Count>::is_always_lock_free);
  std::atomic<bool> asked_{false};
};

/// Runs `work` on a thread of its own and waits for it, with what the call under way has left of
/// the limit (see call_time.hpp). False at the limit: the thread then goes on, and `work` with all
/// that it holds is leaked on purpose, because nothing can end it from outside. What `work` throws
/// is thrown here; `TransportError` where there can be no thread.
///
/// @param look  Called every few milliseconds while it waits; what it throws ends the wait as well.
[[nodiscard]] inline bool call_within(std::chrono::milliseconds limit, std::function<void()> work,
                                      const std::function<void()>& look = {}) {
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    std::function<void()> work;
    std::exception_ptr error;
    bool done = false;
  };
  const auto state = std::make_shared<State>();
  state->work = std::move(work);
  try {
    // Nobody joins it: whoever waits may leave first.
    std::thread([state, call = std::make_unique<CallsUnderWay::Call>()] {
      std::exception_ptr error;
      try {
        state->work();
      } catch (...) {
        error = std::current_exception();
      }
      state->work = nullptr;  // what it holds may take the lock of another at its end
      const std::lock_guard lock(state->mutex);
      state->error = error;
      state->done = true;
      state->changed.notify_one();
    }).detach();
  } catch (const std::system_error& error) {
    throw TransportError({.call = "pthread_create", .native_code = error.code().value()},
                         error.code().message());
  }
  constexpr std::chrono::milliseconds kLookEvery{5};
  const LimitedWait wait(limit);
  const auto deadline = wait.deadline();
  std::unique_lock lock(state->mutex);
  const auto is_done = [&] { return state->done; };
  while (look && std::chrono::steady_clock::now() + kLookEvery < deadline &&
         !state->changed.wait_for(lock, kLookEvery, is_done)) {
    lock.unlock();
    WaitLook::pass(std::chrono::steady_clock::now());
    look();
    lock.lock();
  }
  if (!state->changed.wait_until(lock, deadline, is_done)) {
    return false;
  }
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
    std::thread([call, work = std::move(work),
                 under_way = std::make_unique<CallsUnderWay::Call>()] {
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

  /// Its result, or nothing at the deadline.
  [[nodiscard]] std::optional<int> result_by(std::chrono::steady_clock::time_point deadline) {
    std::unique_lock lock(mutex_);
    changed_.wait_until(lock, deadline, [this] { return result_.has_value(); });
    return result_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::optional<int> result_;
};

/// Something that several threads use until any of them ends it. The end comes once, while nobody
/// uses it: from the thread that asks for it, or else from the last one that was using it. Nobody
/// waits for another, so a use that never comes back keeps the end from coming, and nothing else.
class UsedUntilEnded {
 public:
  /// `end` must not throw.
  explicit UsedUntilEnded(std::function<void()> end) : end_(std::move(end)) {}
  UsedUntilEnded(const UsedUntilEnded&) = delete;
  UsedUntilEnded& operator=(const UsedUntilEnded&) = delete;
  ~UsedUntilEnded() = default;

  /// One use, or none where the end has been asked for.
  class Use {
   public:
    Use() = default;
    explicit Use(UsedUntilEnded& of) noexcept : of_(&of) {
      if ((of.state_.fetch_add(1) & kEnded) != 0) {
        of_ = nullptr;
        of.leave();
      }
    }
    Use(Use&& other) noexcept : of_(std::exchange(other.of_, nullptr)) {}
    Use& operator=(Use&&) = delete;
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;
    ~Use() {
      if (of_ != nullptr) {
        of_->leave();
      }
    }
    explicit operator bool() const noexcept { return of_ != nullptr; }

   private:
    UsedUntilEnded* of_ = nullptr;
  };

  /// No use begins after.
  void end() noexcept {
    if (state_.fetch_or(kEnded) == 0) {
      end_once();
    }
  }

 private:
  static constexpr std::uint32_t kEnded = std::uint32_t{1} << 31;  // below it the number of uses

  void leave() noexcept {
    if (state_.fetch_sub(1) == (kEnded | 1U)) {
      end_once();
    }
  }
  /// Refused uses may be the last ones more than once.
  void end_once() noexcept {
    if (!done_.exchange(true)) {
      end_();
    }
  }

  std::function<void()> end_;
  std::atomic<std::uint32_t> state_{0};
  std::atomic<bool> done_{false};
};

}  // namespace cohort::detail
