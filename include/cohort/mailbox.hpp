// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>
#include <time.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <set>
#include <span>
#include <string_view>
#include <thread>
#include <tuple>
#include <unordered_set>
#include <utility>
#include <vector>

#include "cohort/error.hpp"
#include "cohort/messenger.hpp"
#include "cohort/owner_process.hpp"

/// \file
/// The mailbox, which lets many groups and threads share the messages of one messenger, and what a
/// message carries for it.

namespace cohort::detail {

/// What a message is part of. The last four are no calls: a rank tells the others that it has
/// left, because of an error or in good order; it asks one for whom that waits, and is told.
enum class ControlCall : std::uint32_t {
  all_gather,
  barrier,
  broadcast,
  exchange,
  gave_up,
  left,
  asks,
  waits
};

[[nodiscard]] constexpr std::string_view to_string(ControlCall call) noexcept {
  switch (call) {
    case ControlCall::all_gather:
      return "all_gather";
    case ControlCall::barrier:
      return "barrier";
    case ControlCall::broadcast:
      return "broadcast";
    case ControlCall::exchange:
      return "exchange";
    case ControlCall::gave_up:
      return "notice";
    case ControlCall::left:
      return "goodbye";
    case ControlCall::asks:
      return "question";
    case ControlCall::waits:
      return "answer";
  }
  return "unknown call";
}

/// What each payload carries at its end, where adding and removing it moves no byte of the payload:
/// the group, the call and its number in that group.
struct FrameTrailer {
  std::uint64_t channel = 0;
  ControlCall call = ControlCall::all_gather;
  std::uint32_t sequence = 0;
};

/// What a rank said when it left a group.
struct Notice {
  int from = 0;                ///< Rank in the messenger.
  std::uint32_t sequence = 0;  ///< The first collective call of the group that it did not finish.
  Bytes reason;
};

/// Whose notices concern a call: this rank's always do.
struct Watch {
  std::uint64_t channel = 0;
  std::span<const int> ranks;  ///< In the messenger.
  /// The number of the call: who left a later one has finished this one. Nothing where calls are
  /// not numbered.
  std::optional<std::uint32_t> sequence;
  /// In the messenger: whose messages the call still needs. None comes behind a goodbye.
  std::span<const int> awaited = {};
};

/// Sorts the messages of one messenger by group and sender, so that many groups share it, each used
/// by a thread of its own.
///
/// A thread that is alone waits inside the messenger, which is fastest. Where others want the
/// messenger too, each looks into it for a moment and waits outside, so that none keeps another
/// from its messages.
class Mailbox {
 public:
  struct Frame {
    FrameTrailer trailer;
    Bytes payload;
  };

  explicit Mailbox(std::shared_ptr<Messenger> messenger) : messenger_(std::move(messenger)) {}

  /// One that a forked child of its owner keeps for good, with its messenger: the end of either
  /// there would speak to the parent's peers, sending once more what the parent has not sent yet,
  /// or wait for threads that the child has not got.
  [[nodiscard]] static std::shared_ptr<Mailbox> shared(std::shared_ptr<Messenger> messenger) {
    return {new Mailbox(std::move(messenger)), [](Mailbox* mailbox) {
              if (mailbox->owner_.is_here()) {
                delete mailbox;
              } else {
                mailbox->inherited_before_ = inherited.exchange(mailbox);
              }
            }};
  }

  [[nodiscard]] Messenger& messenger() noexcept { return *messenger_; }
  [[nodiscard]] const OwnerProcess& owner() const noexcept { return owner_; }

  void send(int to, const FrameTrailer& trailer, Bytes payload) {
    const auto lock = enter();
    if (to == messenger_->rank()) {
      pending_[key(trailer, to)].push_back({trailer, std::move(payload)});
      return;
    }
    std::array<std::byte, sizeof(trailer)> bytes{};
    std::memcpy(bytes.data(), &trailer, sizeof(trailer));
    payload.insert(payload.end(), bytes.begin(), bytes.end());
    messenger_->send(to, std::move(payload));
  }

  /// The next frame of that kind of call from a rank, or nothing: at the deadline, or as soon as
  /// `notice` or `who_left` has something to tell. What has arrived by then counts, also where the
  /// deadline has passed before the call.
  std::optional<Frame> receive(int from, ControlCall call, const Watch& watch, Deadline deadline) {
    const Key wanted = key({watch.channel, call, 0}, from);
    // Ranks that keep sending to other groups do not keep this one beyond its limit, which the
    // waits for several ranks share.
    const Deadline drained = std::max(deadline + kDraining, Clock::now() + kSlice);
    Rest rest;
    Deadline next_look{};
    auto lock = enter();
    while (true) {
      if (auto frame = take(wanted)) {
        return frame;
      }
      if (from == messenger_->rank()) {
        return std::nullopt;  // own messages are there before anyone can ask for them
      }
      if (notice(watch)) {
        while (take_in() && Clock::now() < drained) {
        }
        return take(wanted);  // what has arrived before the notice counts
      }
      if (first_gone(call, watch)) {
        return std::nullopt;
      }
      store_kept();
      const auto start = Clock::now();
      const bool shared = start < shared_until_;
      if (auto message =
              messenger_->receive(from, shared ? start : std::min(deadline, start + kSlice))) {
        store(from, std::move(*message));
        if (start < drained) {
          continue;
        }
        return take(wanted);
      }
      if (start >= deadline) {  // by the clock before the look: this thread may not have run since
        return std::nullopt;
      }
      if (const auto now = Clock::now(); now >= next_look) {
        next_look = now + kSlice;
        if (take_in()) {
          continue;
        }
      }
      if (shared || in_front_ > 0) {
        rest(lock, *this);
      }
    }
  }

  /// Takes in what has come by now, from whomever and for whichever group, until nothing more is
  /// there: for `kDraining` at most, where ranks go on sending.
  void look() {
    const Deadline end = Clock::now() + kDraining;
    auto lock = enter();
    while (take_in() && Clock::now() < end) {
      lock.unlock();  // others come in between
      lock = enter();
    }
  }

  /// The same for those who ask all the time: does nothing within some milliseconds of the last
  /// look of any group, nor while another thread is inside, which takes in what comes itself.
  void look_now_and_then() {
    if (owner_.is_here() && tick() > looked_.load(std::memory_order_relaxed)) {
      if (const std::unique_lock lock(mutex_, std::try_to_lock); lock.owns_lock()) {
        take_in();
      }
    }
  }

  /// Whether a frame of that kind of call from a rank has been taken in.
  [[nodiscard]] bool has(int from, ControlCall call, std::uint64_t channel) {
    const auto lock = enter();
    return pending_.count(key({channel, call, 0}, from)) > 0;
  }

  /// The first rank that left in good order without what a call still awaits of it, of the goodbyes
  /// taken in.
  [[nodiscard]] std::optional<int> who_left(ControlCall call, const Watch& watch) {
    if (watch.awaited.empty()) {
      return std::nullopt;
    }
    const auto lock = enter();
    return first_gone(call, watch);
  }

  // Questions, of which `sequence` is the number of the inquiry that they are part of.

  /// What a rank wants to know: for whom this one waits.
  struct Question {
    int from = 0;
    FrameTrailer trailer;
  };
  /// For whom a rank waits, in the messenger; for nobody any more where that is empty.
  struct Answer {
    int from = 0;
    std::vector<int> waits_for;
  };

  /// A wait in a group begins, and ends, during which this rank answers.
  void begin_wait(std::uint64_t channel) {
    const auto lock = enter_inquiries();
    ++waits_[channel];
  }
  void end_wait(std::uint64_t channel) {
    const auto lock = enter_inquiries();
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
    const auto lock = enter_inquiries();
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
    const auto lock = enter_inquiries();
    answers_[++inquiries_];
    return inquiries_;
  }
  void end_inquiry(std::uint32_t number) {
    const auto lock = enter_inquiries();
    answers_.erase(number);
  }
  /// In the order in which they have been taken in.
  [[nodiscard]] std::vector<Answer> take_answers(std::uint32_t number) {
    const auto lock = enter_inquiries();
    const auto found = answers_.find(number);
    return found != answers_.end() ? std::exchange(found->second, {}) : std::vector<Answer>{};
  }

  /// Whether a goodbye of a rank has been taken in.
  [[nodiscard]] bool has_left(std::uint64_t channel, int from) {
    const auto lock = enter();
    return goodbyes_.count({channel, from}) > 0;
  }

  /// The first notice that concerns a call, of those taken in. Waits for nobody, and costs nothing
  /// where there is none.
  [[nodiscard]] std::optional<Notice> notice(const Watch& watch) {
    if (!has_notices_.load(std::memory_order_relaxed)) {
      return std::nullopt;
    }
    const std::lock_guard lock(notices_mutex_);
    const auto of_group = notices_.find(watch.channel);
    if (of_group == notices_.end()) {
      return std::nullopt;
    }
    const auto concerns = [&](const Notice& notice) {
      return notice.from == messenger_->rank() ||
             (std::count(watch.ranks.begin(), watch.ranks.end(), notice.from) > 0 &&
              (!watch.sequence ||
               static_cast<std::int32_t>(notice.sequence - *watch.sequence) <= 0));
    };
    const auto found = std::find_if(of_group->second.begin(), of_group->second.end(), concerns);
    return found != of_group->second.end() ? std::optional(*found) : std::nullopt;
  }

  /// Takes in why this rank leaves. False where it has said so before: the first cause stays.
  bool note_own(std::uint64_t channel, std::span<const std::byte> reason) {
    const std::lock_guard lock(notices_mutex_);
    auto& of_group = notices_[channel];
    const auto is_own = [&](const Notice& notice) { return notice.from == messenger_->rank(); };
    if (std::any_of(of_group.begin(), of_group.end(), is_own)) {
      return false;
    }
    of_group.push_back({messenger_->rank(), 0, Bytes(reason.begin(), reason.end())});
    has_notices_.store(true, std::memory_order_relaxed);
    return true;
  }

  /// Takes in what another rank says. Waits for nobody.
  void note(std::uint64_t channel, int from, std::uint32_t sequence,
            std::span<const std::byte> reason) {
    const std::lock_guard lock(notices_mutex_);
    notices_[channel].push_back({from, sequence, Bytes(reason.begin(), reason.end())});
    has_notices_.store(true, std::memory_order_relaxed);
  }

  /// `Messenger::flush`. Ends as well as soon as `notice` has something to tell.
  bool flush(int to, const Watch& watch, Deadline deadline) {
    if (to == messenger_->rank()) {
      return true;
    }
    Rest rest;
    Deadline next_look{};
    auto lock = enter();
    while (true) {
      const auto start = Clock::now();
      const bool shared = start < shared_until_;
      if (messenger_->flush(to, std::min(deadline, start + (shared ? kMoment : kSlice)))) {
        return true;
      }
      if (const auto now = Clock::now(); now >= next_look) {
        next_look = now + kSlice;
        take_in();
      }
      if (start >= deadline || notice(watch)) {
        return false;
      }
      if (shared || in_front_ > 0) {
        rest(lock, *this);
      }
    }
  }

  /// Forgets a group: what has come for it, and what may still come.
  void retire(std::uint64_t channel) noexcept {
    if (!owner_.is_here()) {
      return;
    }
    try {
      const auto lock = enter();
      constexpr int kLowest = std::numeric_limits<int>::min();
      const auto begin = pending_.lower_bound({channel, false, kLowest});
      auto end = begin;
      while (end != pending_.end() && std::get<0>(end->first) == channel) {
        ++end;
      }
      pending_.erase(begin, end);
      goodbyes_.erase(goodbyes_.lower_bound({channel, kLowest}),
                      goodbyes_.upper_bound({channel, std::numeric_limits<int>::max()}));
      {
        const std::lock_guard notices(notices_mutex_);
        notices_.erase(channel);
        has_notices_.store(!notices_.empty(), std::memory_order_relaxed);
      }
      if (retired_.insert(channel).second) {
        retired_in_order_.push_back(channel);
      }
      if (retired_in_order_.size() > kMostRetired) {
        retired_.erase(retired_in_order_.front());
        retired_in_order_.pop_front();
      }
    } catch (const std::bad_alloc&) {
      return;  // what comes for the group stays until the mailbox goes
    }
  }

  /// Messages that nobody has asked for yet.
  [[nodiscard]] std::size_t held() {
    const auto lock = enter();
    std::size_t count = 0;
    for (const auto& [key, frames] : pending_) {
      count += frames.size();
    }
    const std::lock_guard for_notices(notices_mutex_);
    for (const auto& [channel, notices] : notices_) {
      count += static_cast<std::size_t>(
          std::count_if(notices.begin(), notices.end(),
                        [&](const Notice& notice) { return notice.from != messenger_->rank(); }));
    }
    return count;
  }

  void abandon() noexcept {
    if (owner_.is_here()) {
      const auto lock = enter();
      messenger_->abandon();
    }
  }

 private:
  // Waits inside the messenger end this often, so that others can come in.
  static constexpr std::chrono::milliseconds kSlice{2};
  // The same for messengers that make progress only inside, while others want to come in.
  static constexpr std::chrono::microseconds kMoment{50};
  // How long messages that have arrived are still taken in behind a deadline.
  static constexpr std::chrono::milliseconds kDraining{100};
  // How long threads stay out of the messenger after they have met in front of it.
  static constexpr std::chrono::seconds kSharing{1};
  static constexpr std::size_t kMostRetired = 4096;
  static constexpr std::size_t kMostQuestions = 4096;

  using Key = std::tuple<std::uint64_t, bool, int>;  // channel, whether of an exchange, sender

  [[nodiscard]] static Key key(const FrameTrailer& trailer, int from) noexcept {
    return {trailer.channel, trailer.call == ControlCall::exchange, from};
  }

  /// A waiting thread stays outside for a while, longer each time: first it leaves the processor to
  /// others, then it sleeps until a message is stored or its time is over.
  class Rest {
   public:
    void operator()(std::unique_lock<std::mutex>& lock, Mailbox& mailbox) {
      ++rests_;
      if (rests_ <= kYields && mailbox.in_front_ == 0) {
        lock.unlock();
        std::this_thread::yield();
        lock = mailbox.enter();
        return;
      }
      const std::chrono::microseconds time(std::min<std::int64_t>(kLongest, 10 * rests_));
      ++mailbox.sleepers_;
      mailbox.stored_.wait_for(lock, time);
      --mailbox.sleepers_;
    }

   private:
    static constexpr std::int64_t kYields = 64;
    static constexpr std::int64_t kLongest = 500;  // µs
    std::int64_t rests_ = 0;
  };

  /// Throws `UsageError` in a forked child of the owner, which must not call the messenger, and
  /// where another thread may have held the mutex.
  [[nodiscard]] std::unique_lock<std::mutex> enter() {
    owner_.check("control plane");
    std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) {
      ++in_front_;
      lock.lock();
      --in_front_;
      shared_until_ = Clock::now() + kSharing;
    }
    return lock;
  }

  /// The same for what concerns questions alone, which waits for no thread in the messenger.
  [[nodiscard]] std::unique_lock<std::mutex> enter_inquiries() {
    owner_.check("control plane");
    return std::unique_lock(inquiries_mutex_);
  }

  /// Messages of a pair keep their order: what a rank sent before its goodbye is in `pending_`.
  [[nodiscard]] std::optional<int> first_gone(ControlCall call, const Watch& watch) const {
    if (!goodbyes_.empty()) {
      for (const int r : watch.awaited) {
        if (goodbyes_.count({watch.channel, r}) > 0 &&
            pending_.count(key({watch.channel, call, 0}, r)) == 0) {
          return r;
        }
      }
    }
    return std::nullopt;
  }

  std::optional<Frame> take(const Key& wanted) {
    const auto it = pending_.find(wanted);
    if (it == pending_.end() || it->second.empty()) {
      return std::nullopt;
    }
    Frame frame = std::move(it->second.front());
    it->second.pop_front();
    if (it->second.empty()) {
      pending_.erase(it);
    }
    return frame;
  }

  /// Of a clock that costs nothing to ask, in ms.
  [[nodiscard]] static std::int64_t tick() noexcept {
    timespec now{};
    ::clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return std::int64_t{now.tv_sec} * 1000 + now.tv_nsec / 1'000'000;
  }

  /// Whether anything came. What fails is left to those who wait.
  bool take_in() {
    looked_.store(tick(), std::memory_order_relaxed);
    const Deadline end = Clock::now() + kSlice;
    bool any = false;
    do {
      store_kept();
      std::optional<Messenger::Arrival> arrival;
      try {
        arrival = messenger_->receive_any();
      } catch (const TransportError&) {
        return any;
      }
      if (!arrival) {
        return any;
      }
      store(arrival->from, std::move(arrival->message));
      any = true;
    } while (Clock::now() < end);
    return any;
  }

  /// Of what was taken from the messenger. `store_kept` comes first, so that it can be kept where
  /// there is no memory to store it, and is stored before anything else.
  void store(int from, Bytes message) {
    kept_ = Messenger::Arrival{from, std::move(message)};
    store_kept();
  }
  void store_kept() {
    if (!kept_) {
      return;
    }
    const int from = kept_->from;
    Bytes& message = kept_->message;
    FrameTrailer trailer;
    if (message.size() < sizeof(trailer)) {
      const std::size_t size = message.size();
      kept_.reset();
      throw TransportError(
          {.call = "Messenger::receive", .rank = messenger_->rank()},
          fmt::format("a message of {} bytes from rank {} is no control message", size, from));
    }
    const std::size_t payload = message.size() - sizeof(trailer);
    std::memcpy(&trailer, message.data() + payload, sizeof(trailer));
    if (trailer.call == ControlCall::waits) {
      store_answer(from, trailer.sequence, std::span(message).first(payload));
    } else if (trailer.call == ControlCall::asks) {
      store_question(from, trailer);
    } else if (retired_.count(trailer.channel) == 0) {
      if (trailer.call == ControlCall::gave_up) {
        note(trailer.channel, from, trailer.sequence, std::span(message).first(payload));
      } else if (trailer.call == ControlCall::left) {
        goodbyes_.insert({trailer.channel, from});
      } else {
        auto& frames = pending_[key(trailer, from)];
        frames.emplace_back();
        message.resize(payload);
        frames.back() = {trailer, std::move(message)};
      }
    }
    kept_.reset();
    if (sleepers_ > 0) {
      stored_.notify_all();
    }
  }

  void store_answer(int from, std::uint32_t number, std::span<const std::byte> payload) {
    const std::lock_guard lock(inquiries_mutex_);
    if (const auto inquiry = answers_.find(number); inquiry != answers_.end()) {
      std::vector<int> waits_for(payload.size() / sizeof(int));
      if (!waits_for.empty()) {
        std::memcpy(waits_for.data(), payload.data(), waits_for.size() * sizeof(int));
      }
      inquiry->second.push_back({from, std::move(waits_for)});
    }
  }
  void store_question(int from, const FrameTrailer& trailer) {
    const std::lock_guard lock(inquiries_mutex_);
    if (questions_.size() >= kMostQuestions) {  // of waits that have long been over
      questions_.clear();
    }
    questions_[{from, trailer.sequence}] = trailer.channel;
    has_questions_.store(true, std::memory_order_relaxed);
  }

  inline static std::atomic<Mailbox*> inherited{nullptr};  // what a child keeps, by the last
  Mailbox* inherited_before_ = nullptr;
  OwnerProcess owner_;
  std::shared_ptr<Messenger> messenger_;
  std::mutex mutex_;  // of everything below that is not atomic, and of the messenger
  std::condition_variable stored_;
  std::atomic<int> in_front_{0};  // threads in front of the mutex
  int sleepers_ = 0;
  Deadline shared_until_{};
  std::optional<Messenger::Arrival> kept_;  // what there was no memory to store
  std::map<Key, std::deque<Frame>> pending_;
  std::set<std::pair<std::uint64_t, int>> goodbyes_;  // channel, sender
  std::unordered_set<std::uint64_t> retired_;
  std::deque<std::uint64_t> retired_in_order_;
  std::atomic<std::int64_t> looked_{0};  // when, by `tick`
  std::mutex notices_mutex_;             // of the notices alone, and never held for long
  std::map<std::uint64_t, std::vector<Notice>> notices_;
  std::atomic<bool> has_notices_{false};
  std::mutex inquiries_mutex_;          // of what follows, and never held for long
  std::map<std::uint64_t, int> waits_;  // how many threads wait for long, by channel
  std::map<std::pair<int, std::uint32_t>, std::uint64_t> questions_;  // sender, inquiry: channel
  std::atomic<bool> has_questions_{false};
  std::uint32_t inquiries_ = 0;
  std::map<std::uint32_t, std::vector<Answer>> answers_;  // of inquiries under way, by number
};

}  // namespace cohort::detail
