// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cohort/call_time.hpp"
#include "cohort/control_frame.hpp"
#include "cohort/error.hpp"
#include "cohort/flight_recorder.hpp"
#include "cohort/give_up.hpp"
#include "cohort/inquiry.hpp"
#include "cohort/mailbox.hpp"
#include "cohort/membership.hpp"
#include "cohort/messenger.hpp"
#include "cohort/question_box.hpp"
#include "cohort/ring_reading.hpp"

/// \file
/// What a rank says and asks over a mailbox during a long wait.

namespace cohort::detail {

/// Answers, and asks from `asks_at` on, whoever is found to be waited for in whichever groups: by
/// the messenger's numbers.
class ControlTalk : public LongWait {
 public:
  /// @param recorder  Of the group, to tell the call that is open; null for none.
  ControlTalk(Mailbox& mailbox, const Membership& group, const FlightRecorder* recorder,
              Deadline asks_at, Clock::duration patience)
      : mailbox_(mailbox),
        group_(group),
        recorder_(recorder),
        self_(group.member(group.rank())),
        asks_at_(asks_at),
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
        answer(question,
               late.empty() ? QuestionBox::Answer{self_, {}}
                            : QuestionBox::Answer{self_, late, true, group_.channel(), own_call()});
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
      answer(question, {self_, others, false, group_.channel(), own_call()});
      answered_.insert_or_assign({question.from, question.trailer.sequence}, question);
    }
    if (asks) {
      ask(others);
    }
  } catch (const std::exception&) {
    return;  // who is not answered may blame this rank, and who does not ask those that wait
  }

  [[nodiscard]] bool is_settled(const std::vector<int>& missing) override {
    hear();
    return inquiry_.is_settled(members_of(missing), Clock::now());
  }

  [[nodiscard]] Fault at_fault(const std::vector<int>& missing) override {
    hear();
    const Deadline now = Clock::now();
    gave_up_on_ = detail::at_fault(self_, members_of(missing),
                                   [&](int r) { return inquiry_.waits_for(r, now); });
    Fault fault;
    if (gave_up_on_.empty()) {  // each waits for others of them
      gave_up_on_ = members_of(missing);
      find_difference(inquiry_.chain(gave_up_on_), fault);
      if (!fault.difference.empty()) {
        return fault;
      }
    }
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

  [[nodiscard]] std::optional<OpenCall> own_call() const {
    auto open = recorder_ != nullptr ? recorder_->call_to_compare() : std::nullopt;
    if (open) {
      open->text += " of group " + group_.name();
    }
    return open;
  }

  /// Of ranks of which each waits for others of them, this one with them: whether they are in calls
  /// that differ, as far as all have said. Those of pairs alone may wait in a circle.
  void find_difference(std::vector<int> others, Fault& fault) const {
    others.push_back(self_);
    std::sort(others.begin(), others.end(), [&](int a, int b) {  // ranks of the group come first
      return std::pair(group_.rank_of(a), a) < std::pair(group_.rank_of(b), b);
    });
    using Call = std::tuple<std::uint64_t, std::uint64_t, std::uint32_t>;
    std::vector<Call> calls;
    std::string text;
    bool all_pairs = true;
    for (const int member : others) {
      const auto said = calls_.find(member);
      const auto call = member == self_        ? own_call()
                        : said != calls_.end() ? said->second.call
                                               : std::nullopt;
      if (!call) {
        return;
      }
      all_pairs = all_pairs && call->number == 0;
      calls.emplace_back(member == self_ ? group_.channel() : said->second.channel, call->number,
                         call->signature);
      const Membership& home = group_.home_of(std::span(&member, 1));
      text += fmt::format("{}rank {}{} in {}", text.empty() ? "" : ", ", home.rank_of(member),
                          &home == &group_ ? "" : " of group " + home.name(), call->text);
    }
    const auto alike = [&](const Call& call) {
      return std::count(calls.begin(), calls.end(), call);
    };
    const auto most =
        std::max_element(calls.begin(), calls.end(),
                         [&](const Call& a, const Call& b) { return alike(a) < alike(b); });
    if (all_pairs || alike(*most) == static_cast<std::ptrdiff_t>(calls.size())) {
      return;
    }
    fault.difference = text;
    for (std::size_t i = 0; i < others.size(); ++i) {
      if (const int r = group_.rank_of(others[i]); calls[i] != *most && r < group_.size()) {
        fault.ranks.push_back(r);
      }
    }
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
      inquiry_.hear(answer.from, answer.waits_for, Clock::now(), answer.gave_up);
      const int from = answer.from;
      calls_.insert_or_assign(from, std::move(answer));
    }
  }

  Mailbox& mailbox_;
  const Membership& group_;
  const FlightRecorder* recorder_;
  int self_;
  Deadline asks_at_;
  Inquiry inquiry_;
  std::optional<std::uint32_t> number_;  // of the inquiry, once it has begun
  std::map<std::pair<int, std::uint32_t>, QuestionBox::Question> answered_;
  std::map<int, QuestionBox::Answer> calls_;  // what each said last
  std::vector<int> gave_up_on_;
};

/// `ControlPlane::begin_long_wait`: asks in the last eighth of the limit.
[[nodiscard]] inline std::unique_ptr<LongWait> begin_talk(Mailbox& mailbox, const Membership& group,
                                                          const FlightRecorder* recorder,
                                                          const LimitedWait& time,
                                                          std::chrono::milliseconds limit) noexcept
    try {
  const bool has_peers = group.size() > 1 && limit > std::chrono::milliseconds(0);
  return has_peers
             ? std::make_unique<ControlTalk>(mailbox, group, recorder, time.deadline() - limit / 8,
                                             Clock::duration(limit) / 16)
             : nullptr;
} catch (const std::exception&) {
  return nullptr;
}

}  // namespace cohort::detail
