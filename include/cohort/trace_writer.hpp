// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "cohort/error.hpp"
#include "cohort/flight_recorder.hpp"
#include "cohort/log.hpp"
#include "cohort/process_state.hpp"
#include "cohort/system_calls.hpp"
#include "cohort/trace_file.hpp"

/// \file
/// When a rank's last calls are written, and where: at the first call that fails, on a signal that
/// the engine chooses, and on demand. Without a folder the first two write nothing.

namespace cohort {

/// How a `ParallelState` writes its traces.
struct TraceOptions {
  /// An existing folder; "" for none. COHORT_TRACE_DIR wins where it is set. Each rank writes one
  /// file into it, `cohort.rank<rank>.<process>.<state>.json`, which a later one replaces.
  std::string folder = {};
  /// A signal on which every rank that gets it writes its trace, by a thread that the library
  /// starts; 0 for none. A handler that the engine has set for it runs as well, before.
  int signal = 0;
};

/// The rings of all groups of a state.
class StateTrace {
 public:
  /// @param rank   In the world.
  /// @param state  The same on all ranks of a state, and of no other.
  StateTrace(TraceOptions options, int rank, std::uint64_t state);
  StateTrace(const StateTrace&) = delete;
  StateTrace& operator=(const StateTrace&) = delete;
  ~StateTrace();

  /// Adds a group.
  void add(std::shared_ptr<FlightRecorder> recorder) {
    const std::lock_guard lock(mutex_);
    recorder->on_failure([this](std::string_view why, bool late) { failed(why, late); });
    recorders_.push_back(std::move(recorder));
  }

  /// Writes a file anew. Any thread. Throws `TransportError` where the system refuses.
  void write(const std::string& path, std::string_view reason, bool late = false) const {
    const std::string text = to_json(reason, late);
    const std::string unfinished = path + ".part";  // readers never see half a file
    UniqueFd file(os::repeat([&] {
      return ::open(unfinished.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    }));
    const auto fail = [&](const char* call) {
      throw TransportError({.call = call, .native_code = errno},
                           fmt::format("the trace {}: {}", path, std::strerror(errno)));
    };
    if (!file) {
      fail("open");
    }
    for (std::size_t done = 0; done < text.size();) {
      const auto wrote =
          os::repeat([&] { return ::write(file.get(), text.data() + done, text.size() - done); });
      if (wrote < 0) {
        fail("write");
      }
      done += static_cast<std::size_t>(wrote);
    }
    file.reset();
    if (std::rename(unfinished.c_str(), path.c_str()) != 0) {
      fail("rename");
    }
  }

  /// Writes into the folder, where there is one.
  void write_into_folder(std::string_view reason, bool late = false) const noexcept {
    if (options_.folder.empty()) {
      return;
    }
    try {
      const std::string path =
          fmt::format("{}/cohort.rank{}.{}.{}.json", options_.folder, rank_, ::getpid(), state_);
      write(path, reason, late);
      log(LogLevel::warning, fmt::format("rank {} has written its last calls to {}", rank_, path));
    } catch (const std::exception& error) {
      log(LogLevel::error, error.what());
    }
  }

  /// The groups' counters, as `prometheus_text` has them.
  [[nodiscard]] std::string counters() const {
    const std::lock_guard lock(mutex_);
    return prometheus_text(recorders_);
  }

  /// What a file holds.
  [[nodiscard]] std::string to_json(std::string_view reason, bool late) const {
    const std::lock_guard lock(mutex_);
    const auto end = TraceClock::now();
    std::string out = fmt::format(
        R"({{"cohort_trace":1,"rank":{},"process":{},"state":{},"written":{},"late":{},"reason":{},"groups":)",
        rank_, ::getpid(), state_, end.ns, late, detail::json_text(reason));
    {
      detail::JsonArray groups(out);
      for (const auto& recorder : recorders_) {
        detail::write_group(groups.next(), *recorder, clock_, end);
      }
    }
    out += "}\n";
    return out;
  }

 private:
  /// What follows the first failure tells less, but for the first time-out.
  void failed(std::string_view why, bool late) noexcept {
    if (late ? !late_.exchange(true) : !failed_.exchange(true) && !late_) {
      write_into_folder(why, late);
    }
  }

  TraceOptions options_;
  int rank_;
  std::uint64_t state_;
  TraceClock clock_;
  std::atomic<bool> failed_{false};
  std::atomic<bool> late_{false};
  mutable std::mutex mutex_;
  std::vector<std::shared_ptr<FlightRecorder>> recorders_;
};

namespace detail {

/// The states of the process, for signals. A handler may do next to nothing, so it wakes a thread.
class TraceSignals {
 public:
  void add(StateTrace& state) {
    const std::lock_guard lock(mutex_);
    states_.push_back(&state);
  }
  void remove(const StateTrace& state) noexcept {
    const std::lock_guard lock(mutex_);
    std::erase(states_, &state);
  }

  /// From now on the signal has all states write. Throws `ConfigError` for what is no signal that
  /// can be caught, `TransportError`.
  void listen(int signal) {
    if (signal < 1 || signal >= NSIG) {
      throw ConfigError(
          fmt::format("TraceOptions.signal: expected 0 or a signal's number, got {}", signal));
    }
    const std::lock_guard lock(mutex_);
    handling_ = this;  // of this module's handler
    if (heard_[static_cast<std::size_t>(signal)]) {
      return;
    }
    if (wake_.load() < 0) {
      start();
    }
    struct sigaction mine {};
    mine.sa_sigaction = on_signal;
    mine.sa_flags = SA_SIGINFO | SA_RESTART;
    sigemptyset(&mine.sa_mask);
    if (::sigaction(signal, nullptr, &before_[static_cast<std::size_t>(signal)]) != 0 ||
        ::sigaction(signal, &mine, nullptr) != 0) {
      throw ConfigError(fmt::format("TraceOptions.signal: {} cannot be caught: {}", signal,
                                    std::strerror(errno)));
    }
    heard_[static_cast<std::size_t>(signal)] = true;
  }

  static TraceSignals& instance() { return process_wide<TraceSignals>("trace signals 1"); }

 private:
  /// Only what signal-safety(7) allows: a write, and the engine's own handler.
  static void on_signal(int signal, siginfo_t* info, void* context) {
    const int error = errno;
    const TraceSignals* const self = handling_.load();
    if (self == nullptr) {
      return;
    }
    const struct sigaction& before = self->before_[static_cast<std::size_t>(signal)];
    if ((before.sa_flags & SA_SIGINFO) != 0) {
      before.sa_sigaction(signal, info, context);
    } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
      before.sa_handler(signal);
    }
    const std::uint64_t one = 1;
    static_cast<void>(!::write(self->wake_.load(), &one, sizeof(one)));
    errno = error;
  }

  void start() {
    const int wake = ::eventfd(0, EFD_CLOEXEC);
    if (wake < 0) {
      throw TransportError({.call = "eventfd", .native_code = errno}, std::strerror(errno));
    }
    wake_ = wake;
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // the thread takes none of the engine's signals
    std::thread([this, wake] {
      std::uint64_t count = 0;
      while (os::repeat([&] { return ::read(wake, &count, sizeof(count)); }) == sizeof(count)) {
        const std::lock_guard lock(mutex_);
        for (const StateTrace* const state : states_) {
          state->write_into_folder("a signal");
        }
      }
    }).detach();
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  inline static std::atomic<const TraceSignals*> handling_{nullptr};

  std::mutex mutex_;
  std::vector<StateTrace*> states_;
  std::array<bool, NSIG> heard_{};
  std::array<struct sigaction, NSIG> before_{};
  std::atomic<int> wake_{-1};
};

}  // namespace detail

inline StateTrace::StateTrace(TraceOptions options, int rank, std::uint64_t state)
    : options_(std::move(options)), rank_(rank), state_(state) {
  if (options_.signal != 0) {
    detail::TraceSignals::instance().listen(options_.signal);
    detail::TraceSignals::instance().add(*this);
  }
}

inline StateTrace::~StateTrace() {
  if (options_.signal != 0) {
    detail::TraceSignals::instance().remove(*this);
  }
  for (const auto& recorder : recorders_) {
    recorder->on_failure({});
  }
}

}  // namespace cohort
