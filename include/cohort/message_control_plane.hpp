// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cohort/attendance.hpp"
#include "cohort/call_time.hpp"
#include "cohort/control_frame.hpp"
#include "cohort/control_plane.hpp"
#include "cohort/control_talk.hpp"
#include "cohort/control_wait.hpp"
#include "cohort/error.hpp"
#include "cohort/give_up.hpp"
#include "cohort/inquiry.hpp"
#include "cohort/mailbox.hpp"
#include "cohort/membership.hpp"
#include "cohort/messenger.hpp"
#include "cohort/runtime_env.hpp"

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
        group_(std::move(name), mailbox_->messenger().rank(), mailbox_->messenger().size()),
        given_once_(false),
        exchanged_(group_.members().size(), Deadline::min()) {
    if (!is_time_limit(limit)) {
      throw ConfigError(fmt::format("control plane {}: expected a time limit of 1 to {} ms, got {}",
                                    group_.name(), kLongestTimeLimit.count(), limit.count()));
    }
  }

  /// Drops what peers have sent to a group that ends before it has taken it.
  ~MessageControlPlane() override {
    if (poisoned() || given_once_) {
      mailbox_->retire(group_.channel());
    }
  }

  [[nodiscard]] int rank() const noexcept override { return group_.rank(); }
  [[nodiscard]] int size() const noexcept override { return group_.size(); }
  [[nodiscard]] const std::string& name() const noexcept override { return group_.name(); }
  [[nodiscard]] std::chrono::milliseconds limit() const noexcept override { return limit_; }
  [[nodiscard]] bool poisoned() const noexcept override { return attendance_.has_left(); }

  [[nodiscard, gnu::hot]] bool is_calm() const noexcept override {
    return !attendance_.has_left() && mailbox_->is_calm();
  }

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
    group_.check_rank("broadcast root", root);
    const auto trailer = attendance_.begin(detail::ControlCall::broadcast);
    return attendance_.leave_on_error(nullptr, [&] {
      if (rank() == root) {
        for (int r = 0; r < size(); ++r) {
          if (r != rank()) {
            send(r, trailer, mine);
          }
        }
        fail_if_left(trailer, told_ + shortest(limit_));
        attendance_.finish(trailer);
        return Bytes(mine.begin(), mine.end());
      }
      auto wait = begin_wait(limit_);
      auto payload = wait.receive(root, trailer, group_.only(root));
      wait.fail_if_missing(trailer);
      fail_if_left(trailer, told_ + shortest(limit_));
      attendance_.finish(trailer);
      return payload;
    });
  }

  std::vector<Bytes> exchange(std::vector<Outgoing> outgoing,
                              std::span<const Incoming> incoming) override {
    attendance_.check(detail::ControlCall::exchange);
    for (const auto& message : outgoing) {
      group_.check_rank("exchange to", message.to);
    }
    for (const auto& message : incoming) {
      group_.check_rank("exchange from", message.from);
    }
    // Pairs count for themselves: the two ends of an exchange need not make the same calls.
    const detail::FrameTrailer trailer{group_.channel(), detail::ControlCall::exchange, 0};
    return attendance_.leave_on_error(nullptr, [&] {
      refuse_if_left(outgoing);
      for (auto& message : outgoing) {
        mailbox_->send(group_.member(message.to), trailer, std::move(message.payload));
      }
      auto wait = begin_wait(limit_);
      std::vector<int> awaited;
      for (const auto& message : incoming) {
        awaited.push_back(group_.member(message.from));
      }
      std::vector<Bytes> payloads;
      for (const auto& [from, bytes] : incoming) {
        payloads.push_back(
            wait.receive(from, trailer, std::span(awaited).subspan(payloads.size())));
        if (wait.missing().empty() && bytes != kAnyBytes && payloads.back().size() != bytes) {
          throw SymmetryError(fmt::format("exchange in group {}: rank {} sent {} bytes where rank "
                                          "{} expected {}",
                                          name(), from, payloads.back().size(), rank(), bytes),
                              {from});
        }
      }
      wait.fail_if_missing(trailer);
      if (!incoming.empty()) {
        for (const auto& message : outgoing) {
          wait.flush(message.to, trailer);
        }
        wait.fail_if_missing(trailer);
      }
      // Who waits for a message has taken the one before, so it began after that was sent.
      Deadline before = Deadline::max() - shortest(limit_);
      for (const auto& message : outgoing) {
        before = std::min(before, std::exchange(exchanged_[index(message.to)], wait.start()));
      }
      look_from(before + shortest(limit_));
      for (const auto& message : outgoing) {
        attendance_.throw_if_told(trailer.call,
                                  attendance_.watch(trailer, group_.only(message.to)));
      }
      attendance_.finish(trailer);
      return payloads;
    });
  }

  void leave_with(const detail::GiveUp& why) noexcept override { attendance_.leave_with(why); }

  [[nodiscard]] std::optional<detail::GiveUp> left_with() const override {
    return attendance_.left_with();
  }

  void when_left(std::function<void()> end) override { attendance_.when_left(std::move(end)); }

  void leave_in_order() noexcept override {
    if (given_once_) {
      attendance_.leave_in_order();
    }
  }

  [[nodiscard]] std::unique_ptr<detail::LongWait> begin_long_wait(
      const detail::LimitedWait& time, std::chrono::milliseconds limit) noexcept override {
    return detail::begin_talk(*mailbox_, group_, recorder(), time, limit);
  }

  std::unique_ptr<ControlPlane> subgroup(std::span<const int> ranks, std::uint64_t generation,
                                         std::string name) override {
    return std::unique_ptr<ControlPlane>(new MessageControlPlane(
        mailbox_, limit_, group_.subgroup(ranks, generation, std::move(name)),
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
    attendance_.leave_if_told();
  }

 private:
  static_assert(sizeof(detail::FrameTrailer) == kTrailerBytes);

  MessageControlPlane(std::shared_ptr<detail::Mailbox> mailbox, std::chrono::milliseconds limit,
                      detail::Membership group, bool given_once)
      : mailbox_(std::move(mailbox)),
        limit_(limit),
        group_(std::move(group)),
        given_once_(given_once),
        exchanged_(group_.members().size(), Deadline::min()) {}

  /// For how long behind its last arrival a rank takes it that nobody has left: less than the
  /// others' waits last. Any of their threads may leave earlier, so calls that do not follow each
  /// other at once look as well.
  static Deadline::duration shortest(std::chrono::milliseconds limit) noexcept {
    constexpr std::chrono::milliseconds kAtOnce{1};
    return std::min<Deadline::duration>(limit / 8, kAtOnce);
  }

  static std::size_t index(int rank) noexcept { return static_cast<std::size_t>(rank); }

  [[nodiscard]] detail::ControlWait begin_wait(std::chrono::milliseconds most) {
    return {*mailbox_, group_, attendance_, recorder(), most, limit_};
  }

  void send(int to, const detail::FrameTrailer& trailer, std::span<const std::byte> payload) {
    mailbox_->send(group_.member(to), trailer, detail::copy_with_room(payload));
  }

  void gather(detail::ControlCall call, std::span<const std::byte> mine,
              std::chrono::milliseconds limit, Arrivals& arrivals, const detail::GiveUp* excuse) {
    auto& all = arrivals.payloads;
    all.resize(group_.members().size());
    int next_rank = 0;
    auto wait = begin_wait(limit);
    try {
      const auto trailer = attendance_.begin(call);
      attendance_.leave_on_error(excuse, [&] {
        for (int step = 1; step < size(); ++step) {
          send((rank() + step) % size(), trailer, mine);
        }
        for (; next_rank < size(); ++next_rank) {
          all[index(next_rank)] = next_rank == rank()
                                      ? Bytes(mine.begin(), mine.end())
                                      : wait.receive(next_rank, trailer, group_.from(next_rank));
        }
        wait.fail_if_missing(trailer);
        for (int r = 0; r < size(); ++r) {
          wait.flush(r, trailer);
        }
        wait.fail_if_missing(trailer);
        // The others have come to this call after they had this rank's last arrival.
        fail_if_left(trailer, std::exchange(told_, wait.start()) + shortest(wait.limit()));
        attendance_.finish(trailer);
      });
    } catch (...) {
      arrivals.absent = wait.missing();
      for (; next_rank < size(); ++next_rank) {
        arrivals.absent.push_back(next_rank);
      }
      throw;
    }
  }

  /// Messages to a rank that has left would be lost.
  void refuse_if_left(const std::vector<Outgoing>& outgoing) {
    if (outgoing.empty()) {
      return;
    }
    mailbox_->look_now_and_then();
    for (const auto& message : outgoing) {
      if (mailbox_->has_left(group_.channel(), group_.member(message.to))) {
        attendance_.fail_left(detail::ControlCall::exchange, message.to);
      }
    }
  }

  /// The last step of a call: throws where any has left without having finished it.
  void fail_if_left(const detail::FrameTrailer& trailer, Deadline earliest) {
    look_from(earliest);
    attendance_.throw_if_told(trailer.call, attendance_.watch(trailer, group_.members()));
  }

  /// Takes in what has come. Does nothing before `earliest`.
  void look_from(Deadline earliest) {
    if (size() > 1 && Clock::now() >= earliest) {
      mailbox_->look();
    }
  }

  std::shared_ptr<detail::Mailbox> mailbox_;
  std::chrono::milliseconds limit_;
  detail::Membership group_;
  detail::Attendance attendance_{*mailbox_, group_};
  bool given_once_;  // no later group has this channel
  Deadline told_ =
      Deadline::min();  // when this rank arrived in the last call in which all wait for all
  std::vector<Deadline> exchanged_;  // when it last sent to each in an exchange
};

}  // namespace cohort
