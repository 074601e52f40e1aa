// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cohort/call_time.hpp"
#include "cohort/collective_arguments.hpp"
#include "cohort/control_plane.hpp"
#include "cohort/error.hpp"
#include "cohort/flight_recorder.hpp"
#include "cohort/give_up.hpp"
#include "cohort/group_calls.hpp"
#include "cohort/owner_process.hpp"
#include "cohort/symmetric_arena.hpp"
#include "cohort/symmetric_policy.hpp"
#include "cohort/symmetric_scope.hpp"
#include "cohort/tensor.hpp"
#include "cohort/topology.hpp"
#include "cohort/traced_agreement.hpp"
#include "cohort/transport.hpp"

/// \file
/// A group of ranks with its control plane, transport and symmetric memory: who it is, the order of
/// its calls, and its end. Its collectives are in group_coordinator.hpp.

namespace cohort {

/// What a group is made of. `ParallelState` fills it.
struct GroupParts {
  GroupKind kind = GroupKind::world;      ///< What the group is for.
  std::string name;                       ///< Such as "dcp[1]".
  std::vector<int> ranks;                 ///< World ranks, by rank in the group.
  std::unique_ptr<ControlPlane> control;  ///< Of this group.
  std::shared_ptr<Backend> backend;       ///< Shared by all groups.
  std::unique_ptr<Transport> transport;   ///< Null in a group of one.
  SymmetricDecision decision;             ///< Whether it has windows and peer mappings, and why.
  bool debug_checks = false;              ///< Compare each call's arguments across the ranks.
  /// Of the group's own arena.
  ArenaOptions arena = {};
};

/// What a group is beside its collectives. After `shutdown` every call throws `UsageError`.
class GroupBase {
 public:
  /// Groups are made by `ParallelState::create`.
  explicit GroupBase(GroupParts parts)
      : parts_(std::move(parts)),
        rank_(parts_.control->rank()),
        size_(parts_.control->size()),
        device_(parts_.backend->device()),
        recorder_(std::make_shared<FlightRecorder>(
            parts_.name, rank_, parts_.ranks,
            parts_.transport != nullptr ? parts_.transport->trace_rings() : TraceRings{})),
        calls_(parts_.name, parts_.transport.get(), recorder_) {
    if (parts_.transport != nullptr) {
      recorder_->look_at_device([transport = parts_.transport.get()](TraceRing& ring) {
        transport->look_at_device(ring);
      });
    }
    parts_.control->record_in(recorder_);
    arena_ = SymmetricArena::create(*parts_.backend, parts_.name, audience(), parts_.arena);
    if (parts_.debug_checks && parts_.transport != nullptr) {
      parts_.transport->compare_places();
      parts_.transport->compare_shapes();
    }
    if (parts_.debug_checks && size_ > 1) {
      calls_.compare_over(*parts_.control, *arena_);
    }
  }
  GroupBase(const GroupBase&) = delete;
  GroupBase& operator=(const GroupBase&) = delete;
  virtual ~GroupBase() {
    const bool early = !closed_;  // behind a shutdown nobody waits
    close();
    if (early) {
      parts_.control->leave_in_order();
    }
  }

  /// What the group is for.
  [[nodiscard]] GroupKind kind() const noexcept { return parts_.kind; }
  /// Such as "dcp[0]".
  [[nodiscard]] const std::string& name() const noexcept { return parts_.name; }
  /// This rank in the group.
  [[nodiscard]] int rank() const noexcept { return rank_; }
  /// Ranks of the group.
  [[nodiscard]] int size() const noexcept { return size_; }
  /// World ranks, by rank in the group.
  [[nodiscard]] const std::vector<int>& ranks() const noexcept { return parts_.ranks; }
  /// What the policy decided for the group, and why.
  [[nodiscard]] const SymmetricDecision& decision() const noexcept { return parts_.decision; }
  /// The group's control plane.
  [[nodiscard]] ControlPlane& control() const noexcept { return *parts_.control; }
  /// Where its tensors lie.
  [[nodiscard]] Backend& backend() const noexcept { return *parts_.backend; }
  /// Where returned tensors and temporaries come from; without windows where the policy says no.
  [[nodiscard]] const std::shared_ptr<SymmetricArena>& arena() const noexcept { return arena_; }
  /// How scopes see the group: its arena, or ordinary memory where it has no windows.
  operator ScopeTarget() const noexcept {  // NOLINT(google-explicit-constructor)
    return {parts_.decision.nccl_windows.on ? arena_.get() : nullptr, parts_.backend.get()};
  }
  /// The group alone; nobody where it has no windows.
  [[nodiscard]] Audience audience() const {
    throw_if_closed();
    Audience audience{.control = parts_.control.get(), .everyone = numbering()};
    if (parts_.decision.nccl_windows.on) {
      audience.transports.push_back(parts_.transport.get());
      audience.groups.push_back(numbering());
    }
    return audience;
  }

  /// Collective. Makes room for a block of `bytes` in the group's arena. Nothing is done where one
  /// fits already: the room of several reservations, of `reserve_for` and `reserve_for_calls` too,
  /// is that of the greatest, not the sum, unless what is to live on is allocated in between.
  void reserve(std::size_t bytes) {
    throw_if_closed();
    arena_->reserve(bytes);
  }
  /// Collective. Makes room for these calls, so that none of them grows or fails in a frozen arena:
  /// results that live at once, eagerly and in one graph or the graphs of one pool besides, the
  /// scratch of layouts that have to be packed, and the library's inboxes. What an eager pass over
  /// the list returned is released before the next eager one begins, what a captured one returned
  /// before the next capture; both live on through passes of the other kind. A result that lives
  /// longer, as in `x = group.call(...)` until the new one is there, is one more call in the list.
  /// Does not add up with other reservations, as `reserve` says: all calls whose results live at
  /// once go into one list. Throws `UsageError` for a shape that cannot be, and as `reserve`.
  void reserve_for_calls(std::span<const CollectiveShape> calls) {
    throw_if_closed();
    const detail::CallTime time;
    reserve_room(room_of(calls, size_));
    if (parts_.transport != nullptr) {
      reserve_inbox(*parts_.transport, calls);
    }
  }
  /// Local, by every rank at the same point: the arena never grows again.
  void freeze() {
    throw_if_closed();
    arena_->freeze();
  }

  /// Waits until the stream is idle, watching the peers as well, and those of the state's other
  /// groups whose last call or launch the stream had. Throws `TimeoutError` naming the missing
  /// ranks, `TransportError` where a peer failed, what another rank said that has left, and
  /// `UsageError`, which leaves the group as it is, for a limit that is not positive;
  /// `kLongestTimeLimit` is the longest.
  void synchronize(StreamRef stream, std::chrono::milliseconds limit) {
    throw_if_closed();
    limit = checked_limit("synchronize", limit);
    if (parts_.transport != nullptr) {
      try {
        detail::reporting(recorder_.get(), [&] { parts_.transport->synchronize(stream, limit); });
      } catch (const TransportError&) {
        refused(std::current_exception());
        throw;
      }
    } else if (stream.valid()) {
      stream.synchronize(limit);
    }
    recorder_->settle(stream);
    // The look of this group behind the stream's end took in what was said to the others as well.
    const PeerLook look = parts_.transport != nullptr ? PeerLook::heard : PeerLook::now;
    for (GroupBase* const other : others_) {
      other->check_beside(stream, look);
    }
  }
  /// Local. For `ParallelState`: its other groups, whose calls a stream may hold as well.
  void stand_beside(std::vector<GroupBase*> others) { others_ = std::move(others); }

  /// Its last calls. Reading them never disturbs it.
  [[nodiscard]] const std::shared_ptr<FlightRecorder>& recorder() const noexcept {
    return recorder_;
  }
  /// Calls that took one path so far, their bytes, and how often the host waited in them for other
  /// ranks. Of a graph's calls each launch counts that went through `order` with its number, or
  /// through a `CapturedGraph`. Any thread. Throws `UsageError` for what is no path.
  [[nodiscard]] PathCounters counters(CallPath path) const {
    if (static_cast<std::size_t>(path) >= kCallPaths) {
      throw UsageError(
          fmt::format("counters path: expected a CallPath, got number {}", static_cast<int>(path)));
    }
    return recorder_->counters(path);
  }

  /// Whether a call of the group is known to have failed, without asking the device: one load, for
  /// engines that wait for their streams by CUDA's own means. `synchronize` says what happened.
  /// After shutdown as well.
  [[nodiscard]] bool failed() const noexcept {
    return failed_ || (parts_.transport != nullptr && parts_.transport->failed());
  }

  /// Collective. At least so many lanes, for work that goes on side by side, such as micro-batches:
  /// the library orders calls of one lane, and lets those of different lanes overlap where its own
  /// kernels carry them. Not within a capture.
  void reserve_lanes(int lanes) {
    throw_if_closed();
    calls_.reserve_lanes(lanes);
  }
  /// The lane of the calls that follow, equal on all ranks for each of them. Lane 0 at first.
  void use_lane(int lane) {
    throw_if_closed();
    calls_.use_lane(lane);
  }
  /// Most thread blocks of the own kernels in the calls that follow, so that other work keeps the
  /// rest of the device; 0 for the backend's budget. Equal on all ranks for each call.
  void limit_blocks(int blocks) {
    throw_if_closed();
    if (blocks < 0) {
      throw UsageError(fmt::format("limit_blocks: expected at least 0, got {}", blocks));
    }
    if (parts_.transport != nullptr) {
      parts_.transport->limit_blocks(blocks);
    }
  }

  /// Work that `stream` gets after this runs after the group's calls so far, and the group's later
  /// calls after what `stream` gets before them or before `launched`. Every call does it by itself;
  /// an engine does it before it launches a graph with calls of the group. Calls of one capture are
  /// ordered among themselves: their place among eager calls is where the graph is launched.
  /// `graph` is the number of the capture that made the graph, for the group's records; 0 where the
  /// engine does not say.
  void order(StreamRef stream, CaptureId graph = 0) {
    throw_if_closed();
    calls_.before_launch(stream);
    arena_->order_launch(stream);
    recorder_->launch(stream, graph);
  }
  /// Right behind a launch that `order` preceded, so that later calls on other streams wait for it
  /// and for nothing that `stream` gets afterwards.
  void launched(StreamRef stream) {
    throw_if_closed();
    calls_.launched(stream);
  }

  /// Local. What the group has enqueued, or was to, the device has refused: see
  /// `Transport::refused`.
  void refused(const std::exception_ptr& error) noexcept {
    if (parts_.transport != nullptr) {
      parts_.transport->refused(error);
    }
  }

  /// Local. Leaves the group and tells those that still wait for this rank, or will, why: for a
  /// rank that makes no further call. Teardown then waits for no peer.
  void forsake_peers(std::string_view reason) noexcept try {
    forsake_peers(detail::GiveUp::by(rank_, fmt::format("group {}: {}", parts_.name, reason)));
  } catch (const std::exception&) {
    forsake_peers(detail::GiveUp{});  // no memory for the reason
  }
  /// The same with a cause in the numbers of this group, which may be that of another.
  void forsake_peers(const detail::GiveUp& why) noexcept {
    parts_.control->leave_with(why);
    if (parts_.transport != nullptr) {
      parts_.transport->forsake_peers(why);
    }
  }
  /// The first cause for which this rank has left the group, in the group's numbers; `error` where
  /// it has said none.
  [[nodiscard]] detail::GiveUp cause(const std::exception_ptr& error) const {
    auto said = parts_.transport != nullptr ? parts_.transport->left_with() : std::nullopt;
    if (!said) {
      said = parts_.control->left_with();
    }
    return said ? *std::move(said) : detail::GiveUp::because(error, rank_);
  }
  /// What the last call threw where the ranks differed in it, and the group works on if all do.
  [[nodiscard]] std::optional<detail::GiveUp> differed() const {
    return parts_.transport != nullptr ? parts_.transport->differed() : std::nullopt;
  }
  /// Its name and its ranks.
  [[nodiscard]] detail::Numbering numbering() const noexcept { return {parts_.name, parts_.ranks}; }

  /// How long teardown waits for calls that may still come to their end.
  static constexpr std::chrono::milliseconds kTeardownPatience{5'000};

  /// Local, before teardown: waits so long for the group's calls to come to their end, and then
  /// tells those that wait for ranks to end. No call may follow.
  void settle(std::chrono::milliseconds patience) noexcept {
    if (parts_.transport != nullptr) {
      parts_.transport->settle(patience);
    }
  }

  /// Collective. Deregisters the windows and disconnects; tensors of the group stay readable. Every
  /// later call throws `UsageError`, but a second shutdown does nothing. What the wait for the
  /// other ranks throws comes after all is closed. Where a call of the group has failed on this
  /// rank, which that call threw, it waits for nobody and throws nothing. `ParallelState` does it
  /// for all its groups at once.
  void shutdown() {
    if (closed_) {
      return;
    }
    if (failed()) {
      forsake_peers(cause(std::make_exception_ptr(Error("a call failed"))));
      close();
      return;
    }
    try {
      const detail::TracedAgreement traced(recorder_.get(), "shutdown of the group", 0);
      detail::reporting(recorder_.get(), [&] {
        parts_.control->barrier();  // no rank may still be reading what goes away
      });
    } catch (const std::exception&) {
      forsake_peers(cause(std::current_exception()));
      close();
      failed_ = true;
      throw;
    }
    close();
  }
  /// Whether it was shut down.
  [[nodiscard]] bool closed() const noexcept { return closed_; }

  /// Local: `shutdown` once the ranks have waited for each other, or where they no longer can.
  void close() noexcept {
    failed_ = failed();
    closed_ = true;
    calls_.end();
    recorder_->close();
    settle(kTeardownPatience);  // before memory goes away that its calls may use
    if (arena_ != nullptr) {
      arena_->close();
    }
    std::unique_ptr<Transport> last;
    {
      const std::lock_guard lock(ending_);
      last = std::move(parts_.transport);
    }
  }

 protected:
  /// Null in a group of one.
  [[nodiscard]] Transport* transport() const noexcept { return parts_.transport.get(); }

  /// Throws `UsageError` after `shutdown`.
  void throw_if_closed() const {
    if (closed_) {
      detail::refuse([&] { return fmt::format("group {}: used after shutdown", parts_.name); });
    }
  }

  /// Makes room for steps like this one.
  void reserve_room(const StepRoom& room) {
    const detail::CallTime time;
    reserve(room.bytes());
    if (parts_.transport != nullptr) {
      parts_.transport->reserve_scratch(room.scratch);
    }
  }

  // The steps of each call: check the arguments, `begin`, compare them across the ranks, allocate,
  // `issue`.

  /// What a call is.
  using Made = detail::MadeCall;
  /// A call that has begun.
  using Call = detail::GroupCalls::Call;

  /// The group is up, and `x` lies on its device.
  template <class Void>
  void check_call(std::string_view call, const BasicTensorView<Void>& x) const {
    throw_if_closed();
    check_device(call, x);
  }

  /// The group's earlier calls come first. Whatever was wrong with the arguments has been found.
  /// The call is recorded, and where debug checks are on compared across the ranks.
  [[nodiscard]] Call begin(StreamRef stream, const Made& made) {
    try {
      return calls_.begin(stream, made);
    } catch (const TransportError&) {
      if (!is_captured(stream)) {
        refused(std::current_exception());
      }
      throw;
    }
  }
  /// Enqueues a call that has begun and finishes it. What the device refuses ends the group, unless
  /// the call is captured: other ranks may wait for it by now.
  template <class Enqueue>
  [[gnu::always_inline]] void issue(const Call& call, const Enqueue& enqueue) {
    try {
      enqueue();
      calls_.finish(call);
    } catch (const TransportError&) {
      if (call.capture == 0 && !call.grew_nowhere) {
        refused(std::current_exception());
      }
      throw;
    }
  }

  /// For errors of arguments.
  [[nodiscard]] Caller caller() const noexcept { return {parts_.name, rank_, size_}; }

  /// Memory of a call, from the group's arena.
  [[nodiscard]] Tensor temporary(const Dims& shape, DType dtype, const Call& call) {
    try {
      return arena_->empty(shape, dtype, call.stream, call.capture);
    } catch (const TransportError&) {
      call.grew_nowhere = true;
      throw;
    }
  }

  /// False as well where the device does not say.
  [[nodiscard]] static bool is_captured(StreamRef stream) noexcept {
    try {
      return stream.valid() && stream.capture_id() != 0;
    } catch (const Error&) {
      return false;
    }
  }

  /// Throws `UsageError` for a tensor of another device.
  template <class Void>
  void check_device(std::string_view argument, const BasicTensorView<Void>& x) const {
    check_on_device(argument, caller(), device_, x);
  }

  /// Throws unless `x` has the dtype and device of `like` and the given shape.
  template <class A, class B>
  void check_like(std::string_view argument, const BasicTensorView<A>& x,
                  const BasicTensorView<B>& like, const Dims& shape) const {
    check_device(argument, x);
    check_alike(argument, x, like, shape);
  }

  /// Copies, unless both are the same memory.
  void copy_unless_same(const ConstTensorView& from, const TensorView& to, StreamRef stream) {
    if (from.data() != to.data() || from.strides() != to.strides()) {
      parts_.backend->ops().copy(from, to, stream);
    }
  }

 private:
  /// For another group of the state, which has waited for the stream on a thread of its own.
  void check_beside(StreamRef stream, PeerLook look) {
    const std::lock_guard lock(ending_);
    if (!closed_ && parts_.transport != nullptr) {
      detail::reporting(recorder_.get(), [&] { parts_.transport->check(stream, look); });
      recorder_->settle(stream);
    }
  }

  /// Calls of unequal shares do not go through it.
  void reserve_inbox(Transport& transport, std::span<const CollectiveShape> calls) const {
    std::size_t most = 0;
    for (const auto& call : calls) {
      const std::size_t bytes = bytes_of(call.shape, call.dtype);
      const bool gathers = call.collective == Collective::all_gather;
      if (call.widest == 0) {
        const std::size_t row =
            call.shape.size() == 0
                ? 0
                : static_cast<std::size_t>(call.shape[call.shape.size() - 1]) * size_of(call.dtype);
        most = std::max(most, transport.slot_bytes(
                                  call.collective,
                                  gathers ? bytes * static_cast<std::size_t>(size_) : bytes, row));
      }
    }
    PeerKernels* const kernels = transport.peer_kernels();
    if (kernels != nullptr && most > 0) {
      kernels->reserve(most);
    }
  }

  GroupParts parts_;
  int rank_;
  int size_;
  Device device_;
  std::shared_ptr<FlightRecorder> recorder_;
  detail::GroupCalls calls_;
  std::shared_ptr<SymmetricArena> arena_;
  std::vector<GroupBase*> others_;  // of the same state
  OwnerMutex ending_;  // the transport goes under it; the threads of other groups ask under it
  std::atomic<bool> closed_{false};
  std::atomic<bool> failed_{false};  // before it was closed
};

}  // namespace cohort
