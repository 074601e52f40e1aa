// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/resource.h>
#include <sys/time.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstddef>
#include <fstream>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "chaos/allocations.hpp"
#include "chaos/plan.hpp"

/// \file
/// What comes over the victim of a round.

namespace cohort::chaos {

/// What the victim's engine throws.
class EngineFailure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The fault, as it comes over the victim.
class Trouble {
 public:
  Trouble(const Plan& plan, int rank, std::chrono::milliseconds limit)
      : plan_(plan), victim_(rank == plan.victim), limit_(limit) {
    if (plan.fault == Fault::signals) {
      bombard();
    }
  }

  /// Called at the start of every step on every rank. True where the step's arguments are to be
  /// other ones.
  [[nodiscard]] bool at(Phase phase, int step) const {
    if (!victim_ || phase != plan_.phase || step != plan_.step) {
      return false;
    }
    switch (plan_.fault) {
      case Fault::kill:
        signal_soon(SIGKILL);
        break;
      case Fault::stop:
        signal_soon(SIGSTOP);
        break;
      case Fault::hesitate:
        std::this_thread::sleep_for(limit_ / 3);
        break;
      case Fault::late:
        std::this_thread::sleep_for(limit_ + limit_ / 2);
        break;
      case Fault::throws:
        throw EngineFailure("the engine failed");
      case Fault::arguments:
        return true;
      case Fault::memory:
        allow(RLIMIT_AS, address_space() + (std::size_t{1} << 20));
        break;
      case Fault::descriptors:
        allow(RLIMIT_NOFILE, static_cast<std::size_t>(lowest_free_descriptor()));
        break;
      case Fault::signals:
        break;
      case Fault::allocation:
        allocation_fault() = {.left = plan_.allocations + 1, .again = plan_.allocates_again};
        break;
    }
    return false;
  }

  /// What the system refused is allowed again, as after an operator's help.
  void end() const noexcept {
    const std::lock_guard lock(fate_->mutex);
    fate_->over = true;  // a fault that has not come yet would meet the recovery
    for (const auto resource : {RLIMIT_AS, RLIMIT_NOFILE}) {
      rlimit limits{};
      if (::getrlimit(resource, &limits) == 0) {
        limits.rlim_cur = limits.rlim_max;
        ::setrlimit(resource, &limits);
      }
    }
  }

 private:
  static void bombard() {
    struct sigaction action {};
    action.sa_handler = [](int) {};  // without SA_RESTART: what can be interrupted is
    ::sigaction(SIGALRM, &action, nullptr);
    const itimerval each{.it_interval = {0, 200}, .it_value = {0, 200}};
    ::setitimer(ITIMER_REAL, &each, nullptr);
  }

  void signal_soon(int signal) const {
    std::thread([signal, delay = plan_.delay_us, fate = fate_] {
      std::this_thread::sleep_for(std::chrono::microseconds(delay));
      const std::lock_guard lock(fate->mutex);
      if (!fate->over) {
        ::kill(::getpid(), signal);
      }
    }).detach();
  }

  static void allow(decltype(RLIMIT_AS) resource, std::size_t most) {
    rlimit limits{};
    ::getrlimit(resource, &limits);
    limits.rlim_cur = most;
    ::setrlimit(resource, &limits);
  }

  static std::size_t address_space() {
    std::ifstream file("/proc/self/statm");
    std::size_t pages = 0;
    file >> pages;
    return pages * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  }

  static int lowest_free_descriptor() {
    const int fd = ::dup(STDERR_FILENO);
    ::close(fd);
    return fd;
  }

  struct Fate {
    std::mutex mutex;
    bool over = false;
  };

  Plan plan_;
  bool victim_;
  std::chrono::milliseconds limit_;
  std::shared_ptr<Fate> fate_ = std::make_shared<Fate>();
};

}  // namespace cohort::chaos
