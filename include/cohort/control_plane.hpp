// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cohort/call_time.hpp"
#include "cohort/error.hpp"
#include "cohort/flight_recorder.hpp"
#include "cohort/give_up.hpp"
#include "cohort/inquiry.hpp"
#include "cohort/messenger.hpp"

/// \file
/// The control plane: small host-side messages between the ranks of a group, each wait with a time
/// limit that names who is missing. It is what the library asks for. An engine with a store or
/// sockets of its own implements `Messenger` (two functions) and gets the rest from
/// message_control_plane.hpp; thread_control_planes.hpp connects ranks that are threads.
///
/// A rank whose call fails tells the others of the group why before it throws. Those that still
/// wait end at once with the same error, and so does a rank that comes later: it does not go on
/// alone with a result that the others never had. (A rank that arrives in the very moment, some
/// microseconds, in which another gives up on it, or within a millisecond of its last call, may
/// learn it from its next call only.)

namespace cohort {

/// Default of every wait on the host that no option sets.
inline constexpr std::chrono::milliseconds kDefaultTimeLimit{60'000};

/// What a rank does to learn who has left.
enum class PeerLook : std::uint8_t {
  now,     ///< Takes in all that has come, behind other threads that are at it.
  lately,  ///< The same unless it, or another thread, has done so within the last milliseconds.
  heard,   ///< Asks for no message: what any group with the same messenger has taken in.
};

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
    std::size_t bytes = 0;  ///< Its length, which the receiver knows, or `kAnyBytes`.
  };

  /// Of a message whose receiver compares its length itself.
  static constexpr std::size_t kAnyBytes = ~std::size_t{0};

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
  /// error itself where it is null.
  virtual Arrivals gather_arrivals(std::span<const std::byte> mine, std::chrono::milliseconds limit,
                                   const detail::GiveUp* excuse = nullptr) = 0;

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
  /// it is poisoned already, because then they have been told. Any thread may call it: a call under
  /// way ends at once with the same error, and the others are told that it has not been finished.
  void give_up(std::string_view reason) noexcept try {
    leave_with(detail::GiveUp::by(rank(), fmt::format("group {}: {}", name(), reason)));
  } catch (const std::exception&) {
    leave_with({});  // no memory for the reason
  }
  /// The same behind an error of this rank: the others throw one of its type, with its words and
  /// the ranks that it names.
  void give_up_because(const std::exception_ptr& error) noexcept try {
    leave_with(detail::GiveUp::because(error, rank()));
  } catch (const std::exception&) {
    leave_with({});
  }
  /// The same with a cause in the numbers of this group, which may be that of another.
  virtual void leave_with(const detail::GiveUp& why) noexcept = 0;
  /// What this rank has left with: the first cause, where another said it. Nothing before.
  [[nodiscard]] virtual std::optional<detail::GiveUp> left_with() const = 0;

  /// Local. Has `end` called once this rank has left with a cause, behind telling the others, by
  /// the thread with which it leaves; at once where it has left. It must not throw, nor use the
  /// group. Takes the place of the one before; null for none, and then none is running either.
  virtual void when_left(std::function<void()> end) = 0;

  /// Local. Tells the others that this rank, which has finished its calls, makes no further one:
  /// who awaits something of it, or sends it something later, throws `TransportError` at once, and
  /// nobody else is disturbed. Nothing happens where this rank has left, and in groups whose
  /// generation may come again.
  virtual void leave_in_order() noexcept = 0;

  /// Local, without waiting for peers. Throws what a rank said that has left the group, at
  /// whichever call, and leaves it as well: for ranks that wait for each other by other means. What
  /// a rank of this machine said before it did anything that can be seen here, is found by
  /// `PeerLook::now`, for all groups that share the messenger: they need no more than `heard` then.
  /// Nothing happens where this rank has left. Any thread may call it, whatever the group's own
  /// does meanwhile.
  void check_peers(PeerLook look = PeerLook::now) { find_who_left(look); }

  /// Whether `check_peers(PeerLook::lately)` would find nothing, and the group is not poisoned:
  /// what each call asks first. False where that would have to be looked for.
  [[nodiscard]] virtual bool is_calm() const noexcept { return false; }

  /// Local. For a wait for others of the group, by whichever means, that has lasted for some ms, so
  /// that who gives up blames none that waits itself. Null in groups in which nobody waits for
  /// another, and where there is no memory for it. Does not outlive this.
  [[nodiscard]] virtual std::unique_ptr<detail::LongWait> begin_long_wait(
      const detail::LimitedWait& time, std::chrono::milliseconds limit) noexcept = 0;

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

  /// Local. Agreements over this control plane are recorded there from now on: it is that of a
  /// group.
  void record_in(std::shared_ptr<FlightRecorder> recorder) noexcept {
    recorder_ = std::move(recorder);
  }
  /// Null for none.
  [[nodiscard]] FlightRecorder* recorder() const noexcept { return recorder_.get(); }

 protected:
  /// `check_peers`.
  virtual void find_who_left(PeerLook look) = 0;

  /// From here on generations are given only once, by `new_generations` and `split`.
  static constexpr std::uint64_t kFreshGeneration = std::uint64_t{1} << 62;

 private:
  static constexpr std::int32_t kSplit = 0x53706c74;
  std::shared_ptr<FlightRecorder> recorder_;
  std::uint64_t splits_ = 0;
  std::uint64_t generations_ = 0;
};

}  // namespace cohort
