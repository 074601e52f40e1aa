// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>
#include <sys/wait.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "chaos/machine.hpp"
#include "chaos/plan.hpp"
#include "chaos/reports.hpp"

/// \file
/// Whether the ranks of a round did right, by what they told and how their processes ended.

namespace cohort::chaos {

/// What went wrong in a round.
struct Problem {
  std::string text;
  bool of_time = false;  ///< A machine that has no time for its ranks gives the same.
};

/// Of one round.
class Judge {
 public:
  /// @param children  By rank; all have ended.
  Judge(const Plan& plan, const Kind& kind, std::chrono::milliseconds limit,
        std::span<const Child> children)
      : plan_(plan), kind_(kind), limit_(limit), children_(children) {}

  /// What went wrong; empty where nothing did.
  [[nodiscard]] std::vector<Problem> problems() {
    problems_.clear();
    const auto blame = blameable();
    for (std::size_t r = 0; r < children_.size(); ++r) {
      for (const auto& step : children_[r].steps) {
        judge(static_cast<int>(r), step, blame);
      }
      judge_end(static_cast<int>(r));
    }
    return std::move(problems_);
  }

 private:
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

  const Plan& plan_;
  const Kind& kind_;
  std::chrono::milliseconds limit_;
  std::span<const Child> children_;
  std::vector<Problem> problems_;
};

}  // namespace cohort::chaos
