// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cohort/call_time.hpp"
#include "cohort/captured_graph.hpp"
#include "cohort/control_plane.hpp"
#include "cohort/decode_context_parallel.hpp"
#include "cohort/formed_groups.hpp"
#include "cohort/graph_capture.hpp"
#include "cohort/group_audiences.hpp"
#include "cohort/group_coordinator.hpp"
#include "cohort/group_formation.hpp"
#include "cohort/pipeline_parallel.hpp"
#include "cohort/runtime_env.hpp"
#include "cohort/tensor_parallel.hpp"
#include "cohort/topology.hpp"
#include "cohort/trace_writer.hpp"
#include "cohort/traced_agreement.hpp"

/// \file
/// All groups of one rank: what an engine creates once.

namespace cohort {

/// The world, tensor-parallel, pipeline-parallel and decode-context-parallel group of this rank.
class ParallelState {
 public:
  /// Collective over `world`, which outlives the state and whose size must be `tp * pp`. Forms the
  /// groups, decides on symmetric memory for each, logs one line and at most one warning a group.
  /// Throws `ConfigError` for a layout or plan that cannot work and what the backend throws, and
  /// where only other ranks have failed a `SymmetryError`, or one of the type of the first failure
  /// (`TimeoutError`, `TransportError`), that quotes them.
  ///
  /// All ranks have the state afterwards, or none; except where a rank dies between the messages of
  /// the very last agreement, which no exchange of messages can rule out. Ranks that had its
  /// message then have a state and the others throw, and tell so: the first call of a group in
  /// which such a rank is throws at once, or within the time limit, a `SymmetryError`,
  /// `TransportError` or `TimeoutError` that names it.
  [[nodiscard]] static ParallelState create(ControlPlane& world, ParallelOptions options) {
    if (options.backend == nullptr) {
      throw ConfigError("ParallelOptions.backend: expected a backend, got null");
    }
    validate(options.layout, world.size());
    validate(options.merge);
    return ParallelState(world, std::move(options));
  }

  /// The source is empty afterwards.
  ParallelState(ParallelState&&) noexcept = default;
  ParallelState& operator=(ParallelState&&) = delete;
  ParallelState(const ParallelState&) = delete;
  ParallelState& operator=(const ParallelState&) = delete;
  ~ParallelState() {
    trace_.reset();
    if (formed_ != nullptr) {
      formed_->settle(formed_->reason_to_leave());
      audiences_.close();
      formed_->clear();
    }
    const detail::CallTime time;  // which the groups' last waits share
    const detail::OwnedGroups last = std::move(owned_);
  }

  /// How the ranks are divided.
  [[nodiscard]] const ParallelLayout& layout() const noexcept { return options_.layout; }
  /// Where tensors lie.
  [[nodiscard]] Backend& backend() const noexcept { return *options_.backend; }
  /// All ranks.
  [[nodiscard]] GroupCoordinator& world() noexcept { return *owned_.world; }
  /// This rank's TP group.
  [[nodiscard]] TensorParallelGroup& tp() noexcept { return *owned_.tp; }
  /// This rank's PP group.
  [[nodiscard]] PipelineParallelGroup& pp() noexcept { return *owned_.pp; }
  /// This rank's DCP group.
  [[nodiscard]] DecodeContextParallelGroup& dcp() noexcept { return *owned_.dcp; }
  /// World, TP, PP, DCP: the order in which all ranks form and leave them.
  [[nodiscard]] const std::vector<GroupCoordinator*>& groups() noexcept { return formed_->all(); }

  /// One arena whose segments are registered with several groups of this state, so that a buffer
  /// of it is symmetric in each. Groups without windows are left out; where none is left, scopes
  /// of it are null. The same groups, in any order, give the same arena.
  ///
  /// Collective where these groups are asked for the first time, over the smallest group that holds
  /// the ranks of them all ({tp, dcp}: tp; {tp, pp}: the world), whose ranks also agree on each
  /// growth of the arena; local afterwards. Throws `UsageError` for a group that is not of this
  /// state, and after `shutdown`; on every rank `SymmetryError` where the groups that have windows
  /// are not the same ones on all of them; and what an agreement throws.
  [[nodiscard]] ScopeTarget audience(const std::vector<GroupCoordinator*>& wanted) {
    return audiences_.of(wanted);
  }

  /// The arenas that a capture concerns; a `CaptureScope` takes it.
  [[nodiscard]] const CaptureDomain& captures() const noexcept { return *captures_; }
  /// For `CaptureScope`, which covers all groups.
  operator const CaptureDomain&() const noexcept {  // NOLINT(google-explicit-constructor)
    return *captures_;
  }

  /// Captures what `record` enqueues on `stream`, over all groups, inside a `CaptureScope`. Where
  /// it throws, the capture is ended and dropped. Throws `UsageError` without a stream or function.
  [[nodiscard]] CapturedGraph capture(StreamRef stream, const std::function<void()>& record,
                                      GraphPool* pool = nullptr) {
    return detail::capture_graph(*captures_, launch_order_, stream, record, pool);
  }

  /// For an engine that launches graphs of its own: `order` right before a launch puts it behind
  /// the calls of all groups so far, on whichever streams, and behind the eager uses of the memory
  /// that captures took; `launched` right behind it lets later calls on other streams wait for the
  /// launch and for nothing else. A `CapturedGraph` does both. Throw `UsageError` after `shutdown`.
  /// `graph` is the number of the capture that made the graph (`StreamRef::capture_id` inside it),
  /// for the records; 0 where the engine does not say.
  void order(StreamRef stream, CaptureId graph = 0) { launch_order_.before(stream, graph); }
  /// Right behind a launch of a graph of the engine's own; see `order`.
  void launched(StreamRef stream) { launch_order_.behind(stream); }

  /// Waits until the stream is idle, watching the peers of all groups as well: for engines whose
  /// streams carry calls of several. The limit is one for the whole wait. Throws as
  /// `GroupCoordinator::synchronize`, of the first group, in the order of `groups`, in which
  /// something was wrong; where that group's own calls are not to blame, the error tells of those
  /// that are. Goes on without groups that were shut down; `UsageError` where all were.
  void synchronize(StreamRef stream, std::chrono::milliseconds limit) {
    const auto deadline = detail::deadline_after(checked_limit("synchronize", limit));
    formed_->throw_if_all_closed("synchronize");
    for (GroupCoordinator* group : formed_->all()) {
      if (group->closed()) {
        continue;
      }
      // A stream that came to its end costs the groups that follow no wait.
      group->synchronize(stream, detail::left_until(deadline));
    }
  }
  /// Whether a call of any group is known to have failed, without asking the device; `synchronize`
  /// says what happened.
  [[nodiscard]] bool failed() const noexcept { return formed_->failed(); }

  /// Collective. Returns the memory of graphs that every rank has destroyed to the arenas, which
  /// growth and `reserve` also do.
  void reclaim_graphs() {
    const detail::CallTime time;
    for (const auto& arena : captures_->open_arenas()) {
      arena->reclaim();
    }
  }

  /// Writes this rank's last calls of every group into a file, as JSON for `cohort_trace`: those of
  /// the ranks of its machine as far as they are mapped as well. Local; any thread, at any time
  /// until the state goes. Throws `TransportError` where the system refuses.
  void write_trace(const std::string& path) const { trace_->write(path, "on demand"); }

  /// What all groups of this rank have counted, in Prometheus's text format: calls, bytes and waits
  /// by group and path. `GroupBase::counters` gives the numbers of one. Local; any thread.
  [[nodiscard]] std::string counters_text() const { return trace_->counters(); }

  /// Collective over the world: waits for all ranks once, then leaves all groups, whatever the wait
  /// brought: windows, then segments, then transports. Tensors stay readable; every later call of a
  /// group throws `UsageError`, and a second shutdown does nothing. What the wait threw is thrown
  /// in the end: `TimeoutError` naming who did not come, `SymmetryError`, `TransportError`. Where a
  /// call of a group has failed on this rank, which that call threw, it waits for nobody and tells
  /// the others of all its groups, who throw the first cause, in this wait as well.
  void shutdown() {
    std::exception_ptr failure;
    std::optional<detail::FormedGroups::Cause> cause;
    try {
      if (!shut_down_) {
        cause = formed_->reason_to_leave();  // of which the others are told: they need not come
      }
      if (!shut_down_ && !cause) {
        const detail::TracedAgreement traced(owned_.world->recorder().get(),
                                             "shutdown of the state", 0);
        detail::reporting(owned_.world->recorder().get(), [&] {
          owned_.world->control().barrier();  // no rank may still be reading what goes away
        });
      }
    } catch (const std::exception&) {
      failure = std::current_exception();
      cause = detail::FormedGroups::cause_of(*owned_.world, failure);
    }
    shut_down_ = true;
    formed_->settle(cause);
    audiences_.close();
    {
      const detail::CallTime time;  // which their last waits share
      formed_->close();
    }
    if (failure) {
      std::rethrow_exception(failure);
    }
  }

 private:
  ParallelState(ControlPlane& world, ParallelOptions options)
      : options_(detail::with_settings(std::move(options), runtime_settings())),
        captures_(std::make_shared<CaptureDomain>()),
        launch_order_(formed_, captures_),
        audiences_(formed_, captures_, options_.backend, options_.arena) {
    const detail::CallTime time;
    std::exception_ptr failure;
    try {
      trace_ = std::make_unique<StateTrace>(options_.trace, world.rank(), world.size());
    } catch (const std::exception&) {
      failure = std::current_exception();
      trace_ = std::make_unique<StateTrace>(TraceOptions{}, world.rank(), world.size());
    }
    detail::GroupFormation(world, options_, *trace_).form(owned_, failure);
    formed_->assign(owned_.all());
    for (GroupCoordinator* group : groups()) {
      captures_->add(group->arena());
      std::vector<GroupBase*> others(groups().begin(), groups().end());
      others.erase(std::find(others.begin(), others.end(), group));
      group->stand_beside(std::move(others));
    }
  }

  ParallelOptions options_;
  std::shared_ptr<CaptureDomain> captures_;  // keeps its address when the state is moved
  // Shared with captured graphs; empty once the groups are gone.
  std::shared_ptr<detail::FormedGroups> formed_ = std::make_shared<detail::FormedGroups>();
  detail::LaunchOrder launch_order_;
  detail::GroupAudiences audiences_;
  bool shut_down_ = false;
  std::unique_ptr<StateTrace> trace_;  // before the groups: they report to it until they are gone
  detail::OwnedGroups owned_;
};

}  // namespace cohort
