// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cohort/agreement.hpp"
#include "cohort/call_time.hpp"
#include "cohort/control_plane.hpp"
#include "cohort/error.hpp"
#include "cohort/flight_recorder.hpp"
#include "cohort/joined.hpp"
#include "cohort/stream_order.hpp"
#include "cohort/symmetric_arena.hpp"
#include "cohort/tensor.hpp"
#include "cohort/transport.hpp"

/// \file
/// The frame of each call of a group, whatever it moves: its place among the group's calls on all
/// streams, its record, and the comparison of its arguments across the ranks.

namespace cohort::detail {

/// What a call is, for its record and for those who compare it across the ranks. Refers to what it
/// is made of.
struct MadeCall {
  /// Of a call without a tensor.
  explicit MadeCall(TraceCall which) noexcept : call(which) {}
  /// @param along  The dimension along which sizes may differ.
  /// @param sizes_along  Of all ranks, where they may.
  /// @param what  The op, root, peer, base or type of a norm.
  /// @param of_query  Of what a query's bytes are.
  /// @param of_norm  Its epsilon.
  template <class Void>
  MadeCall(TraceCall which, const BasicTensorView<Void>& x, int along = 0,
           std::span<const std::int64_t> sizes_along = {}, int what = 0,
           std::optional<QueryTypes> of_query = {}, std::optional<float> of_norm = {}) noexcept
      : call(which),
        shape(&x.shape()),
        dtype(x.dtype()),
        bytes(x.bytes()),
        dim(along),
        sizes(sizes_along),
        variant(what),
        types(of_query),
        epsilon(of_norm) {}

  static constexpr Dims kNothing{0};  ///< What a call without a tensor has.

  TraceCall call;                            ///< Which it is.
  const Dims* shape = &kNothing;             ///< Of its tensor.
  DType dtype = DType::u8;                   ///< Of the elements.
  std::size_t bytes = 0;                     ///< Of them all.
  int dim = 0;                               ///< Along which sizes differ.
  std::span<const std::int64_t> sizes = {};  ///< Of all ranks, where they may.
  int variant = 0;                           ///< The op, root, peer, base or type of a norm.
  std::optional<QueryTypes> types = {};      ///< Of what a query's bytes are.
  std::optional<float> epsilon = {};         ///< Of a norm.
};

/// The calls of one group, from its making to its end. Used by one thread at a time.
class GroupCalls {
 public:
  /// @param name       Of the group.
  /// @param transport  Lives until `end`; null in a group of one.
  /// @param recorder   Keeps the calls.
  GroupCalls(const std::string& name, Transport* transport,
             std::shared_ptr<FlightRecorder> recorder)
      : name_("group " + name),
        transport_(transport),
        recorder_(std::move(recorder)),
        lifeline_(std::make_shared<Lifeline>(name_)) {
    lanes_.emplace_back(name_);
  }
  GroupCalls(const GroupCalls&) = delete;
  GroupCalls& operator=(const GroupCalls&) = delete;

  /// From here on each collective call is compared across the ranks before anything is allocated
  /// for it, and so is the history of the arena. Both outlive the calls.
  void compare_over(ControlPlane& control, SymmetricArena& arena) noexcept {
    compared_over_ = &control;
    arena_ = &arena;
  }

  /// Each takes room on the device, and no engine has more micro-batches under way.
  static constexpr int kMostLanes = 1024;

  /// At least so many. Throws `UsageError` for none, and for more than `kMostLanes`.
  void reserve_lanes(int lanes) {
    if (lanes < 1 || lanes > kMostLanes) {
      throw UsageError(fmt::format("reserve_lanes: expected 1 to {}, got {}", kMostLanes, lanes));
    }
    if (transport_ != nullptr) {
      transport_->reserve_lanes(lanes);
    }
    while (lanes_.size() < static_cast<std::size_t>(lanes)) {
      lanes_.emplace_back(name_);
    }
  }
  /// Of the calls that follow. Throws `UsageError` for one that is not reserved.
  void use_lane(int lane) {
    if (lane < 0 || static_cast<std::size_t>(lane) >= lanes_.size()) {
      throw UsageError(fmt::format("use_lane: expected one of the {} reserved lanes, got {}",
                                   lanes_.size(), lane));
    }
    lane_ = static_cast<std::size_t>(lane);
    if (transport_ != nullptr) {
      transport_->select_lane(lane);
    }
  }

  /// A launch on `stream` comes behind the calls so far.
  void before_launch(StreamRef stream) {
    if (transport_ != nullptr) {
      transport_->before_launch(stream);
    }
    for (StreamOrder& lane : lanes_) {  // a graph may hold calls of any
      static_cast<void>(lane.before(stream));
    }
  }
  /// Calls to come on other streams wait for it.
  void launched(StreamRef stream) {
    if (stream.valid()) {
      for (StreamOrder& lane : lanes_) {
        lane.after({stream, stream.capture_id()});
      }
    }
  }

  /// Begins a call for the transport and the recorder, and ends it in whichever way it is left.
  class BegunCall {
   public:
    /// Throws what the recorder and the comparison across the ranks do.
    BegunCall(GroupCalls& calls, const MadeCall& made, StreamRef stream, CaptureId capture)
        : BegunCall() {
      calls.record(*this, made, stream, capture);
    }
    BegunCall(const BegunCall&) = delete;
    BegunCall& operator=(const BegunCall&) = delete;
    ~BegunCall() {
      if (calls_ != nullptr && !ended_) [[unlikely]] {
        const TransportStand stand = calls_->end_in_transport();
        if (recorded_) {
          calls_->recorder_->abandon(entry_, stand);
        }
      }
    }

    /// All of it has been enqueued.
    [[gnu::hot]] void finish() const {
      if (std::exchange(ended_, true)) {
        return;
      }
      const TransportStand stand = calls_->end_in_transport();
      if (recorded_) {
        calls_->recorder_->end(entry_, stand, call_clock().waits);
      }
    }

   private:
    friend class GroupCalls;
    /// Before it has begun.
    BegunCall() noexcept = default;

    GroupCalls* calls_ = nullptr;
    TraceEntry entry_ = {};
    bool recorded_ = false;
    mutable bool ended_ = false;
  };

  /// A call's place in the order of the group's calls, and its time. Built where it is to be, from
  /// words in registers: see `FlightRecorder::begin_into`.
  struct Call : StreamOrder::Call {
    /// In this place. The comparison across the ranks is within its time.
    Call(GroupCalls& calls, StreamRef on, CaptureId within, const MadeCall& made)
        : StreamOrder::Call{on.by_words(), within}, begun(calls, made, on, within) {}

    CallTime time;                      ///< From here to the call's end.
    BegunCall begun;                    ///< With the transport and the recorder.
    mutable bool grew_nowhere = false;  ///< Its memory was refused, which all its ranks know.
  };

  /// The group's earlier calls come first. Whatever was wrong with the arguments has been found.
  /// The call is recorded, and where debug checks are on compared across the ranks.
  [[nodiscard, gnu::hot]] Call begin(StreamRef stream, const MadeCall& made) {
    const CaptureId capture = lanes_[lane_].before(stream).capture;
    if (capture != 0) {
      // Not each piece of work: local arithmetic belongs to the backend, which outlives the group.
      stream.check_at_launch(lifeline_);
    }
    return Call(*this, stream, capture, made);
  }
  /// All of the call has been enqueued.
  void finish(const Call& call) {
    call.begun.finish();
    lanes_[lane_].after(call);
  }

  /// No call follows: captured graphs with calls of the group are refused from here on.
  void end() noexcept {
    lifeline_->end();
    transport_ = nullptr;
  }

 private:
  [[nodiscard]] TransportStand end_in_transport() const noexcept {
    return transport_ != nullptr ? transport_->call_ends()
                                 : TransportStand{.path = CallPath::local};
  }

  /// Of a call that begins.
  [[gnu::hot]] void record(BegunCall& begun, const MadeCall& made, StreamRef stream,
                           CaptureId capture) {
    const bool collective = made.call != TraceCall::send && made.call != TraceCall::recv;
    TransportStand before;
    if (transport_ != nullptr) {
      before = transport_->call_begins(made.call, stream, capture);
    }
    begun.calls_ = this;
    if (recorder_->is_on()) {
      const auto made_record = [&made]() __attribute__((always_inline)) {
        return trace_record(made.call, *made.shape, made.dtype, made.dim, made.sizes, made.variant);
      };
      recorder_->begin_into(begun.entry_, made_record, made.bytes, collective, stream, capture,
                            before, call_clock().waits);
      begun.recorded_ = true;
    }
    if (compared_over_ != nullptr && collective) {
      debug_compare(made);
    }
  }

  [[nodiscard]] static std::string types_of(const MadeCall& made) {
    return made.types ? fmt::format(" from {} and {}", to_string(made.types->nope),
                                    to_string(made.types->pe))
                      : std::string();
  }

  [[nodiscard]] static std::string epsilon_of(const MadeCall& made) {
    return made.epsilon ? fmt::format(" epsilon {}", *made.epsilon) : std::string();
  }

  /// The opt-in comparison of a call's arguments across the ranks, before anything is allocated for
  /// it.
  void debug_compare(const MadeCall& made) {
    // Extents along `dim` differ between ranks in the v-variants; their list does not.
    Dims shape = *made.shape;
    if (!made.sizes.empty()) {
      shape[made.dim] = 0;
    }
    const std::string call =
        made.call == TraceCall::barrier
            ? std::string(to_string(made.call))
            : fmt::format("{} of {}{}{} dim {} sizes [{}] variant {}{}", to_string(made.call),
                          to_string(made.dtype), to_string(shape), types_of(made), made.dim,
                          joined(made.sizes, ","), made.variant, epsilon_of(made));
    agree(*compared_over_, {.place = fmt::format("{} in {}", call, name_),
                            .sequence = compared_++,
                            .history = arena_->history_to_agree_on()});
  }

  std::string name_;  // with the word group
  Transport* transport_;
  std::shared_ptr<FlightRecorder> recorder_;
  std::shared_ptr<Lifeline> lifeline_;  // kept by graphs with calls of the group
  std::vector<StreamOrder> lanes_;      // each with an order of its own
  std::size_t lane_ = 0;
  ControlPlane* compared_over_ = nullptr;  // null where calls are not compared
  SymmetricArena* arena_ = nullptr;
  std::uint64_t compared_ = 0;
};

}  // namespace cohort::detail
