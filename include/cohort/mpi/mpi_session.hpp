// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>
#include <mpi.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cohort/control_plane.hpp"
#include "cohort/error.hpp"
#include "cohort/fixed_text.hpp"
#include "cohort/launcher.hpp"
#include "cohort/log.hpp"
#include "cohort/machine.hpp"
#include "cohort/mpi/mpi_control_plane.hpp"
#include "cohort/owner_process.hpp"
#include "cohort/process_state.hpp"

/// \file
/// Start and end of MPI as an object, and the control plane over its ranks.

namespace cohort {

/// How a session starts.
struct MpiSessionOptions {
  /// The level asked of MPI. Cohort calls MPI from the threads that call Cohort and starts none
  /// that does, so `MPI_THREAD_FUNNELED` serves an engine with one such thread.
  int thread_level = MPI_THREAD_FUNNELED;
  /// Time limit of every wait, that for the other ranks at both ends of the session included.
  std::chrono::milliseconds limit = kDefaultTimeLimit;
  /// The ranks that form the world. `MPI_COMM_SELF`: this process is alone, whoever started it.
  MPI_Comm ranks = MPI_COMM_WORLD;
};

namespace detail {

inline void abort_mpi() noexcept {
  std::fflush(nullptr);  // MPI_Abort leaves by _exit
  MPI_Abort(MPI_COMM_WORLD, EXIT_FAILURE);
}

/// The process ends by `MPI_Abort` when it exits; a forked child does not.
struct MpiExit {
  OwnerProcess owner;
  int failed = std::atexit([] {
    if (of_process().owner.is_here() && mpi_is_up()) {
      abort_mpi();
    }
  });

  static MpiExit& of_process() { return process_wide<MpiExit>("MPI exit 1"); }
};

/// Ends the process by `MPI_Abort` when it exits. Not at once: an exception that is in flight still
/// reaches the handler that reports it.
inline void abort_mpi_at_exit() noexcept {
  if (MpiExit::of_process().failed != 0) {
    abort_mpi();
  }
}

[[nodiscard]] constexpr std::string_view thread_level_name(int level) noexcept {
  switch (level) {
    case MPI_THREAD_SINGLE:
      return "MPI_THREAD_SINGLE";
    case MPI_THREAD_FUNNELED:
      return "MPI_THREAD_FUNNELED";
    case MPI_THREAD_SERIALIZED:
      return "MPI_THREAD_SERIALIZED";
    case MPI_THREAD_MULTIPLE:
      return "MPI_THREAD_MULTIPLE";
    default:
      return "an unknown level";
  }
}

/// Why MPI's one rank is not what the launcher started, or "": with the launcher of another MPI
/// every process is alone, and each would give an answer of its own.
[[nodiscard]] inline std::string lone_rank(const std::optional<LauncherSize>& launcher) {
  int ranks = 1;
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  if (ranks > 1 || !launcher || launcher->size <= 1) {
    return "";
  }
  return fmt::format(
      "MpiSession: the launcher started {} ranks ({}), MPI has 1: start the program by the "
      "launcher "
      "of the MPI that it is linked with, or let MpiSessionOptions::ranks be MPI_COMM_SELF where "
      "each process is to be alone",
      launcher->size, launcher->variable);
}

/// A rank's process, as the others of its machine can see whether it is there.
struct RankProcess {
  std::array<char, 40> machine{};   ///< The kernel's boot id.
  std::uint64_t pid_namespace = 0;  ///< 0 where unknown.
  std::uint64_t start_time = 0;     ///< In ticks since the boot.
  std::int64_t number = 0;

  [[nodiscard]] static RankProcess own() {
    RankProcess process{.pid_namespace = cohort::pid_namespace(),
                        .start_time = process_start_time("self"),
                        .number = ::getpid()};
    copy_text(boot_id(), process.machine);
    return process;
  }
  /// Whether it is known to have ended, seen from a process of `here`.
  [[nodiscard]] bool is_gone(const RankProcess& here) const {
    return machine[0] != '\0' && machine == here.machine && pid_namespace != 0 &&
           pid_namespace == here.pid_namespace && process_ended(number, start_time);
  }
};

/// Initialises MPI unless the engine has, and then also finalises it.
class MpiRuntime {
 public:
  MpiRuntime(int* argc, char*** argv, const MpiSessionOptions& options) {
    int initialized = 0;
    int finalized = 0;
    MPI_Initialized(&initialized);
    MPI_Finalized(&finalized);
    if (finalized != 0) {
      throw UsageError("MpiSession: MPI_Finalize was called before, and MPI starts only once");
    }
    // Before MPI starts: an MPI without launcher may set some of the variables for itself.
    const auto launcher = launcher_size();
    int provided = MPI_THREAD_SINGLE;
    if (initialized == 0) {
      mpi_check(MPI_Init_thread(argc, argv, options.thread_level, &provided), "MPI_Init_thread");
      owned_ = true;
    } else {
      mpi_check(MPI_Query_thread(&provided), "MPI_Query_thread");
    }
    if (provided < options.thread_level) {
      refuse(fmt::format("MpiSession thread_level: expected MPI to provide {}, {} has {}",
                         thread_level_name(options.thread_level),
                         owned_ ? "this library" : "the engine's MPI_Init",
                         thread_level_name(provided)));
    }
    if (options.ranks != MPI_COMM_SELF) {
      if (const auto why = lone_rank(launcher); !why.empty()) {
        refuse(why);
      }
    }
  }
  MpiRuntime(const MpiRuntime&) = delete;
  MpiRuntime& operator=(const MpiRuntime&) = delete;

  /// The destructor of a session whose constructor failed comes here without `finish`.
  ~MpiRuntime() { leave(false); }

  [[nodiscard]] bool owned() const noexcept { return owned_; }

  /// `orderly`: every rank is known to come too. `MPI_Finalize` would otherwise wait for good.
  void leave(bool orderly) noexcept {
    if (left_ || !owner_.is_here()) {
      return;
    }
    left_ = true;
    if (!orderly) {
      log(LogLevel::error,
          owned_ ? "MPI cannot be finalised in order; this process will leave by MPI_Abort"
                 : "MPI_Finalize would wait for good: leave this process by MPI_Abort");
      if (owned_) {
        abort_mpi_at_exit();
      }
    } else if (owned_ && mpi_is_up()) {
      MPI_Finalize();
    }
  }

 private:
  [[noreturn]] void refuse(const std::string& why) const {
    if (owned_) {
      MPI_Finalize();  // nothing has been sent, so every rank gets here
    }
    throw ConfigError(why);
  }

  OwnerProcess owner_;
  bool owned_ = false;
  bool left_ = false;
};

}  // namespace detail

/// Owns MPI for the time of its life, and the control plane over its ranks. If the engine has
/// initialised MPI, the session leaves it running at its end.
///
/// The session ends in order when every rank comes to its end within the time limit and no message
/// is under way any more, whatever calls have failed before: then `MPI_Finalize`. Where a rank does
/// not come, or its process is seen to be gone, and when an exception leaves its scope, the process
/// leaves by `MPI_Abort` at its exit, which ends the whole job: `MPI_Finalize` would wait for ranks
/// that never come. Where the engine owns MPI, that is left to the engine, as `close` tells it. In
/// a forked child the session does nothing: MPI is the parent's.
///
/// Create it in the main thread, before any group; destroy it after the last.
class MpiSession {
 public:
  /// Collective over all ranks of MPI, and over `options.ranks`.
  /// Throws `ConfigError` where MPI gives a lower thread level, or has one rank where the launcher
  /// started several (`launcher_size`), `UsageError` after `MPI_Finalize`,
  /// `TimeoutError` naming ranks that do not come, `TransportError`.
  MpiSession(int& argc, char**& argv, const MpiSessionOptions& options = {})
      : MpiSession(&argc, &argv, options) {}
  /// Without the program's arguments.
  explicit MpiSession(const MpiSessionOptions& options = {})
      : MpiSession(nullptr, nullptr, options) {}

  MpiSession(const MpiSession&) = delete;
  MpiSession& operator=(const MpiSession&) = delete;

  ~MpiSession() {
    if (std::uncaught_exceptions() > exceptions_) {
      forsake();
    }
    static_cast<void>(close());
  }

  /// Collective. Ends the session, as its destructor does otherwise: no call may follow. Whether it
  /// ended in order, so that `MPI_Finalize` returns, which a session that owns MPI has called then.
  bool close() noexcept {
    if (!owner_.is_here() || std::exchange(closed_, true)) {
      return in_order_;
    }
    in_order_ = !forsaken_ && say_goodbye() && world_.messenger().close(true);
    if (!in_order_) {
      world_.messenger().abandon();
    }
    runtime_.leave(in_order_);
    return in_order_;
  }

  /// Local. Has the session end by `MPI_Abort`, without waiting for others: this rank has failed.
  void forsake() noexcept { forsaken_ = true; }

  /// All ranks.
  [[nodiscard]] ControlPlane& world() noexcept { return world_; }

  /// This rank among those that share memory with it (`MPI_COMM_TYPE_SHARED`), in rank order: the
  /// usual choice of a device.
  [[nodiscard]] int local_rank() const noexcept { return local_rank_; }
  /// Ranks of this machine.
  [[nodiscard]] int local_size() const noexcept { return local_size_; }

  /// Whether the session initialised MPI.
  [[nodiscard]] bool owns_mpi() const noexcept { return runtime_.owned(); }

 private:
  MpiSession(int* argc, char*** argv, const MpiSessionOptions& options)
      : runtime_(argc, argv, options), world_(options.ranks, options.limit) {
    // Names who is missing, and keeps the next call from waiting for them.
    const auto own = detail::RankProcess::own();
    for (const Bytes& bytes : world_.all_gather(std::as_bytes(std::span(&own, 1)))) {
      processes_.emplace_back();
      if (bytes.size() == sizeof(own)) {
        std::memcpy(&processes_.back(), bytes.data(), sizeof(own));
      }
    }
    const MPI_Comm comm = world_.messenger().communicator();
    MPI_Comm node = MPI_COMM_NULL;
    detail::mpi_check(
        MPI_Comm_split_type(comm, MPI_COMM_TYPE_SHARED, world_.rank(), MPI_INFO_NULL, &node),
        "MPI_Comm_split_type", world_.rank());
    MPI_Comm_rank(node, &local_rank_);
    MPI_Comm_size(node, &local_size_);
    MPI_Comm_free(&node);
  }

  /// Proves that every rank has come to its end, in a group of its own: the world's own calls may
  /// be out of step after an error that the program has handled.
  bool say_goodbye() noexcept {
    constexpr const char* kName = "end of the MPI session";
    try {
      const detail::RankProcess& own = processes_[static_cast<std::size_t>(world_.rank())];
      for (std::size_t r = 0; r < processes_.size(); ++r) {
        if (processes_[r].is_gone(own)) {
          log(LogLevel::error, "{}: rank {} did not arrive: its process is gone", kName, r);
          return false;
        }
      }
      std::vector<int> all(static_cast<std::size_t>(world_.size()));
      std::iota(all.begin(), all.end(), 0);
      world_.subgroup(all, ~std::uint64_t{0}, kName)->barrier();
      return true;
    } catch (const std::exception& error) {
      log(LogLevel::error, error.what());
      return false;
    }
  }

  OwnerProcess owner_;
  int exceptions_ = std::uncaught_exceptions();
  detail::MpiRuntime runtime_;
  MpiControlPlane world_;
  int local_rank_ = 0;
  int local_size_ = 1;
  std::vector<detail::RankProcess> processes_;  // by rank
  bool forsaken_ = false;
  bool closed_ = false;
  bool in_order_ = false;
};

}  // namespace cohort
