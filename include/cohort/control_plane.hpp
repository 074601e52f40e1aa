// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cohort/call_time.hpp"
#include "cohort/error.hpp"
#include "cohort/give_up.hpp"
#include "cohort/joined.hpp"
#include "cohort/log.hpp"
#include "cohort/messenger.hpp"
#include "cohort/runtime_env.hpp"

/// \file
/// The control plane: small host-side messages between the ranks of a group, each wait with a time
/// limit that names who is missing. `ControlPlane` is what the library asks for. An engine with a
/// store or sockets of its own implements `Messenger` (two functions) and gets the rest from
/// `MessageControlPlane`; thread_control_planes.hpp connects ranks that are threads.
///
/// A rank whose call fails tells the others of the group why before it throws. Those that still
/// wait end at once with the same error, and so does a rank that comes later: it does not go on
/// alone with a result that the others never had. (A rank that arrives in the very moment, some
/// microseconds, in which another gives up on it may learn it from its next call only.)

namespace cohort {

/// Default of every wait on the host that no option sets.
inline constexpr std::chrono::milliseconds kDefaultTimeLimit{60'000};

/// Messages between the ranks of one group. Collective calls are made by every rank of the group
/// in the same order; one thread at a time uses a control plane.
class ControlPlane {
 public:
  /// Bytes for one rank, or expected of one.
  struct Outgoing {
    int to = 0;     ///< The receiver's rank.
    Bytes payload;  ///< What it gets.
  };
  /// A message that is expected.
  struct Incoming {
    int from = 0;           ///< The sender's rank.
    std::size_t bytes = 0;  ///< Its length, which the receiver knows.
  };

  /// What every message needs beyond its payload.
  static constexpr std::size_t kTrailerBytes = 16;

  ControlPlane() = default;
  ControlPlane(const ControlPlane&) = delete;
  ControlPlane& operator=(const ControlPlane&) = delete;
  virtual ~ControlPlane() = default;

  /// This rank in the group.
  [[nodiscard]] virtual int rank() const noexcept = 0;
  /// Ranks of the group.
  [[nodiscard]] virtual int size() const noexcept = 0;
  /// Name for messages, such as "world" or "dcp[1]".
  [[nodiscard]] virtual const std::string& name() const noexcept = 0;
  /// Time limit of every wait.
  [[nodiscard]] virtual std::chrono::milliseconds limit() const noexcept = 0;
  /// Whether a call of this control plane timed out or met ranks that are elsewhere. Every later
  /// call throws `TransportError`; `subgroup` alone works on.
  [[nodiscard]] virtual bool poisoned() const noexcept = 0;

  /// Collective. Every rank's bytes, in rank order; sizes may differ.
  /// Throws `TimeoutError` naming the ranks that did not arrive, `SymmetryError` naming ranks that
  /// are in another call, and what made another rank give up.
  std::vector<Bytes> all_gather(std::span<const std::byte> mine) {
    return all_gather_within(mine, limit());
  }

  /// `all_gather` with a time limit of its own.
  std::vector<Bytes> all_gather_within(std::span<const std::byte> mine,
                                       std::chrono::milliseconds limit) {
    Arrivals arrivals = gather_arrivals(mine, limit);
    if (arrivals.error) {
      std::rethrow_exception(arrivals.error);
    }
    return std::move(arrivals.payloads);
  }

  /// What came of an `all_gather`.
  struct Arrivals {
    std::vector<Bytes> payloads;  ///< By rank; empty for those that are absent.
    std::vector<int> absent;      ///< Those that did not come, in ascending order.
    std::exception_ptr error;     ///< Why it failed, if it did; what had arrived is there as well.
  };

  /// Collective. `all_gather_within` for callers that use what has arrived although it failed. A
  /// limit of zero waits for nobody. Where it fails, `excuse` is what the others learn, and the
  /// error itself where it is empty.
  virtual Arrivals gather_arrivals(std::span<const std::byte> mine, std::chrono::milliseconds limit,
                                   std::string_view excuse = {}) = 0;

  /// Collective. Returns when every rank has arrived. Throws as `all_gather`.
  virtual void barrier() = 0;

  /// Collective. The root's bytes on every rank; `mine` is read on the root alone. The root does
  /// not wait. Throws as `all_gather`.
  virtual Bytes broadcast(std::span<const std::byte> mine, int root) = 0;

  /// Moves bulk bytes between pairs: sends all of `outgoing`, then waits for all of `incoming`,
  /// whose payloads come back in the order asked for. Each receive is matched by one send of the
  /// same size; messages of a pair keep their order. Not collective.
  /// A payload with `kTrailerBytes` of spare capacity is sent without being copied.
  /// Throws `UsageError` for ranks outside the group, `TimeoutError`, and `SymmetryError` where a
  /// size differs.
  virtual std::vector<Bytes> exchange(std::vector<Outgoing> outgoing,
                                      std::span<const Incoming> incoming) = 0;

  /// Local. Leaves the group: poisons it and tells the other ranks why, so that none of them waits
  /// for this one; each gets a `SymmetryError` that names it with the reason. Nothing happens where
  /// it is poisoned already, because then they have been told. Any thread may call it.
  virtual void give_up(std::string_view reason) noexcept = 0;

  /// Local, without waiting. Throws what a rank said that has left the group, at whichever call,
  /// and leaves it as well: for ranks that wait for each other by other means. What a rank of this
  /// machine said before it did anything that can be seen here, is found. Nothing happens where
  /// this rank has left.
  virtual void check_peers() = 0;

  /// A control plane of the given ranks of this one, in the given order. Local: no message is
  /// sent, so survivors can form a group without the ranks that left. All of `ranks` pass the same
  /// list, name and generation; each generation of the same list is a group of its own. Callers
  /// choose generations below 2^62, and none again after a failure.
  /// Throws `UsageError` where the list is not a set of ranks that holds this one.
  virtual std::unique_ptr<ControlPlane> subgroup(std::span<const int> ranks,
                                                 std::uint64_t generation, std::string name) = 0;

  /// Collective. Groups the ranks by `color`, ordered by `key`, then rank. A negative color gives
  /// null.
  std::unique_ptr<ControlPlane> split(int color, int key, std::string name) {
    const std::array<std::int32_t, 3> mine{kSplit, color, key};
    const auto all = all_gather(std::as_bytes(std::span(mine)));
    const std::uint64_t generation = splits_++;
    std::vector<std::pair<std::int32_t, int>> members;
    for (std::size_t r = 0; r < all.size(); ++r) {
      std::array<std::int32_t, 3> theirs{};
      if (all[r].size() == sizeof(theirs)) {
        std::memcpy(theirs.data(), all[r].data(), sizeof(theirs));
      }
      if (theirs[0] != kSplit) {
        throw SymmetryError(fmt::format("split of group {}: rank {} is in an all_gather, not in a "
                                        "split",
                                        this->name(), r),
                            {static_cast<int>(r)});
      }
      if (theirs[1] == color) {
        members.emplace_back(theirs[2], static_cast<int>(r));
      }
    }
    if (color < 0) {
      return nullptr;
    }
    std::sort(members.begin(), members.end());
    std::vector<int> ranks;
    for (const auto& [member_key, member] : members) {
      ranks.push_back(member);
    }
    // The upper half keeps generations of split apart from those of callers of subgroup.
    return subgroup(ranks, (std::uint64_t{1} << 63) | generation, std::move(name));
  }

  /// Collective. The first of `count` generations for `subgroup` that no other caller gets, whoever
  /// shares this control plane: messages of groups that failed may be on their way for long.
  std::uint64_t new_generations(std::uint64_t count) {
    const std::array<std::uint64_t, 1> mine{kFreshGeneration | generations_};
    generations_ += count;
    const auto bytes = broadcast(std::as_bytes(std::span(mine)), 0);
    std::uint64_t first = 0;
    if (bytes.size() != sizeof(first)) {
      throw SymmetryError(
          fmt::format("generations of group {}: rank 0 is in a broadcast of its own", name()), {0});
    }
    std::memcpy(&first, bytes.data(), sizeof(first));
    return first;
  }

 protected:
  /// From here on generations are given only once, by `new_generations` and `split`.
  static constexpr std::uint64_t kFreshGeneration = std::uint64_t{1} << 62;

 private:
  static constexpr std::int32_t kSplit = 0x53706c74;
  std::uint64_t splits_ = 0;
  std::uint64_t generations_ = 0;
};

namespace detail {

/// A step of FNV-1a over 64-bit words (Fowler, Noll, Vo; RFC draft-eastlake-fnv), with a final
/// shift so that high bits reach low ones.
[[nodiscard]] constexpr std::uint64_t mix(std::uint64_t hash, std::uint64_t value) noexcept {
  hash = (hash ^ value) * 0x100000001b3ULL;
  return hash ^ (hash >> 29);
}
inline constexpr std::uint64_t kHashSeed = 0xcbf29ce484222325ULL;

static_assert(sizeof(FrameTrailer) == ControlPlane::kTrailerBytes);

}  // namespace detail

/// A control plane over a `Messenger`. Every arrival is a message that carries call and number, so
/// a rank that is missing or elsewhere can be named.
class MessageControlPlane : public ControlPlane {
 public:
  /// The group of all ranks of the messenger. Local. `COHORT_TIMEOUT_MS` wins over `limit` where it
  /// is set. Throws `ConfigError` for a time limit that is not positive or beyond
  /// `kLongestTimeLimit`.
  explicit MessageControlPlane(std::shared_ptr<Messenger> messenger,
                               std::chrono::milliseconds limit = kDefaultTimeLimit,
                               std::string name = "world")
      : mailbox_(std::make_shared<detail::Mailbox>(std::move(messenger))),
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
    if ((poisoned_ || given_once_) && mailbox_->owner().is_here()) {
      mailbox_->retire(channel_);
    }
  }

  [[nodiscard]] int rank() const noexcept override { return rank_; }
  [[nodiscard]] int size() const noexcept override { return static_cast<int>(members_.size()); }
  [[nodiscard]] const std::string& name() const noexcept override { return name_; }
  [[nodiscard]] std::chrono::milliseconds limit() const noexcept override { return limit_; }
  [[nodiscard]] bool poisoned() const noexcept override { return poisoned_; }

  Arrivals gather_arrivals(std::span<const std::byte> mine, std::chrono::milliseconds limit,
                           std::string_view excuse = {}) override {
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
    gather(detail::ControlCall::barrier, {}, limit_, arrivals, {});
  }

  Bytes broadcast(std::span<const std::byte> mine, int root) override {
    check_rank("broadcast root", root);
    const auto trailer = next(detail::ControlCall::broadcast);
    return leave_on_error(trailer.sequence, {}, [&] {
      if (rank_ == root) {
        for (int r = 0; r < size(); ++r) {
          if (r != rank_) {
            send(r, trailer, mine);
          }
        }
        fail_if_left(trailer, members_, told_ + shortest(limit_));
        return Bytes(mine.begin(), mine.end());
      }
      Wait wait(limit_);
      auto payload = receive(root, trailer, members_, wait);
      fail_if_missing(trailer, wait);
      fail_if_left(trailer, members_, told_ + shortest(limit_));
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
    return leave_on_error(sequence_, {}, [&] {
      for (auto& message : outgoing) {
        mailbox_->send(members_[index(message.to)], trailer, std::move(message.payload));
      }
      Wait wait(limit_);
      std::vector<Bytes> payloads;
      for (const auto& [from, bytes] : incoming) {
        payloads.push_back(receive(from, trailer, member(from), wait));
        if (wait.missing.empty() && payloads.back().size() != bytes) {
          throw SymmetryError(fmt::format("exchange in group {}: rank {} sent {} bytes where rank "
                                          "{} expected {}",
                                          name_, from, payloads.back().size(), rank_, bytes),
                              {from});
        }
      }
      fail_if_missing(trailer, wait);
      if (!incoming.empty()) {
        for (const auto& message : outgoing) {
          flush(message.to, wait);
        }
        fail_if_missing(trailer, wait);
      }
      for (const auto& message : outgoing) {
        // Who waits for a message has taken the one before, so it began after that was sent.
        auto& before = exchanged_[index(message.to)];
        fail_if_left(trailer, member(message.to), before + shortest(limit_));
        before = wait.time.start();
      }
      return payloads;
    });
  }

  void give_up(std::string_view reason) noexcept override {
    if (mailbox_->owner().is_here()) {
      leave(sequence_,
            [&] { return detail::GiveUp::by(rank_, fmt::format("group {}: {}", name_, reason)); });
    }
  }

  void check_peers() override {
    if (size() == 1 || poisoned_ || !mailbox_->owner().is_here()) {
      return;
    }
    const detail::Watch any{channel_, members_, std::nullopt};
    mailbox_->look(any);
    const std::uint32_t next = sequence_;
    try {
      throw_if_told({channel_, detail::ControlCall::gave_up, next}, any);
    } catch (const Error&) {
      leave(next, [&] { return detail::GiveUp::because(std::current_exception(), rank_, heard_); });
      throw;
    }
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

 private:
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

  /// One wait for several ranks, which share its time.
  struct Wait {
    explicit Wait(std::chrono::milliseconds most)
        : limit(std::min(most, kLongestTimeLimit)), time(limit) {}

    std::chrono::milliseconds limit;
    detail::LimitedWait time;
    std::vector<int> missing;
  };

  /// How long the others wait at least, who may have waited in their call before.
  static Deadline::duration shortest(std::chrono::milliseconds limit) noexcept {
    return detail::LimitedWait::least(limit);
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
    if (poisoned_) {
      throw TransportError({.call = std::string(to_string(call)), .rank = rank_, .group = name_},
                           "an earlier call of this control plane failed, so its ranks are no "
                           "longer in step; form a new group");
    }
  }

  detail::FrameTrailer next(detail::ControlCall call) {
    throw_if_poisoned(call);
    return {channel_, call, sequence_++};
  }

  /// Whatever ends a call early leaves the ranks out of step, so this one leaves the group, and
  /// tells so. Ranks that disagree are still there to take what was sent to them.
  template <class Call>
  std::invoke_result_t<Call&> leave_on_error(std::uint32_t sequence, std::string_view excuse,
                                             Call&& call) {
    const auto told = [&] {
      leave(sequence, [&] {
        return excuse.empty() ? detail::GiveUp::because(std::current_exception(), rank_, heard_)
                              : detail::GiveUp::by(rank_, excuse);
      });
    };
    try {
      return call();
    } catch (const SymmetryError&) {
      told();
      throw;
    } catch (const std::exception&) {
      told();
      mailbox_->abandon();
      throw;
    }
  }

  /// Poisons the group and tells the others. They may be dead, and then there is nobody to tell.
  template <class Why>
  void leave(std::uint32_t sequence, const Why& why) noexcept {
    if (poisoned_.exchange(true)) {
      return;
    }
    try {
      const auto reason = why().serialize();
      const detail::FrameTrailer trailer{channel_, detail::ControlCall::gave_up, sequence};
      for (int r = 0; r < size(); ++r) {
        try {
          if (r != rank_) {
            send(r, trailer, reason);
          }
        } catch (const TransportError& error) {
          log(LogLevel::info, fmt::format("group {}: rank {} could not be told that rank {} has "
                                          "left: {}",
                                          name_, r, rank_, error.what()));
        }
      }
    } catch (const std::exception& error) {
      log(LogLevel::error, error.what());
    }
  }

  void send(int to, const detail::FrameTrailer& trailer, std::span<const std::byte> payload) {
    Bytes message;
    message.reserve(payload.size() + kTrailerBytes);
    message.assign(payload.begin(), payload.end());
    mailbox_->send(members_[index(to)], trailer, std::move(message));
  }

  void gather(detail::ControlCall call, std::span<const std::byte> mine,
              std::chrono::milliseconds limit, Arrivals& arrivals, std::string_view excuse) {
    auto& all = arrivals.payloads;
    all.resize(members_.size());
    int next_rank = 0;
    Wait wait(limit);
    try {
      const auto trailer = next(call);
      leave_on_error(trailer.sequence, excuse, [&] {
        for (int step = 1; step < size(); ++step) {
          send((rank_ + step) % size(), trailer, mine);
        }
        for (; next_rank < size(); ++next_rank) {
          all[index(next_rank)] = next_rank == rank_ ? Bytes(mine.begin(), mine.end())
                                                     : receive(next_rank, trailer, members_, wait);
        }
        fail_if_missing(trailer, wait);
        for (int r = 0; r < size(); ++r) {
          flush(r, wait);
        }
        fail_if_missing(trailer, wait);
        // The others have come to this call after they had this rank's last arrival.
        fail_if_left(trailer, members_,
                     std::exchange(told_, wait.time.start()) + shortest(wait.limit));
      });
    } catch (...) {
      arrivals.absent = std::move(wait.missing);
      for (; next_rank < size(); ++next_rank) {
        arrivals.absent.push_back(next_rank);
      }
      throw;
    }
  }

  [[nodiscard]] std::span<const int> member(int rank) const {
    return std::span(members_).subspan(index(rank), 1);
  }

  [[nodiscard]] detail::Watch watch(const detail::FrameTrailer& trailer,
                                    std::span<const int> ranks) const {
    const bool numbered = trailer.call != detail::ControlCall::exchange;
    return {channel_, ranks, numbered ? std::optional(trailer.sequence) : std::nullopt};
  }

  /// The matching payload from a rank of the group; notes the rank as missing at the deadline.
  /// Throws as soon as one of `watched` says that it has left.
  Bytes receive(int from, const detail::FrameTrailer& expected, std::span<const int> watched,
                Wait& wait) {
    const auto concern = watch(expected, watched);
    auto frame =
        mailbox_->receive(members_[index(from)], expected.call, concern, wait.time.deadline());
    if (!frame) {
      throw_if_told(expected, concern);
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

  /// The last step of a call: throws where one of `watched` has left without having finished it.
  /// Nobody's time limit can have ended before `earliest`, and then nothing is looked for.
  void fail_if_left(const detail::FrameTrailer& trailer, std::span<const int> watched,
                    Deadline earliest) {
    const auto concern = watch(trailer, watched);
    if (size() > 1 && Clock::now() >= earliest) {
      mailbox_->look(concern);
    }
    throw_if_told(trailer, concern);
  }

  void throw_if_told(const detail::FrameTrailer& trailer, const detail::Watch& concern) {
    if (const auto notice = mailbox_->notice(concern)) {
      heard_ = true;
      const auto from = std::find(members_.begin(), members_.end(), notice->from);
      detail::GiveUp::deserialize(notice->reason)
          .raise(static_cast<int>(from - members_.begin()), to_string(trailer.call), name_);
    }
  }

  void flush(int to, Wait& wait) {
    if (!mailbox_->flush(members_[index(to)], wait.time.deadline())) {
      wait.missing.push_back(to);
    }
  }

  void fail_if_missing(const detail::FrameTrailer& trailer, const Wait& wait) const {
    if (!wait.missing.empty()) {
      throw TimeoutError(
          fmt::format("{} #{} of group {} ({} ranks): rank {} did not arrive within {}",
                      to_string(trailer.call), trailer.sequence, name_, size(),
                      detail::joined(wait.missing, ", "), wait.time.describe(wait.limit)),
          wait.missing);
    }
  }

  std::shared_ptr<detail::Mailbox> mailbox_;
  std::chrono::milliseconds limit_;
  std::string name_;
  std::vector<int> members_;  // ranks in the messenger, by rank in this group
  int rank_ = 0;
  std::uint64_t channel_ = 0;
  bool heard_ = false;  // that another rank has left
  bool given_once_;     // no later group has this channel
  Deadline told_ =
      Deadline::min();  // when this rank arrived in the last call in which all wait for all
  std::vector<Deadline> exchanged_;  // when it last sent to each in an exchange
  // Others may give up while a thread is in a call.
  std::atomic<std::uint32_t> sequence_{0};
  std::atomic<bool> poisoned_{false};
};

}  // namespace cohort
