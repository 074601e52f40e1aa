// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "cohort/call_time.hpp"
#include "cohort/control_frame.hpp"
#include "cohort/error.hpp"
#include "cohort/give_up.hpp"
#include "cohort/inquiry.hpp"
#include "cohort/mailbox.hpp"
#include "cohort/membership.hpp"
#include "cohort/messenger.hpp"
#include "cohort/question_box.hpp"

/// \file
/// What a rank says and asks over a mailbox during a long wait.

namespace cohort::detail {

/// Answers, and asks from `asks_at` on, whoever is found to be waited for in whichever groups: by
/// the messenger's numbers.
class ControlTalk : public LongWait {
 public:
  ControlTalk(Mailbox& mailbox, const Membership& group, Deadline asks_at, Clock::duration patience)
      : mailbox_(mailbox),
        group_(group),
        self_(group.member(group.rank())),
        asks_at_(mailbox.messenger().size() > 2 ? asks_at : Deadline::max()),
        inquiry_(self_, patience) {
    mailbox_.questions().begin_wait(group_.channel());
  }
  ~ControlTalk() override {
    try {
      if (number_) {
        mailbox_.questions().end_inquiry(*number_);
      }
      mailbox_.questions().end_wait(group_.channel());
      const std::vector<int> late = answered_.empty() ? std::vector<int>{} : who_ended_it();
      for (const auto& [inquiry, question] : answered_) {
        answer(question, {self_, late, !late.empty()});
      }
    } catch (const std::exception&) {
      return;  // who asked asks again
    }
  }

  void look(const Missing& missing) noexcept override try {
    const auto questions = mailbox_.questions().take_questions(group_.channel());
    const bool asks = Clock::now() >= asks_at_;
    if (questions.empty() && !asks) {
      return;
    }
    const std::vector<int> others = members_of(missing());
    for (const auto& question : questions) {
      answer(question, {self_, others});
      answered_.insert_or_assign({question.from, question.trailer.sequence}, question);
    }
    if (asks) {
      ask(others);
    }
  } catch (const std::exception&) {
    return;  // who is not answered may blame this rank, and who does not ask those that wait
  }

  [[nodiscard]] bool is_settled(const std::vector<int>& missing) override {
    if (asks_at_ == Deadline::max()) {  // of two the other is the one that it waits for
      return true;
    }
    hear();
    return inquiry_.is_settled(members_of(missing), Clock::now());
  }

  [[nodiscard]] Fault at_fault(const std::vector<int>& missing) override {
    hear();
    const Deadline now = Clock::now();
    gave_up_on_ = detail::at_fault(self_, members_of(missing),
                                   [&](int r) { return inquiry_.waits_for(r, now); });
    if (gave_up_on_.empty()) {
      gave_up_on_ = members_of(missing);
    }
    Fault fault;
    const Membership& home = group_.home_of(gave_up_on_);
    for (const int member : gave_up_on_) {
      const int r = group_.rank_of(member);
      if (r < group_.size()) {
        fault.ranks.push_back(r);
      } else {
        fault.elsewhere.push_back(home.rank_of(member));
      }
    }
    std::sort(fault.ranks.begin(), fault.ranks.end());
    std::sort(fault.elsewhere.begin(), fault.elsewhere.end());
    fault.home = home.name();
    fault.in_world = &home == group_.parent();
    return fault;
  }

 private:
  [[nodiscard]] std::vector<int> members_of(std::vector<int> ranks) const {
    for (int& r : ranks) {
      r = group_.member(r);
    }
    return ranks;
  }

  /// Because of whom the wait has ended, of which the group's end says as much where another rank
  /// found it; nobody where all came.
  [[nodiscard]] std::vector<int> who_ended_it() const {
    if (!gave_up_on_.empty()) {
      return gave_up_on_;
    }
    const auto said = mailbox_.notices().first({group_.channel(), group_.members(), std::nullopt});
    const GiveUp why = said ? GiveUp::deserialize(said->reason) : GiveUp{};
    std::vector<int> late;
    for (const int r : why.kind == GiveUp::Kind::timeout ? why.ranks : std::vector<int>{}) {
      if (r >= 0 && r < group_.size() && r != group_.rank()) {
        late.push_back(group_.member(r));
      }
    }
    return late;
  }

  void answer(const QuestionBox::Question& question, const QuestionBox::Answer& said) {
    mailbox_.send(question.from, question.trailer, said.serialize());
  }

  void ask(const std::vector<int>& missing) {
    hear();
    if (!number_) {
      number_ = mailbox_.questions().begin_inquiry();
    }
    for (const int r : inquiry_.whom_to_ask(missing, Clock::now())) {
      try {
        mailbox_.send(r, {group_.channel(), ControlCall::asks, *number_}, {});
      } catch (const TransportError&) {
        continue;  // whom it cannot ask does not answer
      }
    }
  }

  void hear() {
    if (!number_) {
      return;
    }
    mailbox_.look();
    for (auto& answer : mailbox_.questions().take_answers(*number_)) {
      inquiry_.hear(answer.from, std::move(answer.waits_for), Clock::now(), answer.gave_up);
    }
  }

  Mailbox& mailbox_;
  const Membership& group_;
  int self_;
  Deadline asks_at_;
  Inquiry inquiry_;
  std::optional<std::uint32_t> number_;  // of the inquiry, once it has begun
  std::map<std::pair<int, std::uint32_t>, QuestionBox::Question> answered_;
  std::vector<int> gave_up_on_;
};

/// `ControlPlane::begin_long_wait`: asks in the last eighth of the limit.
[[nodiscard]] inline std::unique_ptr<LongWait> begin_talk(Mailbox& mailbox, const Membership& group,
                                                          const LimitedWait& time,
                                                          std::chrono::milliseconds limit) noexcept
    try {
  const bool has_peers = group.size() > 1 && limit > std::chrono::milliseconds(0);
  return has_peers ? std::make_unique<ControlTalk>(mailbox, group, time.deadline() - limit / 8,
                                                   Clock::duration(limit) / 16)
                   : nullptr;
} catch (const std::exception&) {
  return nullptr;
}

}  // namespace cohort::detail
