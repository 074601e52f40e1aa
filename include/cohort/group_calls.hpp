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

/// What a call is, for its record and for those who compare it across the ranks.
struct MadeCall {
  TraceCall call = TraceCall::none;          ///< Which it is.
  ConstTensorView x = {};                    ///< Empty for a barrier.
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

  /// At least so many. Throws `UsageError` for none.
  void reserve_lanes(int lanes) {
    if (lanes < 1) {
      throw UsageError(fmt::format("reserve_lanes: expected at least 1, got {}", lanes));
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

  /// Ends what the transport and the recorder have begun, in whichever way the call is left.
  class BegunCall {
   public:
    /// A call of these, with nothing recorded yet.
    explicit BegunCall(GroupCalls& calls) noexcept : calls_(&calls) {}
    BegunCall(const BegunCall&) = delete;
    BegunCall& operator=(const BegunCall&) = delete;
    /// Takes it over.
    BegunCall(BegunCall&& other) noexcept
        : calls_(std::exchange(other.calls_, nullptr)),
          entry_(other.entry_),
          recorded_(other.recorded_) {}
    BegunCall& operator=(BegunCall&&) = delete;
    ~BegunCall() {
      if (calls_ == nullptr) {
        return;
      }
      if (recorded_) {
        calls_->recorder_->abandon(entry_, calls_->stand());
      }
      if (calls_->transport_ != nullptr) {
        calls_->transport_->call_ends();
      }
    }

    /// Its record.
    void recorded(const TraceEntry& entry) noexcept {
      entry_ = entry;
      recorded_ = true;
    }
    /// All of it has been enqueued.
    void finish() const {
      if (!std::exchange(recorded_, false)) {
        return;
      }
      calls_->recorder_->end(entry_, calls_->stand(), call_clock().waits);
    }

   private:
    GroupCalls* calls_;
    TraceEntry entry_ = {};
    mutable bool recorded_ = false;  // and not ended
  };

  /// A call's place in the order of the group's calls, and its time.
  struct Call : StreamOrder::Call {
    /// In this place; once it is recorded, the time begins.
    Call(GroupCalls& calls, const StreamOrder::Call& ordered, const MadeCall& made)
        : StreamOrder::Call(ordered), begun(calls.record(made, ordered)) {}

    BegunCall begun;  ///< With the transport and the recorder.
    CallTime time;    ///< From here to the call's end.
  };

  /// The group's earlier calls come first. Whatever was wrong with the arguments has been found.
  /// The call is recorded, and where debug checks are on compared across the ranks.
  [[nodiscard]] Call begin(StreamRef stream, const MadeCall& made) {
    const StreamOrder::Call call = lanes_[lane_].before(stream);
    if (call.capture != 0) {
      // Not each piece of work: local arithmetic belongs to the backend, which outlives the group.
      call.stream.check_at_launch(lifeline_);
    }
    return Call(*this, call, made);
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
  [[nodiscard]] TransportStand stand() const noexcept {
    return transport_ != nullptr ? transport_->stand() : TransportStand{.path = CallPath::local};
  }

  /// Of a call that begins.
  [[nodiscard]] BegunCall record(const MadeCall& made, const StreamOrder::Call& call) {
    const bool collective = made.call != TraceCall::send && made.call != TraceCall::recv;
    const auto capture = call.stream.valid() ? std::optional(call.capture) : std::nullopt;
    const TransportStand before =
        transport_ != nullptr ? transport_->call_begins(made.call, capture) : TransportStand{};
    BegunCall begun(*this);
    if (recorder_->is_on()) {
      begun.recorded(recorder_->begin(
          trace_record(made.call, made.x, made.dim, made.sizes, made.variant), made.x.bytes(),
          collective, call.stream, call.capture, before, call_clock().waits));
    }
    if (compared_over_ != nullptr && collective) {
      debug_compare(made);
    }
    return begun;
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
    Dims shape = made.x.shape();
    if (!made.sizes.empty()) {
      shape[made.dim] = 0;
    }
    const std::string call =
        made.call == TraceCall::barrier
            ? std::string(to_string(made.call))
            : fmt::format("{} of {}{}{} dim {} sizes [{}] variant {}{}", to_string(made.call),
                          to_string(made.x.dtype()), to_string(shape), types_of(made), made.dim,
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
