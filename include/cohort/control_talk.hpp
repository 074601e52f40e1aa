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

/// Answers, and asks from `asks_at` on; of two the other is the one that it waits for.
class ControlTalk : public LongWait {
 public:
  ControlTalk(Mailbox& mailbox, const Membership& group, Deadline asks_at, Clock::duration patience)
      : mailbox_(mailbox),
        group_(group),
        asks_at_(group.size() > 2 ? asks_at : Deadline::max()),
        inquiry_(group.rank(), patience) {
    mailbox_.questions().begin_wait(group_.channel());
  }
  ~ControlTalk() override {
    try {
      if (number_) {
        mailbox_.questions().end_inquiry(*number_);
      }
      mailbox_.questions().end_wait(group_.channel());
      for (const auto& [inquiry, question] : answered_) {
        answer(question, {});
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
    const std::vector<int> others = missing();
    for (const auto& question : questions) {
      answer(question, others);
      answered_.insert_or_assign({question.from, question.trailer.sequence}, question);
    }
    if (asks) {
      ask(others);
    }
  } catch (const std::exception&) {
    return;  // who is not answered may blame this rank, and who does not ask those that wait
  }

  [[nodiscard]] bool is_settled(const std::vector<int>& missing) override {
    if (asks_at_ == Deadline::max()) {
      return true;
    }
    hear();
    return inquiry_.is_settled(missing, Clock::now());
  }

  [[nodiscard]] std::vector<int> at_fault(const std::vector<int>& missing) override {
    hear();
    const Deadline now = Clock::now();
    return detail::at_fault(group_.rank(), missing,
                            [&](int r) { return inquiry_.waits_for(r, now); });
  }

 private:
  void answer(const QuestionBox::Question& question, const std::vector<int>& missing) {
    std::vector<int> members;
    for (const int r : missing) {
      members.push_back(group_.member(r));
    }
    const auto bytes = std::as_bytes(std::span(members));
    mailbox_.send(question.from, question.trailer, Bytes(bytes.begin(), bytes.end()));
  }

  void ask(const std::vector<int>& missing) {
    hear();
    if (!number_) {
      number_ = mailbox_.questions().begin_inquiry();
    }
    for (const int r : inquiry_.whom_to_ask(missing, Clock::now())) {
      try {
        mailbox_.send(group_.member(r), {group_.channel(), ControlCall::asks, *number_}, {});
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
    for (auto& [from, waits_for] : mailbox_.questions().take_answers(*number_)) {
      for (int& r : waits_for) {
        r = group_.rank_of(r);
      }
      if (std::count(waits_for.begin(), waits_for.end(), group_.size()) > 0) {
        waits_for.clear();  // for a rank of another group, which has no number here
      }
      inquiry_.hear(group_.rank_of(from), std::move(waits_for), Clock::now());
    }
  }

  Mailbox& mailbox_;
  const Membership& group_;
  Deadline asks_at_;
  Inquiry inquiry_;
  std::optional<std::uint32_t> number_;  // of the inquiry, once it has begun
  std::map<std::pair<int, std::uint32_t>, QuestionBox::Question> answered_;
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
