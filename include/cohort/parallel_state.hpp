#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cohort/agreement.hpp"
#include "cohort/control_plane.hpp"
#include "cohort/decode_context_parallel.hpp"
#include "cohort/graph_capture.hpp"
#include "cohort/group_coordinator.hpp"
#include "cohort/log.hpp"
#include "cohort/pipeline_parallel.hpp"
#include "cohort/runtime_env.hpp"
#include "cohort/symmetric_policy.hpp"
#include "cohort/tensor_parallel.hpp"
#include "cohort/topology.hpp"

/// \file
/// All groups of one rank: what an engine creates once.

namespace cohort {

struct ParallelOptions {
  ParallelLayout layout = {};
  /// `host_backend()` or `cuda_backend()`; all groups share it.
  std::shared_ptr<Backend> backend = {};
  SymmetricOptions symmetric = {};
  /// `COHORT_MERGE_PLAN` wins over `merge.plan` where it is set.
  MergeOptions merge = {};
  /// Compare op, dtype, count and window offsets across the ranks before each call: slow, for
  /// debugging. `COHORT_DEBUG_CHECKS` wins where it is set.
  bool debug_checks = false;
  ArenaOptions arena = {};
};

/// A captured graph and the memory that it leases.
class CapturedGraph {
 public:
  using Around = std::function<void(StreamRef)>;

  /// @param before, behind  Called around each launch with its stream.
  CapturedGraph(std::unique_ptr<ExecutableGraph> graph, Around before, Around behind)
      : graph_(std::move(graph)), before_(std::move(before)), behind_(std::move(behind)) {}

  /// Enqueues the captured work after the eager calls so far, on whichever streams. All ranks
  /// launch the same sequence of graphs and calls. Throws `UsageError` after the state's shutdown.
  void launch(StreamRef stream) {
    before_(stream);
    graph_->launch(stream);
    behind_(stream);
  }

 private:
  std::unique_ptr<ExecutableGraph> graph_;
  Around before_;
  Around behind_;
};

/// The world, tensor-parallel, pipeline-parallel and decode-context-parallel group of this rank.
class ParallelState {
 public:
  /// Collective over `world`, which outlives the state and whose size must be `tp * pp`. Forms the
  /// groups, decides on symmetric memory for each, logs one line and at most one warning a group.
  /// Throws `ConfigError` for a layout or plan that cannot work, before anything is created, and
  /// what the backend throws.
  [[nodiscard]] static ParallelState create(ControlPlane& world, ParallelOptions options) {
    if (options.backend == nullptr) {
      throw ConfigError("ParallelOptions.backend: expected a backend, got null");
    }
    validate(options.layout, world.size());
    return ParallelState(world, std::move(options));
  }

  ParallelState(ParallelState&&) noexcept = default;
  ParallelState& operator=(ParallelState&&) = delete;
  ParallelState(const ParallelState&) = delete;
  ParallelState& operator=(const ParallelState&) = delete;
  ~ParallelState() {
    close_audiences();
    if (formed_ != nullptr) {
      formed_->clear();
    }
  }

  [[nodiscard]] const ParallelLayout& layout() const noexcept { return options_.layout; }
  [[nodiscard]] Backend& backend() const noexcept { return *options_.backend; }
  [[nodiscard]] GroupCoordinator& world() noexcept { return *world_; }
  [[nodiscard]] TensorParallelGroup& tp() noexcept { return *tp_; }
  [[nodiscard]] PipelineParallelGroup& pp() noexcept { return *pp_; }
  [[nodiscard]] DecodeContextParallelGroup& dcp() noexcept { return *dcp_; }
  /// World, TP, PP, DCP: the order in which all ranks form and leave them.
  [[nodiscard]] const std::vector<GroupCoordinator*>& groups() noexcept { return *formed_; }

  /// One arena whose segments are registered with several groups of this state, so that a buffer
  /// of it is symmetric in each. Groups without windows are left out; where none is left, scopes
  /// of it are null. The same groups, in any order, give the same arena. Local, by every rank
  /// alike. Throws `UsageError` for a group that is not of this state, and after `shutdown`.
  [[nodiscard]] ScopeTarget audience(const std::vector<GroupCoordinator*>& wanted) {
    std::vector<AudienceMember> members;
    std::string name;  // of kinds: the names of groups differ between the ranks of another group
    std::size_t found = 0;
    for (GroupCoordinator* group : groups()) {
      if (std::find(wanted.begin(), wanted.end(), group) == wanted.end()) {
        continue;
      }
      ++found;
      if (group->decision().nccl_windows.on) {
        members.push_back(group->audience_member());
        name += fmt::format("{}{}", name.empty() ? "" : "+", to_string(group->kind()));
      }
    }
    if (found != wanted.size()) {
      throw UsageError("audience groups: expected different groups of this ParallelState");
    }
    if (members.empty()) {
      return {nullptr, options_.backend.get()};
    }
    for (const auto& arena : audiences_) {
      if (arena->name() == name) {
        return {arena.get(), options_.backend.get()};
      }
    }
    audiences_.push_back(
        SymmetricArena::create(*options_.backend, name, std::move(members), options_.arena));
    captures_->add(audiences_.back());
    return {audiences_.back().get(), options_.backend.get()};
  }

  /// The arenas that a capture concerns; a `CaptureScope` takes it.
  [[nodiscard]] const CaptureDomain& captures() const noexcept { return *captures_; }
  operator const CaptureDomain&() const noexcept {  // NOLINT(google-explicit-constructor)
    return *captures_;
  }

  /// Captures what `record` enqueues on `stream`, over all groups, inside a `CaptureScope`. Where
  /// it throws, the capture is ended and dropped. Throws `UsageError` without a stream or function.
  [[nodiscard]] CapturedGraph capture(StreamRef stream, const std::function<void()>& record,
                                      GraphPool* pool = nullptr) {
    if (!stream.valid()) {
      throw UsageError("capture stream: expected a stream, got none");
    }
    if (!record) {
      throw UsageError("capture record: expected a function, got an empty one");
    }
    auto& driver = stream.driver();
    driver.begin_capture(stream.native());
    try {
      CaptureScope scope(*captures_, stream, pool);
      try {
        record();
      } catch (...) {
        scope.drop();
        throw;
      }
    } catch (...) {
      drop_capture(stream);
      throw;
    }
    return {driver.end_capture(stream.native()),
            [formed = formed_, captures = std::weak_ptr(captures_)](StreamRef on) {
              const auto domain = captures.lock();
              if (formed->empty() || domain == nullptr) {
                throw UsageError("graph launch: the ParallelState of the graph was destroyed");
              }
              order_launch(*formed, *domain, on);
            },
            [formed = formed_](StreamRef on) {
              for (GroupCoordinator* group : *formed) {
                group->launched(on);
              }
            }};
  }

  /// For an engine that launches graphs of its own: `order` right before a launch puts it behind
  /// the calls of all groups so far, on whichever streams, and behind the eager uses of the memory
  /// that captures took; `launched` right behind it lets later calls on other streams wait for the
  /// launch and for nothing else. A `CapturedGraph` does both. Throw `UsageError` after `shutdown`.
  void order(StreamRef stream) { order_launch(*formed_, *captures_, stream); }
  void launched(StreamRef stream) {
    for (GroupCoordinator* group : *formed_) {
      group->launched(stream);
    }
  }

  /// Collective. Returns the memory of graphs that every rank has destroyed to the arenas, which
  /// growth and `reserve` also do.
  void reclaim_graphs() {
    for (const auto& arena : captures_->arenas()) {
      arena->reclaim();
    }
  }

  /// Collective. Leaves all groups: windows, then segments, then transports. Tensors stay readable;
  /// every later call of a group throws `UsageError`.
  void shutdown() {
    close_audiences();
    for (auto group = formed_->rbegin(); group != formed_->rend(); ++group) {
      (*group)->shutdown();
    }
  }

 private:
  ParallelState(ControlPlane& world, ParallelOptions options)
      : options_(std::move(options)), captures_(std::make_shared<CaptureDomain>()) {
    const auto& settings = runtime_settings();
    if (settings.log_level) {
      set_default_log_level(*settings.log_level);
    }
    if (settings.merge_plan) {
      options_.merge.plan = *settings.merge_plan;
    }
    options_.debug_checks = settings.debug_checks.value_or(options_.debug_checks);
    agree_on_options(world);
    generation_ = next_generation(world);
    world_ = std::make_unique<GroupCoordinator>(form(world, GroupKind::world));
    tp_ = std::make_unique<TensorParallelGroup>(form(world, GroupKind::tensor_parallel));
    pp_ = std::make_unique<PipelineParallelGroup>(form(world, GroupKind::pipeline_parallel));
    dcp_ = std::make_unique<DecodeContextParallelGroup>(
        form(world, GroupKind::decode_context_parallel), options_.merge);
    *formed_ = {world_.get(), tp_.get(), pp_.get(), dcp_.get()};
    for (const GroupCoordinator* group : *formed_) {
      captures_->add(group->arena());
    }
  }

  /// Ranks with different options would form groups that never meet.
  void agree_on_options(ControlPlane& world) const {
    const auto& symmetric = options_.symmetric;
    std::string selected;
    for (const GroupKind kind :
         {GroupKind::world, GroupKind::tensor_parallel, GroupKind::pipeline_parallel,
          GroupKind::decode_context_parallel}) {
      selected += symmetric.selection.selects(kind, options_.layout) ? '1' : '0';
    }
    ControlPlane* control = &world;
    agree(std::span(&control, 1),
          {.place = fmt::format(
               "creation of a ParallelState: {}, {} backend, symmetric {} for {}, "
               "peer mapping {}, merge plan {} in precision {}, debug checks {}",
               to_string(options_.layout), to_string(options_.backend->kind()), symmetric.enabled,
               selected, symmetric.peer_mapping, to_string(options_.merge.plan),
               static_cast<int>(options_.merge.staged_precision), options_.debug_checks),
           .bytes = options_.arena.growth_bytes});
  }

  /// A number that tells this state's groups from those of every other state over the same world:
  /// messages of a state that failed may still be on their way when the next one is formed.
  static std::uint64_t next_generation(ControlPlane& world) {
    static std::atomic<std::uint64_t> states{0};
    // Apart from what the engine gives to `subgroup` and from the generations of `split`.
    std::uint64_t generation = (std::uint64_t{1} << 62) | states.fetch_add(1) << 2;
    const auto bytes = world.broadcast(std::as_bytes(std::span(&generation, 1)), 0);
    if (bytes.size() == sizeof(generation)) {
      std::memcpy(&generation, bytes.data(), sizeof(generation));
    }
    return generation;
  }

  [[nodiscard]] GroupParts form(ControlPlane& world, GroupKind kind) {
    const auto& layout = options_.layout;
    GroupParts parts;
    parts.kind = kind;
    parts.name = group_name(kind, group_index(layout, kind, world.rank()));
    parts.ranks = group_ranks(layout, kind, world.rank());
    parts.control =
        world.subgroup(parts.ranks, generation_ | static_cast<std::uint64_t>(kind), parts.name);
    parts.backend = options_.backend;
    SymmetricCapabilities found;
    if (parts.ranks.size() > 1) {
      parts.transport = options_.backend->connect(*parts.control);
      found = parts.transport->capabilities();
    }
    parts.decision = decide(options_.symmetric, kind, layout, found);
    parts.debug_checks = options_.debug_checks;
    parts.arena = options_.arena;
    if (parts.control->rank() == 0) {
      log(LogLevel::info, fmt::format("{}: {}", parts.name, describe(parts.decision)));
      if (warning_due(parts.decision)) {
        log(LogLevel::warning, fmt::format("{}: {}", parts.name, describe(parts.decision)));
      }
    }
    return parts;
  }

  static void order_launch(const std::vector<GroupCoordinator*>& formed,
                           const CaptureDomain& captures, StreamRef stream) {
    for (GroupCoordinator* group : formed) {
      group->order(stream);
    }
    for (const auto& arena : captures.arenas()) {
      arena->order_launch(stream);  // those of audiences as well
    }
  }

  static void drop_capture(StreamRef stream) noexcept {
    try {
      stream.driver().end_capture(stream.native()).reset();
    } catch (const std::exception& error) {
      log(LogLevel::info, fmt::format("a dropped capture had failed: {}", error.what()));
    }
  }

  void close_audiences() noexcept {
    for (const auto& arena : audiences_) {
      arena->close();
    }
  }

  ParallelOptions options_;
  std::uint64_t generation_ = 0;
  std::shared_ptr<CaptureDomain> captures_;  // keeps its address when the state is moved
  // Shared with captured graphs; empty once the groups are gone.
  std::shared_ptr<std::vector<GroupCoordinator*>> formed_ =
      std::make_shared<std::vector<GroupCoordinator*>>();
  std::vector<std::shared_ptr<SymmetricArena>> audiences_;
  std::unique_ptr<GroupCoordinator> world_;
  std::unique_ptr<TensorParallelGroup> tp_;
  std::unique_ptr<PipelineParallelGroup> pp_;
  std::unique_ptr<DecodeContextParallelGroup> dcp_;
};

}  // namespace cohort
