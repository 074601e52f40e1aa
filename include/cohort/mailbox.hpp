// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <set>
#include <span>
#include <thread>
#include <tuple>
#include <unordered_set>
#include <utility>

#include "cohort/control_frame.hpp"
#include "cohort/error.hpp"
#include "cohort/messenger.hpp"
#include "cohort/notice_board.hpp"
#include "cohort/owner_process.hpp"
#include "cohort/question_box.hpp"

/// \file
/// The mailbox, which lets many groups and threads share the messages of one messenger.

namespace cohort::detail {

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

  explicit Mailbox(std::shared_ptr<Messenger> messenger)
      : messenger_(std::move(messenger)), notices_(messenger_->rank()) {}

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
  /// Who has left, of what has been taken in.
  [[nodiscard]] NoticeBoard& notices() noexcept { return notices_; }
  /// What has been asked and answered, of what has been taken in.
  [[nodiscard]] QuestionBox& questions() noexcept { return questions_; }

  void send(int to, const FrameTrailer& trailer, Bytes payload) {
    const auto lock = enter();
    if (to == messenger_->rank()) {
      pending_[key(trailer, to)].push_back({trailer, std::move(payload)});
      return;
    }
    append(payload, trailer);
    messenger_->send(to, std::move(payload));
  }

  /// The next frame of that kind of call from a rank, or nothing: at the deadline, or as soon as
  /// a notice or `who_left` has something to tell. What has arrived by then counts, also where the
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
      if (notices_.first(watch)) {
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

  /// Whether `look_now_and_then` would do nothing, and no rank is known to have left a group.
  [[nodiscard]] bool is_calm() const noexcept {
    return !notices_.any() && tick() <= looked_.load(std::memory_order_relaxed);
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

  /// Whether a goodbye of a rank has been taken in.
  [[nodiscard]] bool has_left(std::uint64_t channel, int from) {
    const auto lock = enter();
    return goodbyes_.count({channel, from}) > 0;
  }

  /// `Messenger::flush`. Ends as well as soon as a notice concerns the call.
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
      if (start >= deadline || notices_.first(watch)) {
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
      notices_.forget(channel);
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
    return count + notices_.held();
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
    const auto found = trailer_of(message);
    if (!found) {
      const std::size_t size = message.size();
      kept_.reset();
      throw TransportError(
          {.call = "Messenger::receive", .rank = messenger_->rank()},
          fmt::format("a message of {} bytes from rank {} is no control message", size, from));
    }
    const FrameTrailer& trailer = *found;
    const std::size_t payload = message.size() - sizeof(trailer);
    if (trailer.call == ControlCall::waits) {
      questions_.store_answer(from, trailer.sequence, std::span(message).first(payload));
    } else if (trailer.call == ControlCall::asks) {
      questions_.store_question(from, trailer);
    } else if (retired_.count(trailer.channel) == 0) {
      if (trailer.call == ControlCall::gave_up) {
        notices_.note(trailer.channel, from, trailer.sequence, std::span(message).first(payload));
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

  inline static std::atomic<Mailbox*> inherited{nullptr};  // what a child keeps, by the last
  Mailbox* inherited_before_ = nullptr;
  OwnerProcess owner_;
  std::shared_ptr<Messenger> messenger_;
  NoticeBoard notices_;
  QuestionBox questions_;
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
};

}  // namespace cohort::detail
