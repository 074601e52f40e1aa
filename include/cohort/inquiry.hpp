// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "cohort/give_up.hpp"
#include "cohort/messenger.hpp"

/// \file
/// What a rank asks, whose wait for others nears its end: whether they wait themselves, and for
/// whom. Nothing is said unasked, so nothing that was said grows stale.

namespace cohort::detail {

/// Who has answered what. Each rank has one question at a time, and gets the next once it has
/// answered, so what it says is what it does now. Who does not answer is in no wait: it is dead or
/// stopped, or computes. Pure.
class Inquiry {
 public:
  /// @param patience  How long a rank has to answer. An eighth of it later it is asked again.
  Inquiry(int self, Clock::duration patience) : self_(self), patience_(patience) {}

  /// Whom to ask now, of `missing` and of those for whom these wait, in the order in which they are
  /// found.
  [[nodiscard]] std::vector<int> whom_to_ask(const std::vector<int>& missing, Deadline now) {
    std::vector<int> due;
    for (const int r : chain(missing)) {
      const auto [found, is_new] = asked_.try_emplace(r);
      Asked& asked = found->second;
      if (asked.may_be_asked_at <= now) {
        if (is_new || !asked.waits_for.empty()) {  // who was in no wait has the rest of its time
          asked.at = now;
        }
        asked.may_be_asked_at = Deadline::max();
        asked.is_open = true;
        due.push_back(r);
      }
    }
    return due;
  }

  /// The answer of a rank that was asked: for whom it waits, or, empty, that it does so no more.
  /// @param gave_up  It does so no more, because they did not come: it answers nothing further.
  void hear(int from, std::vector<int> waits_for, Deadline now, bool gave_up = false) {
    Asked& asked = asked_[from];
    if (waits_for.empty() && !asked.waits_for.empty()) {
      asked.at = now;  // it may be about to wait anew
    }
    asked.may_be_asked_at = gave_up ? Deadline::max() : now + patience_ / 8;
    asked.is_open = false;
    asked.waits_for = std::move(waits_for);
  }

  /// Whether all have been asked, and have answered or had the time to.
  [[nodiscard]] bool is_settled(const std::vector<int>& missing, Deadline now) const {
    const std::vector<int> ranks = chain(missing);
    return std::all_of(ranks.begin(), ranks.end(), [&](int r) {
      const auto asked = asked_.find(r);
      return asked != asked_.end() &&
             (!asked->second.waits_for.empty() || now - asked->second.at > patience_);
    });
  }

  /// `missing` and those for whom they wait, as far as it is known.
  [[nodiscard]] std::vector<int> chain(const std::vector<int>& missing) const {
    std::vector<int> ranks;
    const auto add = [&](const std::vector<int>& some) {
      for (const int r : some) {
        if (r != self_ && std::find(ranks.begin(), ranks.end(), r) == ranks.end()) {
          ranks.push_back(r);
        }
      }
    };
    add(missing);
    for (std::size_t i = 0; i < ranks.size(); ++i) {
      if (const auto asked = asked_.find(ranks[i]); asked != asked_.end()) {
        add(asked->second.waits_for);
      }
    }
    return ranks;
  }

  /// Nothing for a rank that is in no wait.
  [[nodiscard]] std::optional<std::vector<int>> waits_for(int r, Deadline now) const {
    const auto asked = asked_.find(r);
    if (asked == asked_.end() || asked->second.waits_for.empty() ||
        (asked->second.is_open && now - asked->second.at > patience_)) {
      return std::nullopt;
    }
    return asked->second.waits_for;
  }

 private:
  struct Asked {
    Deadline at{};  ///< From when on it has the time to say that it waits.
    Deadline may_be_asked_at = Deadline::min();
    bool is_open = false;  ///< It has not answered yet.
    std::vector<int> waits_for = {};
  };

  int self_;
  Clock::duration patience_;
  std::map<int, Asked> asked_;
};

/// A wait of this rank for others of a group that lasts, by whichever means it waits. While it
/// lives, ranks that ask this one are told for whom it waits, and at its end that it does no more.
/// Used by the thread that waits.
class LongWait {
 public:
  using Missing = std::function<std::vector<int>()>;  ///< Who has not come yet.

  LongWait() = default;
  LongWait(const LongWait&) = delete;
  LongWait& operator=(const LongWait&) = delete;
  virtual ~LongWait() = default;

  /// To be called every few ms: answers, and asks near the end.
  virtual void look(const Missing& missing) noexcept = 0;
  /// Whether those asked have had the time to answer.
  [[nodiscard]] virtual bool is_settled(const std::vector<int>& missing) = 0;
  /// Whom to blame where the wait is over: in the stead of ranks that wait, those for whom they do,
  /// in whichever groups. Who asks this one is told so from here on.
  [[nodiscard]] virtual Fault at_fault(const std::vector<int>& missing) = 0;
};

}  // namespace cohort::detail
