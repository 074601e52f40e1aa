// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cohort/error.hpp"
#include "cohort/flight_recorder.hpp"
#include "cohort/log.hpp"
#include "cohort/machine.hpp"
#include "cohort/owner_process.hpp"
#include "cohort/system_calls.hpp"
#include "cohort/trace_file.hpp"
#include "cohort/trace_signals.hpp"

/// \file
/// When a rank's last calls are written, and where: at the first call that fails, on a signal that
/// the engine chooses, and on demand. Without a folder the first two write nothing.

namespace cohort {

/// How a `ParallelState` writes its traces.
struct TraceOptions {
  /// A folder, made where it does not exist; "" for none. COHORT_TRACE_DIR wins where it is set.
  /// Each rank writes one file of each state into it, `cohort.rank<rank>.<run>.json`, which a later
  /// one replaces. The run is a random number that the state's ranks share.
  std::string folder = {};
  /// A signal on which every rank that gets it writes its trace, by a thread that the library
  /// starts; 0 for none. Whatever else the signal does it still does: a handler that the engine has
  /// set runs as well, and one that ends a process, such as SIGSEGV or SIGTERM, ends it once the
  /// trace is written, or could not be in 3 s. Only SIGUSR1, SIGUSR2 and the real-time signals do
  /// not end a process that hears them. The state gives the signal back when it goes.
  int signal = 0;
};

/// What the traces of one state have in common.
struct TraceRun {
  std::uint64_t id = 0;         ///< Random; 0 where the ranks have not agreed on it yet.
  std::vector<int> hosts = {};  ///< By rank in the world: equal numbers are one machine.
};

namespace detail {

/// Has no write of this thread end the process where a limit on the size of files is reached.
class NoFileSizeSignal {
 public:
  NoFileSizeSignal() noexcept {
    sigset_t pending;
    sigemptyset(&only_);
    sigaddset(&only_, SIGXFSZ);
    sigpending(&pending);
    was_pending_ = sigismember(&pending, SIGXFSZ) == 1;
    pthread_sigmask(SIG_BLOCK, &only_, &before_);
  }
  NoFileSizeSignal(const NoFileSizeSignal&) = delete;
  NoFileSizeSignal& operator=(const NoFileSizeSignal&) = delete;
  ~NoFileSizeSignal() {
    const timespec now{};
    if (!was_pending_) {
      static_cast<void>(::sigtimedwait(&only_, nullptr, &now));
    }
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }

 private:
  sigset_t only_{};
  sigset_t before_{};
  bool was_pending_ = false;
};

/// A file beside `path` that nobody else writes, whichever processes write there at once, with its
/// name: "PATH.PROCESS-NUMBER.part". Errno where it is not open.
inline UniqueFd open_unfinished(const std::string& path, std::string& name) {
  static std::atomic<unsigned> files{0};
  while (true) {  // another container's process may have this one's number
    name = fmt::format("{}.{}-{}.part", path, ::getpid(), files.fetch_add(1));
    UniqueFd file = os::open_file(name, O_WRONLY | O_CREAT | O_EXCL, 0644);
    if (file || errno != EEXIST) {
      return file;
    }
  }
}

/// Writes a file anew: who reads it sees the old one or all of the new, of several that are written
/// at once the last, and nothing is left of what could not be finished. Throws `TransportError`
/// where the system refuses.
inline void replace_file(const std::string& path, std::string_view text) {
  const NoFileSizeSignal quiet;
  std::string unfinished;
  const auto refused = [&](const char* call, int code) {
    ::unlink(unfinished.c_str());
    throw TransportError({.call = call, .native_code = code},
                         fmt::format("the trace {}: {}", path, os::error_text(call, code)));
  };
  UniqueFd file = open_unfinished(path, unfinished);
  if (!file) {
    refused("open", errno);
  }
  for (std::size_t done = 0; done < text.size();) {
    const auto wrote =
        os::repeat([&] { return ::write(file.get(), text.data() + done, text.size() - done); });
    if (wrote < 0) {
      refused("write", errno);
    }
    done += static_cast<std::size_t>(wrote);
  }
  if (const int code = file.close(); code != 0) {
    refused("close", code);
  }
  if (std::rename(unfinished.c_str(), path.c_str()) != 0) {
    refused("rename", errno);
  }
}

/// Makes a folder, and those that it lies in, where they do not exist. Throws `ConfigError`.
inline void make_folder(const std::string& path) {
  int refused = 0;
  for (std::size_t end = 0; end != std::string::npos;) {
    end = path.find('/', end + 1);
    refused = ::mkdir(path.substr(0, end).c_str(), 0777) == 0 ? 0 : errno;
  }
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0 || !S_ISDIR(status.st_mode)) {
    throw ConfigError(
        fmt::format("TraceOptions.folder: expected a folder, or a place where one can be made, got "
                    "{}: {}",
                    path, std::strerror(refused)));
  }
}

}  // namespace detail

/// The rings of all groups of a state.
class StateTrace final : private detail::SignalListener {
 public:
  /// @param rank   In the world, of `ranks`.
  /// @param state  The same on all ranks of a state.
  /// Throws `ConfigError` for a folder that is none and cannot be made, and as `TraceSignals::add`.
  StateTrace(TraceOptions options, int rank, int ranks)
      : options_(std::move(options)), rank_(rank), ranks_(ranks) {
    if (!options_.folder.empty()) {
      detail::make_folder(options_.folder);
    }
    if (options_.signal != 0) {
      detail::TraceSignals::instance().add(options_.signal, *this);
    }
  }
  StateTrace(const StateTrace&) = delete;
  StateTrace& operator=(const StateTrace&) = delete;
  ~StateTrace() override {
    if (options_.signal != 0 && owner_.is_here()) {
      detail::TraceSignals::instance().remove(options_.signal, *this);
    }
    for (const auto& recorder : recorders_) {
      recorder->on_failure({});
    }
  }

  /// What the ranks have agreed on.
  void belongs_to(TraceRun run) {
    const std::lock_guard lock(mutex_);
    run_ = std::move(run);
  }

  /// Adds a group.
  void add(const std::shared_ptr<FlightRecorder>& recorder) {
    {
      const std::lock_guard lock(mutex_);
      recorders_.push_back(recorder);
    }
    recorder->on_failure([this](const FlightRecorder& group, const TraceFailure& failure) {
      failed(group, failure);
    });
  }
  /// Leaves out a group from now on.
  void remove(FlightRecorder& recorder) noexcept {
    recorder.on_failure({});
    const std::lock_guard lock(mutex_);
    std::erase_if(recorders_, [&recorder](const auto& one) { return one.get() == &recorder; });
  }

  /// Writes a file anew. Any thread. Throws `TransportError` where the system refuses.
  void write(const std::string& path, std::string_view reason, bool late = false) const {
    const std::lock_guard lock(writing_);
    detail::replace_file(path, to_json(reason, late));
  }

  /// Writes into the folder, where there is one.
  void write_into_folder(std::string_view reason, bool late = false) const noexcept {
    if (options_.folder.empty() || !owner_.is_here()) {
      return;
    }
    try {
      const std::string path = file_name();
      write(path, reason, late);
      log(LogLevel::warning, fmt::format("rank {} has written its last calls to {}", rank_, path));
    } catch (const std::exception& error) {
      log(LogLevel::error, error.what());
      say_calls();
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
        R"({{"cohort_trace":3,"run":"{:016x}","rank":{},"ranks":{},"hosts":[{}],"machine":{},)"
        R"("process":{},"written":{},"late":{},"reason":{},"groups":)",
        run_.id, rank_, ranks_, detail::joined(run_.hosts, ","), detail::json_text(machine_),
        ::getpid(), end.ns, late, detail::json_text(reason));
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
  // detail::SignalListener
  void heard() noexcept override { write_into_folder("a signal"); }

  /// What follows the first failure tells less, but for the first time-out. When the group that
  /// failed has ended calls since, that failure is over.
  void failed(const FlightRecorder& group, const TraceFailure& failure) noexcept {
    {
      const std::lock_guard lock(incident_mutex_);
      if (incident_.group == &group && failure.ended > incident_.ended) {
        incident_ = {};
      }
      if (incident_.group != nullptr && (incident_.late || !failure.late)) {
        return;
      }
      incident_ = {.group = &group, .ended = failure.ended, .late = failure.late};
    }
    write_into_folder(failure.why, failure.late);
  }

  [[nodiscard]] std::string file_name() const {
    const std::lock_guard lock(mutex_);
    return run_.id != 0
               ? fmt::format("{}/cohort.rank{}.{:016x}.json", options_.folder, rank_, run_.id)
               : fmt::format("{}/cohort.rank{}.forming.{}.json", options_.folder, rank_,
                             ::getpid());
  }

  /// Where no file could be written, what matters most of it.
  void say_calls() const noexcept try {
    const std::lock_guard lock(mutex_);
    for (const auto& recorder : recorders_) {
      if (const std::string open = recorder->open_call(); !open.empty()) {
        log(LogLevel::error,
            fmt::format("rank {} is in {} of group {}", rank_, open, recorder->group()));
      }
      if (const std::string behind = recorder->behind(); !behind.empty()) {
        log(LogLevel::error, fmt::format("group {}: {}", recorder->group(), behind));
      }
    }
  } catch (const std::exception& error) {
    log(LogLevel::error, error.what());
  }

  /// The failure for which the file was written.
  struct Incident {
    const FlightRecorder* group = nullptr;  ///< Null for none.
    std::uint64_t ended = 0;                ///< Calls of the group, then.
    bool late = false;                      ///< A time-out.
  };

  TraceOptions options_;
  int rank_;
  int ranks_;
  OwnerProcess owner_;
  std::string machine_ = boot_id();
  TraceClock clock_;
  std::mutex incident_mutex_;
  Incident incident_;
  mutable std::mutex writing_;  // one file at a time
  mutable std::mutex mutex_;    // of what follows
  TraceRun run_;
  std::vector<std::shared_ptr<FlightRecorder>> recorders_;
};

}  // namespace cohort
