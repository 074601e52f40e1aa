// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <execinfo.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "chaos/judge.hpp"
#include "chaos/machine.hpp"
#include "chaos/options.hpp"
#include "chaos/plan.hpp"
#include "chaos/rank.hpp"
#include "chaos/reports.hpp"

/// \file
/// Starts the ranks of a round as processes, watches them, and has judged what they report.

namespace cohort::chaos {

using namespace std::chrono_literals;

class Round {
 public:
  Round(const Plan& plan, const Kind& kind, std::chrono::milliseconds limit, bool verbose)
      : plan_(plan),
        kind_(kind),
        limit_(limit),
        verbose_(verbose),
        job_(fmt::format("cohort-chaos-{}-{}", ::getpid(), plan.seed)),
        shared_before_(shared_files()) {}

  /// What went wrong; empty where nothing did.
  std::vector<Problem> run() {
    for (int rank = 0; rank < plan_.ranks; ++rank) {
      start(rank);
    }
    const auto deadline = Clock::now() + 30 * limit_ + 30s;
    wait_until(deadline, "the phases", [](const Child& c) { return c.over || c.gone; });
    tell_survivors();
    wait_until(deadline, "recovery", [](const Child& c) { return c.gone; });
    for (auto& child : children_) {
      if (!child.gone) {
        ::kill(child.pid, SIGKILL);
        ::waitpid(child.pid, &child.status, 0);
      }
      ::close(child.from);
      ::close(child.to);
    }
    std::ranges::move(Judge(plan_, kind_, limit_, children_).problems(),
                      std::back_inserter(problems_));
    find_what_is_left();
    return std::move(problems_);
  }

  /// Whether the machine kept a rank waiting for a processor as long as a wait may last beyond its
  /// limit, so that nothing follows from what came too late.
  [[nodiscard]] bool starved() const {
    return std::any_of(children_.begin(), children_.end(), [&](const Child& child) {
      double queued = 0;
      for (const auto& step : child.steps) {
        queued += step.queued_ms;
      }
      return queued > std::chrono::duration<double, std::milli>(kind_.slack).count();
    });
  }

 private:
  /// A rank that dies of itself tells where, on the standard error.
  static void say_where_it_crashes() {
    static std::array<void*, 64> frames;
    static_cast<void>(::backtrace(frames.data(), 1));  // loads what the handler must not load
    struct sigaction action {};
    action.sa_handler = [](int signal) {
      static_cast<void>(std::signal(signal, SIG_DFL));
      ::backtrace_symbols_fd(frames.data(),
                             ::backtrace(frames.data(), static_cast<int>(frames.size())),
                             STDERR_FILENO);
      static_cast<void>(::raise(signal));
    };
    for (const int signal : {SIGSEGV, SIGBUS, SIGABRT}) {
      ::sigaction(signal, &action, nullptr);
    }
  }

  void start(int rank) {
    int up[2];
    int down[2];
    if (::pipe2(up, O_CLOEXEC) != 0 || ::pipe2(down, O_CLOEXEC) != 0) {
      std::perror("pipe2");
      std::exit(2);
    }
    const pid_t supervisor = ::getpid();
    std::fflush(nullptr);
    const pid_t pid = ::fork();
    if (pid == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (::getppid() != supervisor) {
        std::_Exit(EXIT_FAILURE);
      }
      if (!verbose_) {
        set_log_sink([](LogLevel, std::string_view) {});
      }
      say_where_it_crashes();
      int status = 4;
      try {
        status = Rank(kind_.make, plan_, rank, job_, limit_, up[1], down[0]).run();
      } catch (const EngineFailure&) {
        status = 3;
      } catch (const std::exception& error) {
        std::fprintf(stderr, "rank %d: %s\n", rank, error.what());
      }
      std::exit(status);
    }
    ::close(up[1]);
    ::close(down[0]);
    children_.push_back({.pid = pid, .from = up[0], .to = down[1], .unread = {}, .steps = {}});
  }

  template <class Done>
  void wait_until(Clock::time_point deadline, std::string_view what, const Done& done) {
    while (!std::all_of(children_.begin(), children_.end(), done)) {
      read_reports(20);
      for (auto& child : children_) {
        observe(child);
      }
      if (Clock::now() > deadline) {
        for (std::size_t r = 0; r < children_.size(); ++r) {
          if (!done(children_[r])) {
            problem(fmt::format(
                "rank {} hangs in {}, after {}", r, what,
                children_[r].steps.empty() ? "nothing" : children_[r].steps.back().name));
          }
        }
        return;
      }
    }
  }

  void read_reports(int wait_ms) {
    std::vector<pollfd> entries;
    for (const auto& child : children_) {
      entries.push_back({.fd = child.gone ? -1 : child.from, .events = POLLIN, .revents = 0});
    }
    ::poll(entries.data(), entries.size(), wait_ms);
    for (std::size_t r = 0; r < entries.size(); ++r) {
      if ((entries[r].revents & POLLIN) != 0) {
        read_some(children_[r]);
      }
    }
  }

  void read_some(Child& child) {
    char chunk[65536];
    const auto got = ::read(child.from, chunk, sizeof(chunk));
    if (got <= 0) {
      return;
    }
    child.unread.append(chunk, static_cast<std::size_t>(got));
    for (std::size_t end = 0; (end = child.unread.find('\n')) != std::string::npos;) {
      const std::string line = child.unread.substr(0, end);
      child.unread.erase(0, end + 1);
      if (verbose_) {
        std::printf("  rank %td: %s\n", &child - children_.data(), line.c_str());
      }
      take_line(child, line);
    }
  }

  void observe(Child& child) {
    if (child.gone) {
      return;
    }
    int status = 0;
    if (::waitpid(child.pid, &status, WNOHANG | WUNTRACED) == child.pid) {
      if (WIFSTOPPED(status)) {
        child.stopped = Clock::now();
      } else {
        while (::poll(std::array{pollfd{child.from, POLLIN, 0}}.data(), 1, 0) > 0) {
          const auto before = child.unread.size() + child.steps.size();
          read_some(child);
          if (child.unread.size() + child.steps.size() == before) {
            break;
          }
        }
        child.gone = true;
        child.status = status;
      }
    }
    if (child.stopped != Clock::time_point::max() && Clock::now() > child.stopped + 2 * limit_) {
      ::kill(child.pid, SIGCONT);
      child.stopped = Clock::time_point::max();
    }
  }

  void tell_survivors() {
    std::string text = "survivors";
    for (std::size_t r = 0; r < children_.size(); ++r) {
      if (!children_[r].gone) {
        text += fmt::format(" {}", r);
        survivors_.push_back(static_cast<int>(r));
      }
    }
    text += '\n';
    for (const int r : survivors_) {
      const auto& child = children_[static_cast<std::size_t>(r)];
      if (::write(child.to, text.data(), text.size()) < 0) {
        std::perror("write");
      }
    }
  }

  void find_what_is_left() {
    for (const auto& left : shared_files()) {
      if (!shared_before_.contains(left)) {
        problem("left behind: " + left);
      }
    }
    std::ifstream sockets("/proc/net/unix");
    for (std::string line; std::getline(sockets, line);) {
      if (line.find(job_) != std::string::npos) {
        problem("left behind: " + line);
      }
    }
  }

  void problem(std::string text) { problems_.push_back({std::move(text)}); }

  static std::set<std::string> shared_files() {
    std::set<std::string> names;
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator("/dev/shm", error)) {
      if (entry.path().filename().string().find("cohort") != std::string::npos) {
        names.insert(entry.path().string());
      }
    }
    return names;
  }

  Plan plan_;
  Kind kind_;
  std::chrono::milliseconds limit_;
  bool verbose_;
  std::string job_;
  std::set<std::string> shared_before_;
  std::vector<Child> children_;
  std::vector<int> survivors_;
  std::vector<Problem> problems_;
};

/// The next round that the options let through; `seed` goes on behind it.
inline Plan next_plan(const Options& options, const Kind& kind, std::uint64_t& seed) {
  constexpr int kTries = 10'000;
  for (int i = 0; i < kTries; ++i) {
    const Plan plan = kind.adapt(plan_of(seed++, options.ranks));
    if ((options.fault.empty() || options.fault == to_string(plan.fault)) &&
        (options.phase.empty() || options.phase == to_string(plan.phase))) {
      return plan;
    }
  }
  std::fprintf(stderr, "no round with this fault and phase\n");
  std::exit(2);
}

/// Runs a round, and again where it only shows that the machine had no time for its ranks. None:
/// it never had.
inline std::optional<std::vector<Problem>> run_round(const Plan& plan, const Kind& kind,
                                                     const Options& options, int& repeated) {
  constexpr int kAttempts = 3;
  for (int attempt = 1;; ++attempt) {
    Round round(plan, kind, std::chrono::milliseconds(options.limit_ms), options.verbose);
    auto problems = round.run();
    const bool all_of_time = std::all_of(problems.begin(), problems.end(),
                                         [](const Problem& one) { return one.of_time; });
    if (problems.empty() || !all_of_time || !round.starved()) {
      return problems;
    }
    if (attempt == kAttempts) {
      return std::nullopt;
    }
    std::printf("round %llu: once more, its ranks had no processor\n",
                static_cast<unsigned long long>(plan.seed));
    ++repeated;
  }
}

inline int run(const Options& options, const Kind& kind) {
  int passed = 0;
  int failed = 0;
  int repeated = 0;
  int not_judged = 0;
  std::uint64_t seed = options.seed;
  const auto end = options.seconds > 0 ? Clock::now() + std::chrono::seconds(options.seconds)
                                       : Clock::time_point::max();
  for (int i = 0; i < options.rounds && Clock::now() < end; ++i) {
    const Plan plan = next_plan(options, kind, seed);
    const std::string what = fmt::format(
        "round {}: {} ranks, tp {} pp {} dcp {}, {}{}{}; {} in {} of rank {}", plan.seed,
        plan.ranks, plan.tp, plan.pp, plan.dcp, plan.symmetric ? "windows" : "no windows",
        plan.map_peers ? "" : ", apart", plan.small_slots ? ", small slots" : "",
        to_string(plan.fault), to_string(plan.phase), plan.victim);
    if (options.verbose) {
      std::printf("%s\n", what.c_str());
    }
    const auto problems = run_round(plan, kind, options, repeated);
    if (!problems) {
      ++not_judged;
      std::printf("cohort-skip: round %llu: its ranks had no processor\n",
                  static_cast<unsigned long long>(plan.seed));
      continue;
    }
    ++(problems->empty() ? passed : failed);
    if (!problems->empty()) {
      std::printf("%s\n", what.c_str());
      for (const auto& problem : *problems) {
        std::printf("  %s\n", problem.text.c_str());
      }
    }
    std::fflush(stdout);
  }
  std::printf("%d rounds, %d repeated, %d not judged\n", passed + failed + not_judged, repeated,
              not_judged);
  std::printf("cohort-test: passed=%d failed=%d skipped=%d\n", passed, failed, not_judged);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace cohort::chaos
