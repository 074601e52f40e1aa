// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "cohort/agreement.hpp"
#include "cohort/call_time.hpp"
#include "cohort/captured_graph.hpp"
#include "cohort/control_plane.hpp"
#include "cohort/decode_context_parallel.hpp"
#include "cohort/formed_groups.hpp"
#include "cohort/graph_capture.hpp"
#include "cohort/group_audiences.hpp"
#include "cohort/group_coordinator.hpp"
#include "cohort/log.hpp"
#include "cohort/pipeline_parallel.hpp"
#include "cohort/runtime_env.hpp"
#include "cohort/symmetric_policy.hpp"
#include "cohort/tensor_parallel.hpp"
#include "cohort/topology.hpp"
#include "cohort/trace_run.hpp"
#include "cohort/trace_writer.hpp"

/// \file
/// All groups of one rank: what an engine creates once.

namespace cohort {

/// What `ParallelState::create` is asked for.
struct ParallelOptions {
  /// How the ranks are divided into groups.
  ParallelLayout layout = {};
  /// `host_backend()` or `cuda_backend()`; all groups share it.
  std::shared_ptr<Backend> backend = {};
  /// Which groups get windows.
  SymmetricOptions symmetric = {};
  /// `COHORT_MERGE_PLAN` wins over `merge.plan` where it is set.
  MergeOptions merge = {};
  /// Compare op, dtype, count and window offsets across the ranks before each call: slow, for
  /// debugging. `COHORT_DEBUG_CHECKS` wins where it is set.
  bool debug_checks = false;
  /// Of every arena.
  ArenaOptions arena = {};
  /// Where and when each rank writes its last calls; may differ between the ranks.
  TraceOptions trace = {};
};

/// The world, tensor-parallel, pipeline-parallel and decode-context-parallel group of this rank.
class ParallelState {
 public:
  /// Collective over `world`, which outlives the state and whose size must be `tp * pp`. Forms the
  /// groups, decides on symmetric memory for each, logs one line and at most one warning a group.
  /// Throws `ConfigError` for a layout or plan that cannot work and what the backend throws, and
  /// where only other ranks have failed a `SymmetryError` or `TimeoutError` that quotes them.
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
    dcp_.reset();
    pp_.reset();
    tp_.reset();
    world_.reset();
  }

  /// How the ranks are divided.
  [[nodiscard]] const ParallelLayout& layout() const noexcept { return options_.layout; }
  /// Where tensors lie.
  [[nodiscard]] Backend& backend() const noexcept { return *options_.backend; }
  /// All ranks.
  [[nodiscard]] GroupCoordinator& world() noexcept { return *world_; }
  /// This rank's TP group.
  [[nodiscard]] TensorParallelGroup& tp() noexcept { return *tp_; }
  /// This rank's PP group.
  [[nodiscard]] PipelineParallelGroup& pp() noexcept { return *pp_; }
  /// This rank's DCP group.
  [[nodiscard]] DecodeContextParallelGroup& dcp() noexcept { return *dcp_; }
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
      group->synchronize(stream, std::max(std::chrono::milliseconds(1),
                                          std::chrono::ceil<std::chrono::milliseconds>(
                                              deadline - std::chrono::steady_clock::now())));
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
  /// in the end: `TimeoutError` naming who did not come, `SymmetryError`, `TransportError`.
  void shutdown() {
    std::exception_ptr failure;
    std::string reason;
    try {
      if (!shut_down_) {
        if (const std::string why = formed_->reason_to_leave(); !why.empty()) {
          // Not in the world, where it waits for those who learn it so, or need not.
          formed_->tell(why, [&](const GroupCoordinator* group) { return group != world_.get(); });
        }
        const detail::TracedAgreement traced(world_->recorder().get(), "shutdown of the state", 0);
        detail::reporting(world_->recorder().get(), [&] {
          world_->control().barrier();  // no rank may still be reading what goes away
        });
      }
    } catch (const std::exception& error) {
      failure = std::current_exception();
      reason = error.what();
    }
    shut_down_ = true;
    formed_->settle(reason);
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
      : options_(std::move(options)),
        captures_(std::make_shared<CaptureDomain>()),
        launch_order_(formed_, captures_),
        audiences_(formed_, captures_, options_.backend, options_.arena) {
    const auto& settings = runtime_settings();
    if (settings.log_level) {
      set_default_log_level(*settings.log_level);
    }
    options_.trace.folder = settings.trace_dir.value_or(options_.trace.folder);
    if (settings.merge_plan) {
      options_.merge.plan = *settings.merge_plan;
    }
    options_.debug_checks = settings.debug_checks.value_or(options_.debug_checks);
    const detail::CallTime time;
    std::exception_ptr failure;
    try {
      trace_ = std::make_unique<StateTrace>(options_.trace, world.rank(), world.size());
    } catch (const std::exception&) {
      failure = std::current_exception();
      trace_ = std::make_unique<StateTrace>(TraceOptions{}, world.rank(), world.size());
    }
    detail::TracedFormation formation(*trace_, world);
    agree_on_options(world, failure);
    trace_->belongs_to(formation.part(
        "the number of the run", [&] { return detail::agree_on_trace_run(world); }, true));
    const std::uint64_t generation = world.new_generations(kKinds.size());
    try {
      form_all(world, generation, formation);
    } catch (const std::exception&) {
      failure = std::current_exception();
    }
    try {
      agree(
          world,
          {.place = "formation of the groups of a ParallelState", .sequence = generation & kNumber},
          failure, patience_after_a_wait(world));
    } catch (const std::exception& error) {
      for (GroupCoordinator* group : {world_.get(), static_cast<GroupCoordinator*>(tp_.get()),
                                      static_cast<GroupCoordinator*>(pp_.get()),
                                      static_cast<GroupCoordinator*>(dcp_.get())}) {
        if (group != nullptr) {
          group->control().give_up(error.what());  // to ranks that have a state all the same
        }
      }
      throw;
    }
    formed_->assign({world_.get(), tp_.get(), pp_.get(), dcp_.get()});
    for (GroupCoordinator* group : groups()) {
      captures_->add(group->arena());
      std::vector<GroupBase*> others(groups().begin(), groups().end());
      others.erase(std::find(others.begin(), others.end(), group));
      group->stand_beside(std::move(others));
    }
  }

  /// The order in which all ranks form the groups.
  static constexpr std::array kKinds{GroupKind::world, GroupKind::tensor_parallel,
                                     GroupKind::pipeline_parallel,
                                     GroupKind::decode_context_parallel};
  static constexpr std::uint64_t kNumber = (std::uint64_t{1} << 62) - 1;  // for messages

  /// A rank that fails leaves the groups that it has not formed at once: their other ranks would
  /// wait for it.
  void form_all(ControlPlane& world, std::uint64_t generation, detail::TracedFormation& formation) {
    std::vector<GroupParts> parts;
    for (const GroupKind kind : kKinds) {
      parts.push_back(prepare(world, kind, generation++));
    }
    std::size_t next = 0;
    try {
      const auto form = [&](auto& group, const auto&... more) {
        formation.part(
            fmt::format("formation of the {} group", to_string(kKinds[next])),
            [&] {
              connect(parts[next]);
              using Group = typename std::remove_reference_t<decltype(group)>::element_type;
              group = std::make_unique<Group>(std::move(parts[next++]), more...);
              trace_->add(group->recorder());
            },
            false);
      };
      form(world_);
      form(tp_);
      form(pp_);
      form(dcp_, options_.merge);
    } catch (const std::exception& error) {
      for (; next < parts.size(); ++next) {
        parts[next].control->give_up(error.what());
      }
      throw;
    }
  }

  /// Ranks with different options would form groups that never meet, and one with a shorter time
  /// limit would give up on others that are in time for theirs.
  void agree_on_options(ControlPlane& world, const std::exception_ptr& failure) const {
    const auto& symmetric = options_.symmetric;
    std::string selected;
    for (const GroupKind kind :
         {GroupKind::world, GroupKind::tensor_parallel, GroupKind::pipeline_parallel,
          GroupKind::decode_context_parallel}) {
      selected += symmetric.selection.selects(kind, options_.layout) ? '1' : '0';
    }
    agree(world,
          {.place = fmt::format(
               "creation of a ParallelState: {}, {} backend, symmetric {} for {}, "
               "peer mapping {}, merge plan {} in precision {}, debug checks {}, time limit {} ms",
               to_string(options_.layout), to_string(options_.backend->kind()), symmetric.enabled,
               selected, symmetric.peer_mapping, to_string(options_.merge.plan),
               static_cast<int>(options_.merge.staged_precision), options_.debug_checks,
               world.limit().count()),
           .bytes = options_.arena.growth_bytes},
          failure);
  }

  /// Local.
  [[nodiscard]] GroupParts prepare(ControlPlane& world, GroupKind kind,
                                   std::uint64_t generation) const {
    const auto& layout = options_.layout;
    GroupParts parts;
    parts.kind = kind;
    parts.name = group_name(kind, group_index(layout, kind, world.rank()));
    parts.ranks = group_ranks(layout, kind, world.rank());
    parts.control = world.subgroup(parts.ranks, generation, parts.name);
    parts.backend = options_.backend;
    parts.debug_checks = options_.debug_checks;
    parts.arena = options_.arena;
    return parts;
  }

  /// Collective over the group.
  void connect(GroupParts& parts) const {
    SymmetricCapabilities found;
    if (parts.ranks.size() > 1) {
      parts.transport = options_.backend->connect(*parts.control);
      found = parts.transport->capabilities();
    }
    parts.decision = decide(options_.symmetric, parts.kind, options_.layout, found);
    if (parts.control->rank() == 0) {
      log(LogLevel::info, "{}: {}", parts.name, describe(parts.decision));
      if (warning_due(parts.decision)) {
        log(LogLevel::warning, "{}: {}", parts.name, describe(parts.decision));
      }
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
  std::unique_ptr<GroupCoordinator> world_;
  std::unique_ptr<TensorParallelGroup> tp_;
  std::unique_ptr<PipelineParallelGroup> pp_;
  std::unique_ptr<DecodeContextParallelGroup> dcp_;
};

}  // namespace cohort
