// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "cohort/call_time.hpp"
#include "cohort/control_plane.hpp"
#include "cohort/error.hpp"
#include "cohort/give_up.hpp"
#include "cohort/hash.hpp"
#include "cohort/inquiry.hpp"
#include "cohort/joined.hpp"
#include "cohort/log.hpp"
#include "cohort/mailbox.hpp"
#include "cohort/messenger.hpp"
#include "cohort/runtime_env.hpp"
#include "cohort/wait_notice.hpp"

/// \file
/// The control plane over messages between pairs of ranks.

namespace cohort {

/// A control plane over a `Messenger`. Every arrival is a message that carries call and number, so
/// a rank that is missing or elsewhere can be named.
class MessageControlPlane : public ControlPlane {
 public:
  /// The group of all ranks of the messenger. Local. A forked child neither calls the messenger nor
  /// destroys it. `COHORT_TIMEOUT_MS` wins over `limit` where it
  /// is set. Throws `ConfigError` for a time limit that is not positive or beyond
  /// `kLongestTimeLimit`.
  explicit MessageControlPlane(std::shared_ptr<Messenger> messenger,
                               std::chrono::milliseconds limit = kDefaultTimeLimit,
                               std::string name = "world")
      : mailbox_(detail::Mailbox::shared(std::move(messenger))),
        limit_(runtime_settings().timeout.value_or(limit)),
        name_(std::move(name)),
        members_(static_cast<std::size_t>(mailbox_->messenger().size())),
        rank_(mailbox_->messenger().rank()),
        channel_(detail::kHashSeed),
        given_once_(false),
        exchanged_(members_.size(), Deadline::min()) {
    if (!is_time_limit(limit)) {
      throw ConfigError(fmt::format("control plane {}: expected a time limit of 1 to {} ms, got {}",
                                    name_, kLongestTimeLimit.count(), limit.count()));
    }
    std::iota(members_.begin(), members_.end(), 0);
  }

  /// Drops what peers have sent to a group that ends before it has taken it.
  ~MessageControlPlane() override {
    if (poisoned() || given_once_) {
      mailbox_->retire(channel_);
    }
  }

  [[nodiscard]] int rank() const noexcept override { return rank_; }
  [[nodiscard]] int size() const noexcept override { return static_cast<int>(members_.size()); }
  [[nodiscard]] const std::string& name() const noexcept override { return name_; }
  [[nodiscard]] std::chrono::milliseconds limit() const noexcept override { return limit_; }
  [[nodiscard]] bool poisoned() const noexcept override { return (progress_.load() & kLeft) != 0; }

  Arrivals gather_arrivals(std::span<const std::byte> mine, std::chrono::milliseconds limit,
                           const detail::GiveUp* excuse) override {
    Arrivals arrivals;
    try {
      gather(detail::ControlCall::all_gather, mine, limit, arrivals, excuse);
    } catch (...) {
      arrivals.error = std::current_exception();
    }
    return arrivals;
  }

  void barrier() override {
    Arrivals arrivals;
    gather(detail::ControlCall::barrier, {}, limit_, arrivals, nullptr);
  }

  Bytes broadcast(std::span<const std::byte> mine, int root) override {
    check_rank("broadcast root", root);
    const auto trailer = next(detail::ControlCall::broadcast);
    return leave_on_error(nullptr, [&] {
      if (rank_ == root) {
        for (int r = 0; r < size(); ++r) {
          if (r != rank_) {
            send(r, trailer, mine);
          }
        }
        fail_if_left(trailer, members_, told_ + shortest(limit_));
        finish(trailer);
        return Bytes(mine.begin(), mine.end());
      }
      Wait wait(limit_, limit_);
      auto payload = receive(root, trailer, wait, member(root));
      fail_if_missing(trailer, wait);
      fail_if_left(trailer, members_, told_ + shortest(limit_));
      finish(trailer);
      return payload;
    });
  }

  std::vector<Bytes> exchange(std::vector<Outgoing> outgoing,
                              std::span<const Incoming> incoming) override {
    throw_if_poisoned(detail::ControlCall::exchange);
    for (const auto& message : outgoing) {
      check_rank("exchange to", message.to);
    }
    for (const auto& message : incoming) {
      check_rank("exchange from", message.from);
    }
    // Pairs count for themselves: the two ends of an exchange need not make the same calls.
    const detail::FrameTrailer trailer{channel_, detail::ControlCall::exchange, 0};
    return leave_on_error(nullptr, [&] {
      refuse_if_left(outgoing);
      for (auto& message : outgoing) {
        mailbox_->send(members_[index(message.to)], trailer, std::move(message.payload));
      }
      Wait wait(limit_, limit_);
      std::vector<int> awaited;
      for (const auto& message : incoming) {
        awaited.push_back(members_[index(message.from)]);
      }
      std::vector<Bytes> payloads;
      for (const auto& [from, bytes] : incoming) {
        payloads.push_back(
            receive(from, trailer, wait, std::span(awaited).subspan(payloads.size())));
        if (wait.missing.empty() && bytes != kAnyBytes && payloads.back().size() != bytes) {
          throw SymmetryError(fmt::format("exchange in group {}: rank {} sent {} bytes where rank "
                                          "{} expected {}",
                                          name_, from, payloads.back().size(), rank_, bytes),
                              {from});
        }
      }
      fail_if_missing(trailer, wait);
      if (!incoming.empty()) {
        for (const auto& message : outgoing) {
          flush(message.to, trailer, wait);
        }
        fail_if_missing(trailer, wait);
      }
      // Who waits for a message has taken the one before, so it began after that was sent.
      Deadline before = Deadline::max() - shortest(limit_);
      for (const auto& message : outgoing) {
        before = std::min(before, std::exchange(exchanged_[index(message.to)], wait.time.start()));
      }
      look_from(before + shortest(limit_));
      for (const auto& message : outgoing) {
        throw_if_told(trailer.call, watch(trailer, member(message.to)));
      }
      finish(trailer);
      return payloads;
    });
  }

  void leave_with(const detail::GiveUp& why) noexcept override {
    if (mailbox_->owner().is_here()) {
      leave([&] { return why.serialize(); });
    }
  }

  [[nodiscard]] std::optional<detail::GiveUp> left_with() const override {
    const auto said = poisoned()
                          ? mailbox_->notices().first({channel_, member(rank_), std::nullopt})
                          : std::nullopt;
    return said ? std::optional(detail::GiveUp::deserialize(said->reason)) : std::nullopt;
  }

  void leave_in_order() noexcept override {
    if (!given_once_ || poisoned() || !mailbox_->owner().is_here()) {
      return;
    }
    const detail::FrameTrailer trailer{channel_, detail::ControlCall::left,
                                       static_cast<std::uint32_t>(progress_.load())};
    for (int r = 0; r < size(); ++r) {
      try {
        if (r != rank_) {
          send(r, trailer, {});
        }
      } catch (const std::exception&) {
        continue;  // whom it cannot tell finds out at the time limit
      }
    }
  }

  [[nodiscard]] std::unique_ptr<detail::LongWait> begin_long_wait(
      const detail::LimitedWait& time, std::chrono::milliseconds limit) noexcept override try {
    const bool has_peers = size() > 1 && limit > std::chrono::milliseconds(0);
    return has_peers ? std::make_unique<Talk>(*this, time.deadline() - limit / 8, limit / 16)
                     : nullptr;
  } catch (const std::exception&) {
    return nullptr;
  }

  std::unique_ptr<ControlPlane> subgroup(std::span<const int> ranks, std::uint64_t generation,
                                         std::string name) override {
    std::vector<int> members;
    std::uint64_t channel = detail::mix(channel_, generation);
    int rank = -1;
    for (const int r : ranks) {
      if (r < 0 || r >= size() || std::count(ranks.begin(), ranks.end(), r) != 1) {
        throw UsageError(fmt::format("subgroup {}: {} is not a list of different ranks of {}", name,
                                     detail::joined(ranks, ","), name_));
      }
      if (r == rank_) {
        rank = static_cast<int>(members.size());
      }
      members.push_back(members_[index(r)]);
      channel = detail::mix(channel, static_cast<std::uint64_t>(members.back()));
    }
    if (rank < 0) {
      throw UsageError(fmt::format("subgroup {}: the list {} does not hold this rank, {}", name,
                                   detail::joined(ranks, ","), rank_));
    }
    return std::unique_ptr<ControlPlane>(new MessageControlPlane(mailbox_, limit_, std::move(name),
                                                                 std::move(members), rank, channel,
                                                                 generation >= kFreshGeneration));
  }

  /// Messages of all groups of this rank that nobody has asked for.
  [[nodiscard]] std::size_t held_messages() const { return mailbox_->held(); }

 protected:
  void find_who_left(PeerLook look) override {
    if (size() == 1 || poisoned() || !mailbox_->owner().is_here()) {
      return;
    }
    if (look == PeerLook::now) {
      mailbox_->look();
    } else if (look == PeerLook::lately) {
      mailbox_->look_now_and_then();
    }
    try {
      throw_if_told(detail::ControlCall::gave_up, {channel_, members_, std::nullopt});
    } catch (const Error&) {
      leave([&] { return said_or_own(std::current_exception()); });
      throw;
    }
  }

 private:
  static_assert(sizeof(detail::FrameTrailer) == kTrailerBytes);

  MessageControlPlane(std::shared_ptr<detail::Mailbox> mailbox, std::chrono::milliseconds limit,
                      std::string name, std::vector<int> members, int rank, std::uint64_t channel,
                      bool given_once)
      : mailbox_(std::move(mailbox)),
        limit_(limit),
        name_(std::move(name)),
        members_(std::move(members)),
        rank_(rank),
        channel_(channel),
        given_once_(given_once),
        exchanged_(members_.size(), Deadline::min()) {}

  /// Answers, and asks from `asks_at` on; of two the other is the one that it waits for.
  class Talk : public detail::LongWait {
   public:
    Talk(MessageControlPlane& plane, Deadline asks_at, Clock::duration patience)
        : plane_(plane),
          mailbox_(*plane.mailbox_),
          asks_at_(plane.size() > 2 ? asks_at : Deadline::max()),
          inquiry_(plane.rank(), patience) {
      mailbox_.questions().begin_wait(plane_.channel_);
    }
    ~Talk() override {
      try {
        if (number_) {
          mailbox_.questions().end_inquiry(*number_);
        }
        mailbox_.questions().end_wait(plane_.channel_);
        for (const auto& [inquiry, question] : answered_) {
          answer(question, {});
        }
      } catch (const std::exception&) {
        return;  // who asked asks again
      }
    }

    void look(const Missing& missing) noexcept override try {
      const auto questions = mailbox_.questions().take_questions(plane_.channel_);
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
      return detail::at_fault(plane_.rank(), missing,
                              [&](int r) { return inquiry_.waits_for(r, now); });
    }

   private:
    void answer(const detail::Question& question, const std::vector<int>& missing) {
      std::vector<int> members;
      for (const int r : missing) {
        members.push_back(plane_.members_[index(r)]);
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
          plane_.send(r, {plane_.channel_, detail::ControlCall::asks, *number_}, {});
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
          r = plane_.group_rank(r);
        }
        if (std::count(waits_for.begin(), waits_for.end(), plane_.size()) > 0) {
          waits_for.clear();  // for a rank of another group, which has no number here
        }
        inquiry_.hear(plane_.group_rank(from), std::move(waits_for), Clock::now());
      }
    }

    MessageControlPlane& plane_;
    detail::Mailbox& mailbox_;
    Deadline asks_at_;
    detail::Inquiry inquiry_;
    std::optional<std::uint32_t> number_;  // of the inquiry, once it has begun
    std::map<std::pair<int, std::uint32_t>, detail::Question> answered_;
  };

  /// One wait for several ranks, which share its time.
  struct Wait {
    /// @param of_call  The limit of the group's calls, where the wait has more.
    Wait(std::chrono::milliseconds most, std::chrono::milliseconds of_call)
        : limit(std::min(most, kLongestTimeLimit)),
          time(limit, std::min(limit, of_call)),
          notice(time.start(), limit) {}

    std::chrono::milliseconds limit;
    detail::LimitedWait time;
    detail::WaitNotice notice;
    std::unique_ptr<detail::LongWait> talk;  ///< Once it has lasted.
    std::vector<int> missing;
  };

  /// How often a wait answers others.
  static constexpr std::chrono::milliseconds kTalkEvery{5};
  /// Between looks behind the deadline.
  static constexpr std::chrono::milliseconds kWhileSettling{1};

  /// For how long behind its last arrival a rank takes it that nobody has left: less than the
  /// others' waits last. Any of their threads may leave earlier, so calls that do not follow each
  /// other at once look as well.
  static Deadline::duration shortest(std::chrono::milliseconds limit) noexcept {
    constexpr std::chrono::milliseconds kAtOnce{1};
    return std::min<Deadline::duration>(limit / 8, kAtOnce);
  }

  static std::size_t index(int rank) noexcept { return static_cast<std::size_t>(rank); }

  void check_rank(std::string_view argument, int rank) const {
    if (rank < 0 || rank >= size()) {
      throw UsageError(fmt::format("{}: expected a rank of group {} in [0, {}), got {}", argument,
                                   name_, size(), rank));
    }
  }

  void throw_if_poisoned(detail::ControlCall call) const {
    mailbox_->owner().check(name_);
    if (poisoned()) {
      throw TransportError({.call = std::string(to_string(call)), .rank = rank_, .group = name_},
                           "an earlier call of this control plane failed, so its ranks are no "
                           "longer in step; form a new group");
    }
  }

  detail::FrameTrailer next(detail::ControlCall call) {
    throw_if_poisoned(call);
    return {channel_, call, static_cast<std::uint32_t>(progress_.load())};
  }

  /// Whatever ends a call early leaves the ranks out of step, so this one leaves the group, and
  /// tells so. Ranks that disagree are still there to take what was sent to them.
  template <class Call>
  std::invoke_result_t<Call&> leave_on_error(const detail::GiveUp* excuse, Call&& call) {
    const auto tell = [&](const std::exception_ptr& error) {
      leave([&] { return excuse != nullptr ? excuse->serialize() : said_or_own(error); });
    };
    try {
      return call();
    } catch (const SymmetryError&) {
      tell(std::current_exception());
      throw;
    } catch (const TransportError& error) {
      const auto here = std::make_exception_ptr(of_this_group(error));
      tell(here);
      mailbox_->abandon();
      std::rethrow_exception(here);
    } catch (const std::exception&) {
      tell(std::current_exception());
      mailbox_->abandon();
      throw;
    }
  }

  /// What the messenger throws has its own numbers of the ranks, and no group.
  [[nodiscard]] TransportError of_this_group(const TransportError& error) const {
    if (!error.site().group.empty()) {
      return error;
    }
    return TransportError({.call = error.site().call,
                           .native_code = error.site().native_code,
                           .rank = rank_,
                           .group = name_},
                          fmt::format("the messenger, to which the ranks of the group are {}: {}",
                                      detail::joined(members_, ", "), error.what()));
  }

  /// Ends a call on this rank, unless another of its threads has left the group meanwhile: the
  /// others have been told then that it did not finish this call.
  void finish(const detail::FrameTrailer& trailer) {
    std::uint64_t before = trailer.sequence;
    const bool stays = trailer.call == detail::ControlCall::exchange
                           ? !poisoned()
                           : progress_.compare_exchange_strong(
                                 before, static_cast<std::uint32_t>(trailer.sequence + 1));
    if (!stays) {
      throw_if_told(trailer.call, watch(trailer, members_));
      throw TransportError(
          {.call = std::string(to_string(trailer.call)), .rank = rank_, .group = name_},
          "another thread of this rank left the group during the call");
    }
  }

  /// What this rank leaves with behind an error: what another said is passed on as it is.
  [[nodiscard]] Bytes said_or_own(const std::exception_ptr& error) {
    const auto said =
        heard_ ? mailbox_->notices().first({channel_, members_, std::nullopt}) : std::nullopt;
    return said ? said->reason : detail::GiveUp::because(error, rank_).serialize();
  }

  /// Poisons the group and tells the others, and a thread of this rank that is in a call. Whoever
  /// sees that it is poisoned finds the reason.
  template <class Why>
  void leave(const Why& why) noexcept {
    if (poisoned()) {
      return;
    }
    try {
      const Bytes reason = why();
      const bool is_first = mailbox_->notices().note_own(channel_, reason);
      const std::uint64_t before = progress_.fetch_or(kLeft);
      if (is_first) {
        tell(reason, static_cast<std::uint32_t>(before));
      }
    } catch (const std::exception& error) {
      progress_.fetch_or(kLeft);
      log(LogLevel::error, error.what());
    }
  }

  /// The others may be dead, and then there is nobody to tell.
  void tell(const Bytes& reason, std::uint32_t sequence) {
    const detail::FrameTrailer trailer{channel_, detail::ControlCall::gave_up, sequence};
    for (int r = 0; r < size(); ++r) {
      try {
        if (r != rank_) {
          send(r, trailer, reason);
        }
      } catch (const TransportError& error) {
        log(LogLevel::info,
            "group {}: rank {} could not be told that rank {} has "
            "left: {}",
            name_, r, rank_, error.what());
      }
    }
  }

  void send(int to, const detail::FrameTrailer& trailer, std::span<const std::byte> payload) {
    Bytes message;
    message.reserve(payload.size() + kTrailerBytes);
    message.assign(payload.begin(), payload.end());
    mailbox_->send(members_[index(to)], trailer, std::move(message));
  }

  void gather(detail::ControlCall call, std::span<const std::byte> mine,
              std::chrono::milliseconds limit, Arrivals& arrivals, const detail::GiveUp* excuse) {
    auto& all = arrivals.payloads;
    all.resize(members_.size());
    int next_rank = 0;
    Wait wait(limit, limit_);
    try {
      const auto trailer = next(call);
      leave_on_error(excuse, [&] {
        for (int step = 1; step < size(); ++step) {
          send((rank_ + step) % size(), trailer, mine);
        }
        for (; next_rank < size(); ++next_rank) {
          all[index(next_rank)] = next_rank == rank_
                                      ? Bytes(mine.begin(), mine.end())
                                      : receive(next_rank, trailer, wait, members_from(next_rank));
        }
        fail_if_missing(trailer, wait);
        for (int r = 0; r < size(); ++r) {
          flush(r, trailer, wait);
        }
        fail_if_missing(trailer, wait);
        // The others have come to this call after they had this rank's last arrival.
        fail_if_left(trailer, members_,
                     std::exchange(told_, wait.time.start()) + shortest(wait.limit));
        finish(trailer);
      });
    } catch (...) {
      arrivals.absent = std::move(wait.missing);
      for (; next_rank < size(); ++next_rank) {
        arrivals.absent.push_back(next_rank);
      }
      throw;
    }
  }

  /// Of a rank of the messenger; `size()` for one of no member.
  [[nodiscard]] int group_rank(int member) const {
    return static_cast<int>(std::find(members_.begin(), members_.end(), member) - members_.begin());
  }
  [[nodiscard]] std::span<const int> member(int rank) const {
    return std::span(members_).subspan(index(rank), 1);
  }
  [[nodiscard]] std::span<const int> members_from(int rank) const {
    return std::span(members_).subspan(index(rank));
  }

  /// Messages to a rank that has left would be lost.
  void refuse_if_left(const std::vector<Outgoing>& outgoing) {
    if (outgoing.empty()) {
      return;
    }
    mailbox_->look_now_and_then();
    for (const auto& message : outgoing) {
      if (mailbox_->has_left(channel_, members_[index(message.to)])) {
        fail_left(detail::ControlCall::exchange, message.to);
      }
    }
  }

  [[noreturn]] void fail_left(detail::ControlCall call, int rank) const {
    throw TransportError({.call = std::string(to_string(call)), .rank = rank_, .group = name_},
                         fmt::format("rank {} has left the group", rank));
  }

  [[nodiscard]] detail::Watch watch(const detail::FrameTrailer& trailer,
                                    std::span<const int> ranks) const {
    const bool numbered = trailer.call != detail::ControlCall::exchange;
    return {channel_, ranks, numbered ? std::optional(trailer.sequence) : std::nullopt};
  }

  /// The matching payload from a rank of the group; notes the rank as missing at the deadline.
  /// Throws as soon as any rank of the group says that it gave up, or one of `awaited`, in the
  /// messenger, that it has left.
  Bytes receive(int from, const detail::FrameTrailer& expected, Wait& wait,
                std::span<const int> awaited) {
    auto concern = watch(expected, members_);
    concern.awaited = awaited;
    std::optional<detail::Mailbox::Frame> frame;
    const bool came = persist(
        expected, concern, wait, [&] { return missing_of(from, expected, awaited); },
        [&](Deadline end) {
          frame = mailbox_->receive(members_[index(from)], expected.call, concern, end);
          return frame.has_value();
        });
    if (!came) {
      wait.missing.push_back(from);
      return {};
    }
    if (frame->trailer.call != expected.call || frame->trailer.sequence != expected.sequence) {
      throw SymmetryError(
          fmt::format("group {}: rank {} is in {} #{} while rank {} is in {} #{}", name_, from,
                      to_string(frame->trailer.call), frame->trailer.sequence, rank_,
                      to_string(expected.call), expected.sequence),
          {from});
    }
    return std::move(frame->payload);
  }

  /// Tries until it succeeds, or the wait is over: false then. `attempt(end)` tries until then.
  template <class Missing, class Attempt>
  bool persist(const detail::FrameTrailer& trailer, const detail::Watch& concern, Wait& wait,
               const Missing& missing, const Attempt& attempt) {
    while (true) {
      const Deadline now = Clock::now();
      const bool is_late = now >= wait.time.deadline();
      if (attempt(is_late ? now : std::min(now + kTalkEvery, wait.time.deadline()))) {
        return true;
      }
      throw_if_told(trailer.call, concern);
      if (is_late &&
          (wait.talk == nullptr || now >= wait.time.latest() || wait.talk->is_settled(missing()))) {
        return false;
      }
      wait.notice.say(now, [&] { return missing_text(missing(), trailer); });
      if (wait.talk == nullptr && !is_late) {
        wait.talk = begin_long_wait(wait.time, wait.limit);
      }
      if (wait.talk != nullptr) {
        wait.talk->look(missing);
      }
      if (is_late) {
        std::this_thread::sleep_for(kWhileSettling);
      }
    }
  }

  /// Whom a wait for `from` misses, of those awaited: calls that wait for several take them in
  /// order.
  [[nodiscard]] std::vector<int> missing_of(int from, const detail::FrameTrailer& expected,
                                            std::span<const int> awaited) {
    std::vector<int> missing{from};
    mailbox_->look();
    for (const int member : awaited) {
      const int r = group_rank(member);
      if (r != rank_ && std::count(missing.begin(), missing.end(), r) == 0 &&
          !mailbox_->has(member, expected.call, channel_)) {
        missing.push_back(r);
      }
    }
    std::sort(missing.begin(), missing.end());
    return missing;
  }

  [[nodiscard]] std::string missing_text(const std::vector<int>& missing,
                                         const detail::FrameTrailer& expected) const {
    const std::string open = recorder() != nullptr ? recorder()->open_call() : "";
    return fmt::format(
        "group {}: rank {} has waited for rank {} to come to {} #{} over the control plane{}",
        name_, rank_, detail::joined(missing, ", "), to_string(expected.call), expected.sequence,
        open.empty() ? "" : ", in " + open);
  }

  /// The last step of a call: throws where one of `watched` has left without having finished it.
  void fail_if_left(const detail::FrameTrailer& trailer, std::span<const int> watched,
                    Deadline earliest) {
    look_from(earliest);
    throw_if_told(trailer.call, watch(trailer, watched));
  }

  /// Takes in what has come. Does nothing before `earliest`.
  void look_from(Deadline earliest) {
    if (size() > 1 && Clock::now() >= earliest) {
      mailbox_->look();
    }
  }

  void throw_if_told(detail::ControlCall call, const detail::Watch& concern) {
    if (const auto notice = mailbox_->notices().first(concern)) {
      heard_ = true;
      detail::GiveUp::deserialize(notice->reason).raise(to_string(call), name_);
    }
    if (const auto left = mailbox_->who_left(call, concern)) {
      fail_left(call, group_rank(*left));
    }
  }

  void flush(int to, const detail::FrameTrailer& trailer, Wait& wait) {
    const auto concern = watch(trailer, members_);
    if (!persist(
            trailer, concern, wait, [to] { return std::vector{to}; },
            [&](Deadline end) { return mailbox_->flush(members_[index(to)], concern, end); })) {
      wait.missing.push_back(to);
    }
  }

  void fail_if_missing(const detail::FrameTrailer& trailer, const Wait& wait) {
    if (!wait.missing.empty()) {
      mailbox_->look();
      throw_if_told(trailer.call, watch(trailer, members_));
      const std::vector<int> blamed =
          wait.talk != nullptr ? wait.talk->at_fault(wait.missing) : wait.missing;
      throw TimeoutError(
          fmt::format("{} #{} of group {} ({} ranks): rank {} did not arrive within {}{}",
                      to_string(trailer.call), trailer.sequence, name_, size(),
                      detail::joined(blamed, ", "), wait.time.describe(wait.limit),
                      detail::waiting_themselves(wait.missing, blamed)),
          blamed);
    }
  }

  std::shared_ptr<detail::Mailbox> mailbox_;
  std::chrono::milliseconds limit_;
  std::string name_;
  std::vector<int> members_;  // ranks in the messenger, by rank in this group
  int rank_ = 0;
  std::uint64_t channel_ = 0;
  bool given_once_;  // no later group has this channel
  Deadline told_ =
      Deadline::min();  // when this rank arrived in the last call in which all wait for all
  std::vector<Deadline> exchanged_;  // when it last sent to each in an exchange
  // Others may give up, or look who has, while a thread is in a call.
  std::atomic<bool> heard_{false};  // that another rank has left
  static constexpr std::uint64_t kLeft = std::uint64_t{1} << 32;
  // Calls finished, and above them whether this rank has left: in one word, so that what it tells
  // the others is the call under way.
  std::atomic<std::uint64_t> progress_{0};
};

}  // namespace cohort
