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
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "chaos/machine.hpp"
#include "chaos/plan.hpp"
#include "chaos/rank.hpp"
#include "command_line/command_line.hpp"

/// \file
/// Starts the ranks of a round as processes, watches them, and judges what they report.

namespace cohort::chaos {

using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

/// What a kind of machine changes in a round.
struct Kind {
  MakeMachine make;
  /// Rounds that the machine cannot have become others.
  std::function<Plan(Plan)> adapt = [](Plan plan) { return plan; };
  /// Beyond 1.25 times the limit: what an oversubscribed machine takes to run a rank at all.
  std::chrono::milliseconds slack{};
  /// The same for forming and leaving a state, which are no single wait.
  std::chrono::milliseconds forming_slack{};
  /// Whether a time-out, by its text, was one that cannot know who was missing.
  std::function<bool(const std::string&)> cannot_name = [](const std::string&) { return false; };
};

struct Step {
  std::string phase, name, outcome, text;
  int index = 0;
  double took_ms = 0;
  double queued_ms = 0;  ///< Of that, how long its thread could have run and had no processor.
  std::set<int> named;
};

/// What went wrong in a round.
struct Problem {
  std::string text;
  bool of_time = false;  ///< A machine that has no time for its ranks gives the same.
};

struct Child {
  pid_t pid = -1;
  int from = -1;  ///< What the rank reports.
  int to = -1;    ///< What it is told.
  std::string unread;
  std::vector<Step> steps;
  bool over = false;   ///< Its phases are over, well or not.
  bool ended = false;  ///< It reported its end.
  bool gone = false;   ///< The process has left.
  int status = 0;
  Clock::time_point stopped = Clock::time_point::max();
};

inline std::vector<std::string> fields_of(const std::string& line) {
  std::vector<std::string> fields;
  std::stringstream stream(line);
  for (std::string field; std::getline(stream, field, '\t');) {
    fields.push_back(field);
  }
  return fields;
}

inline void take_line(Child& child, const std::string& line) {
  const auto fields = fields_of(line);
  if (fields.empty()) {
    return;
  }
  if (fields[0] == "over") {
    child.over = true;
  } else if (fields[0] == "end") {
    child.ended = true;
  } else if (fields.size() >= 7) {
    Step step{.phase = fields[1],
              .name = fields[3],
              .outcome = fields[6],
              .text = fields.size() > 8 ? fields[8] : "",
              .index = std::atoi(fields[2].c_str()),
              .took_ms = std::atof(fields[4].c_str()),
              .queued_ms = std::atof(fields[5].c_str()),
              .named = {}};
    if (fields.size() > 7) {
      std::stringstream stream(fields[7]);
      for (std::string rank; std::getline(stream, rank, ',');) {
        step.named.insert(std::atoi(rank.c_str()));
      }
    }
    child.steps.push_back(std::move(step));
  }
}

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
    judge();
    return problems_;
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

  // --- judging -----------------------------------------------------------------------------------

  [[nodiscard]] bool may_fail() const {
    return plan_.fault != Fault::signals && plan_.fault != Fault::hesitate;
  }

  void problem(std::string text, bool of_time = false) {
    problems_.push_back({std::move(text), of_time});
  }

  [[nodiscard]] static bool names(const Step& step) {
    return step.outcome == "TimeoutError" || step.outcome == "SymmetryError";
  }

  /// Whether a rank gave up because of the victim: its error leads there, by way of ranks that gave
  /// up before it. Ranks that blame only one another do not.
  [[nodiscard]] bool leads_to_victim(int rank, std::set<int> passed = {}) const {
    const auto& child = children_[static_cast<std::size_t>(rank)];
    if (rank == plan_.victim || (child.gone && !child.ended)) {
      return true;
    }
    const auto failed = std::find_if(child.steps.begin(), child.steps.end(),
                                     [](const Step& step) { return step.outcome != "ok"; });
    if (failed == child.steps.end()) {
      return false;
    }
    if (!names(*failed) || failed->named.empty() || failed->named == std::set{rank}) {
      return true;  // others judge whether it may name nobody
    }
    passed.insert(rank);
    return std::any_of(failed->named.begin(), failed->named.end(), [&](int named) {
      return named >= 0 && named < plan_.ranks && !passed.contains(named) &&
             leads_to_victim(named, passed);
    });
  }

  /// Ranks that an error may name: the victim, and those that had failed themselves.
  [[nodiscard]] std::set<int> blameable() const {
    std::set<int> ranks{plan_.victim};
    for (std::size_t r = 0; r < children_.size(); ++r) {
      const auto& child = children_[r];
      if (child.gone || std::any_of(child.steps.begin(), child.steps.end(),
                                    [](const Step& s) { return s.outcome != "ok"; })) {
        ranks.insert(static_cast<int>(r));
      }
    }
    return ranks;
  }

  void judge() {
    const auto blame = blameable();
    for (std::size_t r = 0; r < children_.size(); ++r) {
      for (const auto& step : children_[r].steps) {
        judge(static_cast<int>(r), step, blame);
      }
      judge_end(static_cast<int>(r));
    }
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

  void judge(int rank, const Step& step, const std::set<int>& blame) {
    const bool victim = rank == plan_.victim;
    const auto say = [&](std::string_view what, bool of_time = false) {
      problem(fmt::format("rank {}{}, {} {}, {}: {} ({} after {:.0f} ms, {:.0f} of them without a "
                          "processor: {})",
                          rank, victim ? ", the victim" : "", step.phase, step.index, step.name,
                          what, step.outcome, step.took_ms, step.queued_ms, step.text),
              of_time);
    };
    if (step.outcome == "WRONG") {
      return say("a wrong result or an error without a type");
    }
    if (step.name == "recover" && step.outcome != "ok") {
      return say("those that live could not go on", true);
    }
    const bool slow = victim && (plan_.fault == Fault::stop || plan_.fault == Fault::late);
    const bool forms = step.name == "create" || step.name == "recover" || step.name == "shutdown" ||
                       step.name == "destroy";
    const std::chrono::duration<double, std::milli> bound =
        1.25 * limit_ + (forms ? kind_.forming_slack : kind_.slack);
    if (!slow && step.took_ms > bound.count()) {
      say("took too long", true);
    }
    if (step.outcome == "ok") {
      return;
    }
    if (!may_fail()) {
      return say("nothing had failed", true);
    }
    const bool has_no_memory =
        victim && (plan_.fault == Fault::memory || plan_.fault == Fault::allocation);
    if (step.outcome == "bad_alloc" && !has_no_memory) {
      say("not a typed error");
    }
    if (!victim && names(step)) {
      if (step.named.empty() && !kind_.cannot_name(step.text)) {
        say("names nobody");
      }
      for (const int named : step.named) {
        if (!blame.contains(named)) {
          say(fmt::format("blames rank {}, which did nothing wrong", named));
        }
      }
      // Of those that differ, in their arguments or in what they got of an allocation that failed
      // for the victim, any may be the one.
      const bool differ = step.text.find("ranks disagree") != std::string::npos;
      if (plan_.fault != Fault::arguments && !differ && !leads_to_victim(rank)) {
        say("blames ranks that did not give up because of the victim", true);
      }
    }
  }

  void judge_end(int rank) {
    const auto& child = children_[static_cast<std::size_t>(rank)];
    const bool victim = rank == plan_.victim;
    if (WIFSIGNALED(child.status)) {
      if (!(victim && plan_.fault == Fault::kill && WTERMSIG(child.status) == SIGKILL)) {
        problem(fmt::format("rank {} died of signal {}", rank, WTERMSIG(child.status)));
      }
    } else if (const int code = WEXITSTATUS(child.status);
               code != 0 && !(victim && plan_.fault == Fault::throws && code == 3)) {
      problem(fmt::format("rank {} left with status {}", rank, code));
    }
  }

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

/// What every chaos program's help says of its options.
inline constexpr std::string_view kOptionHelp =
    "  --rounds N     of one seed each, 20\n"
    "  --seconds MOST after which none begins\n"
    "  --seed S       of the first round, 1\n"
    "  --ranks MOST   2 to 8, 4\n"
    "  --limit-ms MS  of every wait, 1000\n"
    "  --fault NAME   only rounds with that fault\n"
    "  --phase NAME   only rounds whose fault comes in that phase\n"
    "  --verbose      also what the ranks say\n";

struct Options {
  int rounds = 20;
  int seconds = 0;  ///< No round begins after these; 0 for no such end.
  std::uint64_t seed = 1;
  int ranks = 4;
  int limit_ms = 1000;
  std::string fault;  ///< Only rounds with this one, where not empty.
  std::string phase;
  bool verbose = false;
};

/// @param help  The program's, whose options these are.
inline Options parse(int argc, char** argv, std::string_view help) {
  tools::help_if_asked(argc, argv, help);
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view name = argv[i];
    const auto text = [&]() -> const char* {
      if (++i >= argc) {
        tools::refuse(std::string(name) + ": expected a value");
      }
      return argv[i];
    };
    const auto value = [&] { return std::atoll(text()); };
    if (name == "--rounds") {
      options.rounds = static_cast<int>(value());
    } else if (name == "--seconds") {
      options.seconds = static_cast<int>(value());
    } else if (name == "--seed") {
      options.seed = static_cast<std::uint64_t>(value());
    } else if (name == "--ranks") {
      options.ranks = static_cast<int>(value());
    } else if (name == "--limit-ms") {
      options.limit_ms = static_cast<int>(value());
    } else if (name == "--fault") {
      options.fault = text();
    } else if (name == "--phase") {
      options.phase = text();
    } else if (name == "--verbose") {
      options.verbose = true;
    } else {
      tools::refuse(tools::no_such_option(name, help));
    }
  }
  if (options.rounds < 1 || options.ranks < 2 || options.ranks > 8 || options.limit_ms < 1000) {
    tools::refuse("expected 1 round or more, 2 to 8 ranks, a limit of 1000 ms or more");
  }
  return options;
}

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
