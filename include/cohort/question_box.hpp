// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cohort/control_frame.hpp"
#include "cohort/messenger.hpp"
#include "cohort/owner_process.hpp"
#include "cohort/ring_reading.hpp"

/// \file
/// What ranks ask each other during long waits, and what they answer: `Inquiry` decides whom.

namespace cohort::detail {

/// The questions that have come for this rank, and the answers to its own. The `sequence` of either
/// is the number of the inquiry that it is part of. Any thread; nobody waits for long, also while
/// another is in the messenger. Throws `UsageError` in a forked child of its owner, where another
/// thread may have held the mutex.
class QuestionBox {
 public:
  /// What a rank wants to know: for whom this one waits.
  struct Question {
    int from = 0;
    FrameTrailer trailer;
  };
  /// For whom a rank waits, in the messenger; for nobody any more where that is empty. In which
  /// call it says as well, so that ranks which wait for each other find out where these differ.
  struct Answer {
    int from = 0;
    std::vector<int> waits_for;
    bool gave_up = false;               ///< It waits no more, because they did not come.
    std::uint64_t channel = 0;          ///< In which group.
    std::optional<OpenCall> call = {};  ///< In which call, where that is known.

    [[nodiscard]] Bytes serialize() const {
      const OpenCall open = call.value_or(OpenCall{});
      const std::array<std::uint64_t, 5> head{gave_up ? 1U : 0U, waits_for.size(), channel,
                                              open.number, open.signature};
      // All at once: of a vector that grows g++ warns that it has no room.
      const auto ranks = std::as_bytes(std::span(waits_for));
      const auto text = std::as_bytes(std::span(open.text));
      Bytes out(sizeof(head) + ranks.size() + text.size());
      std::memcpy(out.data(), head.data(), sizeof(head));
      const auto behind = std::copy(ranks.begin(), ranks.end(), out.begin() + sizeof(head));
      std::copy(text.begin(), text.end(), behind);
      return out;
    }
    /// What is no answer is one of a rank that waits for nobody.
    [[nodiscard]] static Answer deserialize(int from, std::span<const std::byte> in) {
      std::array<std::uint64_t, 5> head{};
      if (in.size() < sizeof(head)) {
        return {from, {}};
      }
      std::memcpy(head.data(), in.data(), sizeof(head));
      in = in.subspan(sizeof(head));
      Answer answer{from,
                    std::vector<int>(std::min<std::uint64_t>(head[1], in.size() / sizeof(int))),
                    head[0] != 0, head[2]};
      const std::size_t bytes = answer.waits_for.size() * sizeof(int);
      if (bytes > 0) {
        std::memcpy(answer.waits_for.data(), in.data(), bytes);
      }
      in = in.subspan(bytes);
      if (!in.empty()) {
        answer.call = OpenCall{head[3], static_cast<std::uint32_t>(head[4]),
                               std::string(reinterpret_cast<const char*>(in.data()), in.size())};
      }
      return answer;
    }
  };

  /// A wait in a group begins, and ends, during which this rank answers.
  void begin_wait(std::uint64_t channel) {
    const auto lock = enter();
    ++waits_[channel];
  }
  void end_wait(std::uint64_t channel) {
    const auto lock = enter();
    if (const auto waits = waits_.find(channel); waits != waits_.end() && --waits->second == 0) {
      waits_.erase(waits);
    }
  }
  /// Of the questions taken in those that a wait in that group is to answer, which then is to do
  /// so: those asked in the group, and in groups in which this rank does not wait. Costs nothing
  /// where there is none.
  [[nodiscard]] std::vector<Question> take_questions(std::uint64_t channel) {
    std::vector<Question> taken;
    if (!has_questions_.load(std::memory_order_relaxed)) {
      return taken;
    }
    const auto lock = enter();
    for (auto it = questions_.begin(); it != questions_.end();) {
      const auto& [place, group] = *it;
      if (group != channel && waits_.count(group) > 0) {
        ++it;
        continue;
      }
      taken.push_back({place.first, {group, ControlCall::waits, place.second}});
      it = questions_.erase(it);
    }
    has_questions_.store(!questions_.empty(), std::memory_order_relaxed);
    return taken;
  }

  /// The number of a new inquiry, whose answers are kept from now on.
  [[nodiscard]] std::uint32_t begin_inquiry() {
    const auto lock = enter();
    answers_[++inquiries_];
    return inquiries_;
  }
  void end_inquiry(std::uint32_t number) {
    const auto lock = enter();
    answers_.erase(number);
  }
  /// In the order in which they have been taken in.
  [[nodiscard]] std::vector<Answer> take_answers(std::uint32_t number) {
    const auto lock = enter();
    const auto found = answers_.find(number);
    return found != answers_.end() ? std::exchange(found->second, {}) : std::vector<Answer>{};
  }

  /// Takes in a question.
  void store_question(int from, const FrameTrailer& trailer) {
    const std::lock_guard lock(mutex_);
    if (questions_.size() >= kMostQuestions) {  // of waits that have long been over
      questions_.clear();
    }
    questions_[{from, trailer.sequence}] = trailer.channel;
    has_questions_.store(true, std::memory_order_relaxed);
  }
  /// Takes in an answer, unless its inquiry is over.
  void store_answer(int from, std::uint32_t number, std::span<const std::byte> payload) {
    const std::lock_guard lock(mutex_);
    if (const auto inquiry = answers_.find(number); inquiry != answers_.end()) {
      inquiry->second.push_back(Answer::deserialize(from, payload));
    }
  }

 private:
  static constexpr std::size_t kMostQuestions = 4096;

  [[nodiscard]] std::unique_lock<std::mutex> enter() {
    owner_.check("control plane");
    return std::unique_lock(mutex_);
  }

  OwnerProcess owner_;
  std::mutex mutex_;
  std::map<std::uint64_t, int> waits_;  // how many threads wait for long, by channel
  std::map<std::pair<int, std::uint32_t>, std::uint64_t> questions_;  // sender, inquiry: channel
  std::atomic<bool> has_questions_{false};
  std::uint32_t inquiries_ = 0;
  std::map<std::uint32_t, std::vector<Answer>> answers_;  // of inquiries under way, by number
};

}  // namespace cohort::detail
