// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <exception>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cohort/agreement.hpp"
#include "cohort/control_plane.hpp"
#include "cohort/decode_context_parallel.hpp"
#include "cohort/give_up.hpp"
#include "cohort/group_coordinator.hpp"
#include "cohort/log.hpp"
#include "cohort/pipeline_parallel.hpp"
#include "cohort/runtime_env.hpp"
#include "cohort/symmetric_policy.hpp"
#include "cohort/tensor_parallel.hpp"
#include "cohort/topology.hpp"
#include "cohort/trace_run.hpp"
#include "cohort/trace_writer.hpp"
#include "cohort/transport.hpp"

/// \file
/// How the ranks of a world form the groups of a state: on all of them, or on none.

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

namespace detail {

/// Where the environment says something, it wins; of the log as well.
[[nodiscard]] inline ParallelOptions with_settings(ParallelOptions options,
                                                   const RuntimeSettings& settings) {
  if (settings.log_level) {
    set_default_log_level(*settings.log_level);
  }
  options.trace.folder = settings.trace_dir.value_or(options.trace.folder);
  if (settings.merge_plan) {
    options.merge.plan = *settings.merge_plan;
  }
  options.debug_checks = settings.debug_checks.value_or(options.debug_checks);
  return options;
}

/// The groups of one rank. They end in the opposite order.
struct OwnedGroups {
  std::unique_ptr<GroupCoordinator> world;          ///< Of all ranks.
  std::unique_ptr<TensorParallelGroup> tp;          ///< This rank's.
  std::unique_ptr<PipelineParallelGroup> pp;        ///< This rank's.
  std::unique_ptr<DecodeContextParallelGroup> dcp;  ///< This rank's.

  /// Those that there are, in this order.
  [[nodiscard]] std::vector<GroupCoordinator*> all() const {
    std::vector<GroupCoordinator*> groups;
    for (GroupCoordinator* const group :
         {world.get(), static_cast<GroupCoordinator*>(tp.get()),
          static_cast<GroupCoordinator*>(pp.get()), static_cast<GroupCoordinator*>(dcp.get())}) {
      if (group != nullptr) {
        groups.push_back(group);
      }
    }
    return groups;
  }
};

/// Forms groups, once.
class GroupFormation {
 public:
  /// All three outlive it.
  GroupFormation(ControlPlane& world, const ParallelOptions& options, StateTrace& trace)
      : world_(world),
        everyone_(static_cast<std::size_t>(world.size())),
        options_(options),
        trace_(trace) {
    std::iota(everyone_.begin(), everyone_.end(), 0);
  }

  /// Collective over the world; see `ParallelState::create`. `failure` is what has failed on this
  /// rank before, of which the others learn. Where it throws the caller destroys the groups.
  void form(OwnedGroups& groups, std::exception_ptr failure) const {
    TracedFormation formation(trace_, world_);
    agree_on_options(failure);
    const std::uint64_t generation = world_.new_generations(kKinds.size());
    std::optional<GiveUp> cause;
    try {
      form_all(groups, generation, formation, cause);
    } catch (const std::exception&) {
      failure = std::current_exception();
    }
    try {
      cohort::agree(
          world_,
          {.place = "formation of the groups of a ParallelState", .sequence = generation & kNumber},
          failure, patience_after_a_wait(world_), cause);
    } catch (const std::exception&) {
      if (!cause) {
        cause = GiveUp::because(std::current_exception(), world_.rank());
      }
      for (GroupCoordinator* group : groups.all()) {  // to ranks that have a state all the same
        group->control().leave_with(cause->across(world_numbering(), group->numbering()));
      }
      throw;
    }
  }

 private:
  /// The order in which all ranks form the groups.
  static constexpr std::array kKinds{GroupKind::world, GroupKind::tensor_parallel,
                                     GroupKind::pipeline_parallel,
                                     GroupKind::decode_context_parallel};
  static constexpr std::uint64_t kNumber = (std::uint64_t{1} << 62) - 1;  // for messages

  /// A rank that fails leaves the groups that it has not formed at once: their other ranks would
  /// wait for it, as soon as they have what it lacks.
  /// @param cause  What it has failed with, in the world's numbers.
  void form_all(OwnedGroups& groups, std::uint64_t generation, TracedFormation& formation,
                std::optional<GiveUp>& cause) const {
    std::vector<GroupParts> parts;
    for (const GroupKind kind : kKinds) {
      parts.push_back(prepare(kind, generation++));
    }
    std::size_t next = 0;
    std::string name = world_.name();  // of the group in which it waits
    std::vector<int> ranks = everyone_;
    try {
      trace_.belongs_to(formation.part(
          "the number of the run", [&] { return agree_on_trace_run(world_); }, true));
      const auto form = [&](auto& group, const auto&... more) {
        formation.part(
            fmt::format("formation of the {} group", to_string(kKinds[next])),
            [&] {
              name = parts[next].name;
              ranks = parts[next].ranks;
              connect(parts[next]);
              using Group = typename std::remove_reference_t<decltype(group)>::element_type;
              group = std::make_unique<Group>(std::move(parts[next++]), more...);
              trace_.add(group->recorder());
            },
            false);
      };
      form(groups.world);
      form(groups.tp);
      form(groups.pp);
      form(groups.dcp, options_.merge);
    } catch (const std::exception&) {
      const int self =
          static_cast<int>(std::find(ranks.begin(), ranks.end(), world_.rank()) - ranks.begin());
      // What another rank said is passed on as it is.
      auto said = next < parts.size() ? parts[next].control->left_with() : std::nullopt;
      if (!said) {
        said = GiveUp::because(std::current_exception(), self);
      }
      cause = said->across({name, ranks}, world_numbering());
      for (; next < parts.size(); ++next) {
        ControlPlane& control = *parts[next].control;
        control.leave_with(cause->across(world_numbering(), {parts[next].name, parts[next].ranks}));
      }
      throw;
    }
  }

  /// Ranks with different options would form groups that never meet, and one with a shorter time
  /// limit would give up on others that are in time for theirs.
  void agree_on_options(const std::exception_ptr& failure) const {
    const auto& symmetric = options_.symmetric;
    std::string selected;
    for (const GroupKind kind : kKinds) {
      selected += symmetric.selection.selects(kind, options_.layout) ? '1' : '0';
    }
    cohort::agree(
        world_,
        {.place = fmt::format(
             "creation of a ParallelState: {}, {} backend, symmetric {} for {}, "
             "peer mapping {}, merge plan {} in precision {}, debug checks {}, time limit {} ms",
             to_string(options_.layout), to_string(options_.backend->kind()), symmetric.enabled,
             selected, symmetric.peer_mapping, to_string(options_.merge.plan),
             static_cast<int>(options_.merge.staged_precision), options_.debug_checks,
             world_.limit().count()),
         .bytes = options_.arena.growth_bytes},
        failure);
  }

  /// Local.
  [[nodiscard]] GroupParts prepare(GroupKind kind, std::uint64_t generation) const {
    const auto& layout = options_.layout;
    GroupParts parts;
    parts.kind = kind;
    parts.name = group_name(kind, group_index(layout, kind, world_.rank()));
    parts.ranks = group_ranks(layout, kind, world_.rank());
    parts.control = world_.subgroup(parts.ranks, generation, parts.name);
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

  [[nodiscard]] Numbering world_numbering() const noexcept { return {world_.name(), everyone_}; }

  ControlPlane& world_;
  std::vector<int> everyone_;  // in the world
  const ParallelOptions& options_;
  StateTrace& trace_;
};

}  // namespace detail

}  // namespace cohort
