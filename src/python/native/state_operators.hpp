// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>
#include <torch/headeronly/version.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "cohort/cohort.hpp"
#include "cohort/torch.hpp"
#include "engines.hpp"
#include "meeting.hpp"
#include "operands.hpp"
#include "torch_pools.hpp"
#if COHORT_TORCH_WITH_CUDA
#include "cohort/cuda.hpp"
#include "cohort/nccl/known_faults.hpp"
#include "cohort/nccl/nccl_check.hpp"
#endif

/// \file
/// The operators of a whole state, from its making to its end, and what the package was built with.

namespace cohort::python {

[[nodiscard]] inline std::shared_ptr<Backend> make_backend(std::int64_t device, bool peer_mapping) {
  if (device < 0) {
    return host_backend({.map_peers = peer_mapping});
  }
#if COHORT_TORCH_WITH_CUDA
  // Torch has started CUDA, and threads run: the environment is as it is.
  return cuda_backend({.device = as_int(device),
                       .environment = {.leave_alone = true},
                       .peer_mapping = peer_mapping});
#else
  throw ConfigError("device: the package was built without CUDA, so only cpu can be had");
#endif
}

[[nodiscard]] inline GroupKind kind_of(std::string_view name) {
  for (const GroupKind kind : {GroupKind::world, GroupKind::tensor_parallel,
                               GroupKind::pipeline_parallel, GroupKind::decode_context_parallel}) {
    if (name == to_string(kind)) {
      return kind;
    }
  }
  throw ConfigError(fmt::format("symmetric: expected world, tp, pp or dcp, got {}", name));
}

[[nodiscard]] inline SymmetricOptions symmetric_options(const Names& symmetric, bool peer_mapping) {
  SymmetricOptions options{.enabled = !symmetric.empty(), .peer_mapping = peer_mapping};
  if (symmetric == Names{"all"}) {
    options.selection = Selection::all();
  } else if (options.enabled && symmetric != Names{"automatic"}) {
    GroupKindSet kinds;
    for (const auto& name : symmetric) {
      kinds.insert(kind_of(name));
    }
    options.selection = Selection::of(kinds);
  }
  return options;
}

/// Layout is tp, pp, dcp; meeting is this rank and the number of ranks, where `control` needs them.
inline std::int64_t parallel_state(Name control, Sizes meeting, Sizes layout, std::int64_t device,
                                   Names symmetric, Name merge_plan, bool peer_mapping,
                                   bool debug_checks, std::int64_t limit_ms,
                                   std::int64_t growth_bytes) {
  const auto plan = merge_plan_from_string(merge_plan);
  if (!plan) {
    throw ConfigError(fmt::format(
        "merge_plan: expected automatic, staged, packed or one_kernel, got {}", merge_plan));
  }
  const std::chrono::milliseconds limit =
      runtime_settings().timeout.value_or(std::chrono::milliseconds(limit_ms));
  if (!is_time_limit(limit)) {
    throw ConfigError(fmt::format("timeout: expected more than 0 s, got {} ms", limit_ms));
  }
  if (growth_bytes < 0) {
    throw ConfigError(fmt::format("growth_bytes: expected at least 0, got {}", growth_bytes));
  }
  auto engine = std::make_shared<Engine>();
  const SignalLook<Engine> look(*engine);
  engine->backend = make_backend(device, peer_mapping);
  engine->world = meet(control, as_int(meeting.at(0)), as_int(meeting.at(1)), limit);
  engine->state.emplace(ParallelState::create(
      *engine->world, {.layout = {.tp = as_int(layout.at(0)),
                                  .pp = as_int(layout.at(1)),
                                  .dcp = as_int(layout.at(2))},
                       .backend = engine->backend,
                       .symmetric = symmetric_options(symmetric, peer_mapping),
                       .merge = {.plan = *plan},
                       .debug_checks = debug_checks,
                       .arena = {.growth_bytes = static_cast<std::size_t>(growth_bytes)}}));
  Interruption::raise();
  return Engines::of_process().add(std::move(engine));
}

[[nodiscard]] inline Use use_state(std::int64_t state) {
  return Use(Engines::of_process().engine(state), "ParallelState");
}

inline void shutdown(std::int64_t state) {
  const Use use = use_state(state);
  use.engine().captures.clear();
  use.state().shutdown();
}

inline void drop(std::int64_t state) {
  TorchPools::of_process().leave(Engines::prefix_of(state));
  Engines::of_process().drop(state);
}

inline Names groups(std::int64_t state) {
  const Use use = use_state(state);
  Names names;
  for (const GroupCoordinator* group : use.state().groups()) {
    names.push_back(Engines::name_of(use.engine(), *group));
  }
  return names;
}

inline Names describe(std::int64_t state) {
  const Use use = use_state(state);
  Names lines;
  for (const GroupCoordinator* group : use.state().groups()) {
    lines.push_back(fmt::format("{}: {}", group->name(), cohort::describe(group->decision())));
  }
#if COHORT_TORCH_WITH_CUDA
  lines.push_back(describe_nccl(nccl_runtime_version()));
#endif
  return lines;
}

inline void synchronize(std::int64_t state, std::int64_t limit_ms) {
  const Use use = use_state(state);
  use.state().synchronize(use.stream(), std::chrono::milliseconds(limit_ms));
}

inline void order(std::int64_t state) {
  const Use use = use_state(state);
  use.state().order(use.stream());
}

inline void launched(std::int64_t state) {
  const Use use = use_state(state);
  use.state().launched(use.stream());
}

inline void reclaim_graphs(std::int64_t state) { use_state(state).state().reclaim_graphs(); }

inline void begin_graphs(std::int64_t state, bool pooled) {
  const Use use = use_state(state);
  ++use.engine().graph_captures;
  use.engine().pooled = pooled;
}

inline void end_graphs(std::int64_t state) {
  const Use use = use_state(state);
  if (--use.engine().graph_captures == 0) {
    use.engine().captures.clear();
  }
}

/// 0 where the package was built without CUDA.
inline std::int64_t nccl_version() {
#if COHORT_TORCH_WITH_CUDA
  return nccl_runtime_version();
#else
  return 0;
#endif
}

/// Of the torch that the operators were built against, such as "2.11.0".
inline std::string built_for() {
  return fmt::format("{}.{}.{}", TORCH_VERSION_MAJOR, TORCH_VERSION_MINOR, TORCH_VERSION_PATCH);
}

inline Names parts() {
  Names parts;
#if COHORT_TORCH_WITH_MPI
  parts.emplace_back("mpi");
#endif
#if COHORT_TORCH_WITH_CUDA
  parts.emplace_back("cuda");
#endif
  return parts;
}

inline void record_stream(const at::Tensor& x, std::int64_t state) {
  const auto engine = Engines::of_process().engine(state);
  if (tensor_behind(x) == nullptr) {
    record_current_stream(x, *engine->backend);  // torch's business, under torch's own lock
    return;
  }
  const Use use(engine, "ParallelState");
  record_current_stream(x, *engine->backend);
}

}  // namespace cohort::python
