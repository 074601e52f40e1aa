#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "cohort/error.hpp"
#include "cohort/joined.hpp"
#include "cohort/owner_process.hpp"
#include "cohort/runtime_env.hpp"

/// \file
/// The control plane: small host-side messages between the ranks of a group, each wait with a time
/// limit that names who is missing. `ControlPlane` is what the library asks for. An engine with a
/// store or sockets of its own implements `Messenger` (two functions) and gets the rest from
/// `MessageControlPlane`; `make_thread_control_planes` connects ranks that are threads.

namespace cohort {

using Bytes = std::vector<std::byte>;
using Clock = std::chrono::steady_clock;
using Deadline = Clock::time_point;

/// Default of every wait on the host that no option sets.
inline constexpr std::chrono::milliseconds kDefaultTimeLimit{60'000};
/// The longest time limit: no wait is unbounded.
inline constexpr std::chrono::milliseconds kLongestTimeLimit = std::chrono::hours(24 * 365);

/// Messages between the ranks of one group. Collective calls are made by every rank of the group
/// in the same order; one thread at a time uses a control plane.
class ControlPlane {
 public:
  /// Bytes for one rank, or expected of one.
  struct Outgoing {
    int to = 0;
    Bytes payload;
  };
  struct Incoming {
    int from = 0;
    std::size_t bytes = 0;
  };

  /// What every message needs beyond its payload.
  static constexpr std::size_t kTrailerBytes = 16;

  ControlPlane() = default;
  ControlPlane(const ControlPlane&) = delete;
  ControlPlane& operator=(const ControlPlane&) = delete;
  virtual ~ControlPlane() = default;

  [[nodiscard]] virtual int rank() const noexcept = 0;
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
  /// are in another call.
  std::vector<Bytes> all_gather(std::span<const std::byte> mine) {
    return all_gather_within(mine, limit());
  }

  /// `all_gather` with a time limit of its own, for callers that wait in several groups in turn.
  virtual std::vector<Bytes> all_gather_within(std::span<const std::byte> mine,
                                               std::chrono::milliseconds limit) = 0;

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

  /// A control plane of the given ranks of this one, in the given order. Local: no message is
  /// sent, so survivors can form a group without the ranks that left. All of `ranks` pass the same
  /// list, name and generation; each generation of the same list is a group of its own.
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

 private:
  static constexpr std::int32_t kSplit = 0x53706c74;
  std::uint64_t splits_ = 0;
};

/// Ordered byte messages between pairs of ranks: all that an engine has to bring. Messages to the
/// own rank never reach it. Calls are made by one thread at a time.
class Messenger {
 public:
  Messenger() = default;
  Messenger(const Messenger&) = delete;
  Messenger& operator=(const Messenger&) = delete;
  virtual ~Messenger() = default;

  [[nodiscard]] virtual int rank() const noexcept = 0;
  [[nodiscard]] virtual int size() const noexcept = 0;

  /// Hands a message over. Must not wait for the receiver to ask for it. Messages from one rank
  /// to another arrive in order. Throws `TransportError`.
  virtual void send(int to, Bytes message) = 0;

  /// The next message from `from`, or nothing at the deadline. A deadline in the past polls.
  /// Throws `TransportError`, also where the peer is known to be gone.
  virtual std::optional<Bytes> receive(int from, Deadline deadline) = 0;

  /// Waits until the messages to `to` arrive without this rank's help: after a call in which both
  /// take part, it may be long in waits that the messenger knows nothing of. False at the deadline.
  /// For messengers whose messages are on their own once handed over there is nothing to do.
  virtual bool flush(int to, Deadline deadline) {
    static_cast<void>(to);
    static_cast<void>(deadline);
    return true;
  }

  /// A wait timed out or a call failed, so messages may stay in flight for good: what is torn down
  /// later must not wait for them. The messenger works on for groups without the missing ranks.
  virtual void abandon() noexcept {}
};

namespace detail {

/// A step of FNV-1a over 64-bit words (Fowler, Noll, Vo; RFC draft-eastlake-fnv), with a final
/// shift so that high bits reach low ones.
[[nodiscard]] constexpr std::uint64_t mix(std::uint64_t hash, std::uint64_t value) noexcept {
  hash = (hash ^ value) * 0x100000001b3ULL;
  return hash ^ (hash >> 29);
}
inline constexpr std::uint64_t kHashSeed = 0xcbf29ce484222325ULL;

enum class ControlCall : std::uint32_t { all_gather, barrier, broadcast, exchange };

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
static_assert(sizeof(FrameTrailer) == ControlPlane::kTrailerBytes);

/// Sorts the messages of one messenger by (sender, channel), so that many groups share it.
class Mailbox {
 public:
  struct Frame {
    FrameTrailer trailer;
    Bytes payload;
  };

  explicit Mailbox(std::shared_ptr<Messenger> messenger) : messenger_(std::move(messenger)) {}

  [[nodiscard]] Messenger& messenger() noexcept { return *messenger_; }
  [[nodiscard]] const OwnerProcess& owner() const noexcept { return owner_; }

  void send(int to, const FrameTrailer& trailer, Bytes payload) {
    const std::lock_guard lock(mutex_);
    if (to == messenger_->rank()) {
      pending_[{to, trailer.channel}].push_back({trailer, std::move(payload)});
      return;
    }
    std::array<std::byte, sizeof(trailer)> bytes{};
    std::memcpy(bytes.data(), &trailer, sizeof(trailer));
    payload.insert(payload.end(), bytes.begin(), bytes.end());
    messenger_->send(to, std::move(payload));
  }

  /// The next frame of the channel, or nothing at the deadline. What has arrived by then counts,
  /// also where the deadline has passed before the call.
  std::optional<Frame> receive(int from, std::uint64_t channel, Deadline deadline) {
    while (true) {
      {
        const std::lock_guard lock(mutex_);
        if (auto frame = take(from, channel)) {
          return frame;
        }
        if (from == messenger_->rank()) {
          return std::nullopt;  // own messages are there before anyone can ask for them
        }
        if (auto message = messenger_->receive(from, std::min(deadline, Clock::now() + kSlice))) {
          store(from, std::move(*message));
          continue;
        }
      }
      if (Clock::now() >= deadline) {
        return std::nullopt;
      }
      std::this_thread::yield();
    }
  }

  /// `Messenger::flush`, in slices for the same reason.
  bool flush(int to, Deadline deadline) {
    if (to == messenger_->rank()) {
      return true;
    }
    while (true) {
      {
        const std::lock_guard lock(mutex_);
        if (messenger_->flush(to, std::min(deadline, Clock::now() + kSlice))) {
          return true;
        }
      }
      if (Clock::now() >= deadline) {
        return false;
      }
      std::this_thread::yield();
    }
  }

  void abandon() noexcept { messenger_->abandon(); }

 private:
  // Waiting in short slices lets a thread of another group use the messenger in between.
  static constexpr std::chrono::milliseconds kSlice{2};

  std::optional<Frame> take(int from, std::uint64_t channel) {
    const auto it = pending_.find({from, channel});
    if (it == pending_.end()) {
      return std::nullopt;
    }
    Frame frame = std::move(it->second.front());
    it->second.pop_front();
    if (it->second.empty()) {
      pending_.erase(it);
    }
    return frame;
  }

  void store(int from, Bytes message) {
    FrameTrailer trailer;
    if (message.size() < sizeof(trailer)) {
      throw TransportError({.call = "Messenger::receive", .rank = messenger_->rank()},
                           fmt::format("a message of {} bytes from rank {} is no control message",
                                       message.size(), from));
    }
    const std::size_t payload = message.size() - sizeof(trailer);
    std::memcpy(&trailer, message.data() + payload, sizeof(trailer));
    message.resize(payload);
    pending_[{from, trailer.channel}].push_back({trailer, std::move(message)});
  }

  OwnerProcess owner_;
  std::shared_ptr<Messenger> messenger_;
  std::mutex mutex_;
  std::map<std::pair<int, std::uint64_t>, std::deque<Frame>> pending_;
};

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
        channel_(detail::kHashSeed) {
    if (limit <= std::chrono::milliseconds(0) || limit > kLongestTimeLimit) {
      throw ConfigError(fmt::format("control plane {}: expected a time limit of 1 to {} ms, got {}",
                                    name_, kLongestTimeLimit.count(), limit.count()));
    }
    std::iota(members_.begin(), members_.end(), 0);
  }

  [[nodiscard]] int rank() const noexcept override { return rank_; }
  [[nodiscard]] int size() const noexcept override { return static_cast<int>(members_.size()); }
  [[nodiscard]] const std::string& name() const noexcept override { return name_; }
  [[nodiscard]] std::chrono::milliseconds limit() const noexcept override { return limit_; }
  [[nodiscard]] bool poisoned() const noexcept override { return poisoned_; }

  std::vector<Bytes> all_gather_within(std::span<const std::byte> mine,
                                       std::chrono::milliseconds limit) override {
    return gather(detail::ControlCall::all_gather, mine, limit);
  }

  void barrier() override { gather(detail::ControlCall::barrier, {}, limit_); }

  Bytes broadcast(std::span<const std::byte> mine, int root) override {
    check_rank("broadcast root", root);
    const auto trailer = next(detail::ControlCall::broadcast);
    return poison_on_error([&] {
      if (rank_ == root) {
        for (int r = 0; r < size(); ++r) {
          if (r != rank_) {
            send(r, trailer, mine);
          }
        }
        return Bytes(mine.begin(), mine.end());
      }
      Wait wait(limit_);
      auto payload = receive(root, trailer, wait);
      fail_if_missing(trailer, wait);
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
    const detail::FrameTrailer trailer{detail::mix(channel_, kBulk), detail::ControlCall::exchange,
                                       0};
    return poison_on_error([&] {
      for (auto& message : outgoing) {
        mailbox_->send(members_[index(message.to)], trailer, std::move(message.payload));
      }
      Wait wait(limit_);
      std::vector<Bytes> payloads;
      for (const auto& [from, bytes] : incoming) {
        payloads.push_back(receive(from, trailer, wait));
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
      return payloads;
    });
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
    return std::unique_ptr<ControlPlane>(new MessageControlPlane(
        mailbox_, limit_, std::move(name), std::move(members), rank, channel));
  }

 private:
  static constexpr std::uint64_t kBulk = 0x62756c6bULL;

  MessageControlPlane(std::shared_ptr<detail::Mailbox> mailbox, std::chrono::milliseconds limit,
                      std::string name, std::vector<int> members, int rank, std::uint64_t channel)
      : mailbox_(std::move(mailbox)),
        limit_(limit),
        name_(std::move(name)),
        members_(std::move(members)),
        rank_(rank),
        channel_(channel) {}

  /// One wait for several ranks, which share its time.
  struct Wait {
    explicit Wait(std::chrono::milliseconds time)
        : limit(time), deadline(Clock::now() + std::min(time, kLongestTimeLimit)) {}

    std::chrono::milliseconds limit;
    Deadline deadline;
    std::vector<int> missing;
  };

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

  /// Whatever ends a call early leaves the ranks out of step; ranks that disagree are still there
  /// to take what was sent to them.
  template <class Call>
  std::invoke_result_t<Call&> poison_on_error(Call&& call) {
    try {
      return call();
    } catch (const SymmetryError&) {
      poisoned_ = true;
      throw;
    } catch (...) {
      poisoned_ = true;
      mailbox_->abandon();
      throw;
    }
  }

  void send(int to, const detail::FrameTrailer& trailer, std::span<const std::byte> payload) {
    Bytes message;
    message.reserve(payload.size() + kTrailerBytes);
    message.assign(payload.begin(), payload.end());
    mailbox_->send(members_[index(to)], trailer, std::move(message));
  }

  std::vector<Bytes> gather(detail::ControlCall call, std::span<const std::byte> mine,
                            std::chrono::milliseconds limit) {
    const auto trailer = next(call);
    return poison_on_error([&] {
      for (int step = 1; step < size(); ++step) {
        send((rank_ + step) % size(), trailer, mine);
      }
      Wait wait(limit);
      std::vector<Bytes> all(members_.size());
      for (int r = 0; r < size(); ++r) {
        all[index(r)] = r == rank_ ? Bytes(mine.begin(), mine.end()) : receive(r, trailer, wait);
      }
      fail_if_missing(trailer, wait);
      for (int r = 0; r < size(); ++r) {
        flush(r, wait);
      }
      fail_if_missing(trailer, wait);
      return all;
    });
  }

  /// The matching payload from a rank of the group; notes the rank as missing at the deadline.
  Bytes receive(int from, const detail::FrameTrailer& expected, Wait& wait) {
    auto frame = mailbox_->receive(members_[index(from)], expected.channel, wait.deadline);
    if (!frame) {
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

  void flush(int to, Wait& wait) {
    if (!mailbox_->flush(members_[index(to)], wait.deadline)) {
      wait.missing.push_back(to);
    }
  }

  void fail_if_missing(const detail::FrameTrailer& trailer, const Wait& wait) const {
    if (!wait.missing.empty()) {
      throw TimeoutError(
          fmt::format("{} #{} of group {} ({} ranks): rank {} did not arrive within {} ms",
                      to_string(trailer.call), trailer.sequence, name_, size(),
                      detail::joined(wait.missing, ", "), wait.limit.count()),
          wait.missing);
    }
  }

  std::shared_ptr<detail::Mailbox> mailbox_;
  std::chrono::milliseconds limit_;
  std::string name_;
  std::vector<int> members_;  // ranks in the messenger, by rank in this group
  int rank_ = 0;
  std::uint64_t channel_ = 0;
  std::uint32_t sequence_ = 0;
  bool poisoned_ = false;
};

namespace detail {

/// The queues that connect the ranks of one process.
class ThreadHub {
 public:
  explicit ThreadHub(int size) : size_(size), queues_(static_cast<std::size_t>(size * size)) {}

  [[nodiscard]] int size() const noexcept { return size_; }

  void push(int from, int to, Bytes message) {
    auto& queue = at(from, to);
    {
      const std::lock_guard lock(queue.mutex);
      queue.messages.push_back(std::move(message));
    }
    queue.arrived.notify_one();
  }

  std::optional<Bytes> pop(int from, int to, Deadline deadline) {
    auto& queue = at(from, to);
    std::unique_lock lock(queue.mutex);
    if (!queue.arrived.wait_until(lock, deadline, [&] { return !queue.messages.empty(); })) {
      return std::nullopt;
    }
    Bytes message = std::move(queue.messages.front());
    queue.messages.pop_front();
    return message;
  }

 private:
  struct Queue {
    std::mutex mutex;
    std::condition_variable arrived;
    std::deque<Bytes> messages;
  };

  Queue& at(int from, int to) {
    const auto row = static_cast<std::size_t>(from) * static_cast<std::size_t>(size_);
    return queues_[row + static_cast<std::size_t>(to)];
  }

  int size_;
  std::deque<Queue> queues_;
};

class ThreadMessenger : public Messenger {
 public:
  ThreadMessenger(std::shared_ptr<ThreadHub> hub, int rank) : hub_(std::move(hub)), rank_(rank) {}

  [[nodiscard]] int rank() const noexcept override { return rank_; }
  [[nodiscard]] int size() const noexcept override { return hub_->size(); }
  void send(int to, Bytes message) override { hub_->push(rank_, to, std::move(message)); }
  std::optional<Bytes> receive(int from, Deadline deadline) override {
    return hub_->pop(from, rank_, deadline);
  }

 private:
  std::shared_ptr<ThreadHub> hub_;
  int rank_;
};

}  // namespace detail

/// Control planes for `size` ranks that are threads of this process; element r is for rank r's
/// thread. Throws `ConfigError` where `size` is not positive.
[[nodiscard]] inline std::vector<std::unique_ptr<ControlPlane>> make_thread_control_planes(
    int size, std::chrono::milliseconds limit = kDefaultTimeLimit) {
  if (size < 1) {
    throw ConfigError(
        fmt::format("make_thread_control_planes: expected a positive size, got {}", size));
  }
  const auto hub = std::make_shared<detail::ThreadHub>(size);
  std::vector<std::unique_ptr<ControlPlane>> planes;
  for (int r = 0; r < size; ++r) {
    planes.push_back(std::make_unique<MessageControlPlane>(
        std::make_shared<detail::ThreadMessenger>(hub, r), limit));
  }
  return planes;
}

}  // namespace cohort
