// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "cohort/error.hpp"
#include "cohort/process_state.hpp"
#include "cohort/system_calls.hpp"

/// \file
/// Signals on which a process says something, without changing what else they do: a handler that
/// the engine had set runs as well, a signal that ends a process still ends it, in a forked child
/// they do what they would without the library, and when the last listener goes the old action is
/// back. A handler may do next to nothing, so it wakes a thread.
/// Sources: signal(7), signal-safety(7), sigaction(2).

namespace cohort::detail {

/// What a signal does to a process that has no handler for it.
enum class SignalDefault { ends, stops, nothing };

/// Source: signal(7), "Standard signals".
[[nodiscard]] constexpr SignalDefault signal_default(int signal) noexcept {
  switch (signal) {
    case SIGCHLD:
    case SIGCONT:
    case SIGURG:
    case SIGWINCH:
      return SignalDefault::nothing;
    case SIGSTOP:
    case SIGTSTP:
    case SIGTTIN:
    case SIGTTOU:
      return SignalDefault::stops;
    default:
      return SignalDefault::ends;
  }
}
/// Whether a signal has no meaning but the one that a program gives it: being heard is one.
[[nodiscard]] inline bool signal_is_users(int signal) noexcept {
  return signal == SIGUSR1 || signal == SIGUSR2 || signal >= SIGRTMIN;
}
/// Whether the process itself has gone wrong: it cannot go on where it was.
[[nodiscard]] constexpr bool signal_is_fault(int signal) noexcept {
  return signal == SIGSEGV || signal == SIGBUS || signal == SIGFPE || signal == SIGILL ||
         signal == SIGTRAP || signal == SIGSYS || signal == SIGABRT;
}

/// Who wants to hear of a signal.
class SignalListener {
 public:
  SignalListener() = default;
  SignalListener(const SignalListener&) = delete;
  SignalListener& operator=(const SignalListener&) = delete;
  virtual ~SignalListener() = default;

  /// A signal came. On a thread of the library, under a lock that `remove` takes.
  virtual void heard() noexcept = 0;
};

/// The signals of the process.
class TraceSignals {
 public:
  /// From now on the signal is heard. Throws `ConfigError` for what is no signal that can be caught
  /// or that stops a process, `TransportError`.
  void add(int signal, SignalListener& listener) {
    if (signal < 1 || signal >= NSIG) {
      throw ConfigError(
          fmt::format("TraceOptions.signal: expected 0 or a signal's number, got {}", signal));
    }
    if (signal_default(signal) == SignalDefault::stops) {
      throw ConfigError(fmt::format("TraceOptions.signal: {} stops a process", signal));
    }
    const std::lock_guard lock(mutex_);
    handling_ = this;  // of this module's handler
    Worker& worker = running_worker();
    Action& action = actions_[static_cast<std::size_t>(signal)];
    if (action.users == 0) {
      install(signal, action);
    }
    ++action.users;
    const std::lock_guard listening(worker.mutex);
    worker.listeners.push_back(&listener);
  }
  /// Not in a forked child. The old action is back with the last listener, unless somebody else has
  /// set one meanwhile.
  void remove(int signal, const SignalListener& listener) noexcept {
    const std::lock_guard lock(mutex_);
    if (Worker* const worker = worker_.load()) {
      const std::lock_guard listening(worker->mutex);
      const auto found = std::find(worker->listeners.begin(), worker->listeners.end(), &listener);
      if (found != worker->listeners.end()) {
        worker->listeners.erase(found);
      }
    }
    Action& action = actions_[static_cast<std::size_t>(signal)];
    struct sigaction now {};
    if (--action.users > 0 || ::sigaction(signal, nullptr, &now) != 0) {
      return;
    }
    if (is_ours(now)) {
      ::sigaction(signal, &action.before, nullptr);
      action.before = action.beneath ? action.below : action.before;
    } else {
      action.beneath = true;
    }
  }

  static TraceSignals& instance() { return process_wide<TraceSignals>("trace signals 2"); }

 private:
  /// The thread that handlers wake. A forked child has none, and may find the mutex locked for
  /// good: it gets another worker.
  struct Worker {
    pid_t process = 0;
    UniqueFd wake;
    std::mutex mutex;
    std::vector<SignalListener*> listeners;
    std::atomic<std::uint64_t> asked{0};
    std::atomic<std::uint64_t> done{0};
  };
  /// What a signal did before.
  struct Action {
    int users = 0;
    struct sigaction before {};
    struct sigaction below {};       ///< When it was heard first.
    bool beneath = false;            ///< A handler that was set meanwhile may call ours.
    std::atomic<pid_t> running{0};   ///< The thread in it.
    std::atomic<bool> spent{false};  ///< The handler before was to run once, and has.
  };

  [[nodiscard]] static bool is_ours(const struct sigaction& action) noexcept {
    return (action.sa_flags & SA_SIGINFO) != 0 && action.sa_sigaction == on_signal;
  }

  void install(int signal, Action& action) {
    struct sigaction before {};
    if (::sigaction(signal, nullptr, &before) != 0) {
      refuse(signal);
    }
    if (is_ours(before)) {
      return;  // of the parent of a forked child
    }
    action.before = before;
    action.below = action.beneath ? action.below : before;
    action.spent = false;
    const bool handled = has_handler(before);
    struct sigaction mine {};
    mine.sa_sigaction = on_signal;
    mine.sa_flags = SA_SIGINFO | SA_ONSTACK | (handled ? before.sa_flags & SA_RESTART : SA_RESTART);
    if (handled) {
      mine.sa_mask = before.sa_mask;
    } else {
      sigemptyset(&mine.sa_mask);
    }
    if (::sigaction(signal, &mine, nullptr) != 0) {
      refuse(signal);
    }
  }
  [[noreturn]] static void refuse(int signal) {
    throw ConfigError(
        fmt::format("TraceOptions.signal: {} cannot be caught: {}", signal, std::strerror(errno)));
  }
  [[nodiscard]] static bool has_handler(const struct sigaction& action) noexcept {
    return (action.sa_flags & SA_SIGINFO) != 0 ||
           (action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN);
  }

  /// Only what signal-safety(7) allows.
  static void on_signal(int signal, siginfo_t* info, void* context) {
    const int error = errno;
    TraceSignals* const self = handling_.load();
    if (self != nullptr) {
      self->act(signal, info, context);
    }
    errno = error;
  }

  void act(int signal, siginfo_t* info, void* context) noexcept {
    Action& action = actions_[static_cast<std::size_t>(signal)];
    const auto thread = static_cast<pid_t>(::syscall(SYS_gettid));
    if (action.running.load() == thread) {  // called by the handler that we call
      chain(signal, action.below, action.spent, info, context);
      return;
    }
    const pid_t other = action.running.exchange(thread);
    const bool handled = has_handler(action.before) && !action.spent.load();
    const bool by_default = !handled && action.before.sa_handler != SIG_IGN;
    Worker* const worker = worker_.load();
    const bool here = worker != nullptr && worker->process == ::getpid();
    const bool listens = here && action.users > 0;
    if (listens) {
      const std::uint64_t ticket = worker->asked.fetch_add(1) + 1;
      const std::uint64_t one = 1;
      static_cast<void>(!::write(worker->wake.get(), &one, sizeof(one)));
      if (signal_is_fault(signal) || (by_default && !signal_is_users(signal) &&
                                      signal_default(signal) == SignalDefault::ends)) {
        wait_for(*worker, ticket);  // the process may not come back
      }
    }
    if (!(listens && by_default && signal_is_users(signal))) {
      chain(signal, action.before, action.spent, info, context);
    }
    action.running.store(other);
  }

  /// What the signal would do without us.
  static void chain(int signal, const struct sigaction& action, std::atomic<bool>& spent,
                    siginfo_t* info, void* context) noexcept {
    const bool handled = has_handler(action) && !spent.load();
    if (handled) {
      if ((action.sa_flags & static_cast<int>(SA_RESETHAND)) != 0) {
        spent.store(true);
      }
      if ((action.sa_flags & SA_SIGINFO) != 0) {
        action.sa_sigaction(signal, info, context);
      } else {
        action.sa_handler(signal);
      }
    } else if (action.sa_handler != SIG_IGN && signal_default(signal) == SignalDefault::ends) {
      struct sigaction none {};
      none.sa_handler = SIG_DFL;
      ::sigaction(signal, &none, nullptr);
      ::raise(signal);  // taken when the handler has returned
    }
  }

  /// Until the worker has served a request, but no longer than some seconds: the thread that was
  /// interrupted may hold what the worker needs.
  static void wait_for(const Worker& worker, std::uint64_t ticket) noexcept {
    constexpr int kMostPauses = 600;
    constexpr timespec kPause{.tv_sec = 0, .tv_nsec = 5'000'000};
    for (int i = 0; i < kMostPauses && worker.done.load() < ticket; ++i) {
      ::nanosleep(&kPause, nullptr);
    }
  }

  /// Under `mutex_`.
  Worker& running_worker() {
    Worker* const running = worker_.load();
    if (running != nullptr && running->process == ::getpid()) {
      return *running;
    }
    auto made = std::make_unique<Worker>();
    made->process = ::getpid();
    made->wake = os::keep(::eventfd(0, EFD_CLOEXEC));
    if (!made->wake) {
      throw TransportError({.call = "eventfd", .native_code = errno}, std::strerror(errno));
    }
    start(*made);
    for (Action& action : actions_) {
      action.users = 0;  // those of a parent
    }
    worker_.store(made.release());  // as the thread, for good
    return *worker_.load();
  }

  static void start(Worker& worker) {
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // the thread takes none of the engine's signals
    std::exception_ptr failure;
    try {
      std::thread([&worker] { serve(worker); }).detach();
    } catch (const std::exception&) {
      failure = std::current_exception();
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (failure) {
      std::rethrow_exception(failure);
    }
  }

  static void serve(Worker& worker) noexcept {
    std::uint64_t count = 0;
    while (os::repeat([&] { return ::read(worker.wake.get(), &count, sizeof(count)); }) ==
           sizeof(count)) {
      const std::uint64_t asked = worker.asked.load();
      {
        const std::lock_guard lock(worker.mutex);
        for (SignalListener* const listener : worker.listeners) {
          listener->heard();
        }
      }
      worker.done.store(asked);
    }
  }

  inline static std::atomic<TraceSignals*> handling_{nullptr};

  std::mutex mutex_;
  std::atomic<Worker*> worker_{nullptr};
  std::array<Action, NSIG> actions_{};
};

}  // namespace cohort::detail
