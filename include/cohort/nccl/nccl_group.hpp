// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "cohort/agreement.hpp"
#include "cohort/call_time.hpp"
#include "cohort/control_plane.hpp"
#include "cohort/cuda/block_budget.hpp"
#include "cohort/cuda/cuda_peer_kernels.hpp"
#include "cohort/cuda/cuda_stream.hpp"
#include "cohort/cuda/handles.hpp"
#include "cohort/cuda/workspace.hpp"
#include "cohort/error.hpp"
#include "cohort/first_cause.hpp"
#include "cohort/hash.hpp"
#include "cohort/log.hpp"
#include "cohort/nccl/bounded_call.hpp"
#include "cohort/nccl/cause_finder.hpp"
#include "cohort/nccl/communicator.hpp"
#include "cohort/nccl/machine_probe.hpp"
#include "cohort/nccl/own_failure.hpp"
#include "cohort/nccl/trace_memory.hpp"
#include "cohort/nccl/transport_options.hpp"
#include "cohort/tensor.hpp"
#include "cohort/traced_agreement.hpp"
#include "cohort/transport.hpp"

/// \file
/// What the parts of a transport over NCCL share: how the group was formed, and what a call begins
/// with.

namespace cohort::detail {

/// What a group over NCCL has, for the parts of its transport. The members' order is the order of
/// teardown in reverse: inboxes and scratch memory go before the communicator. Windows hold the
/// communicator themselves.
struct NcclGroup {
  /// Collective over `plane`, which outlives it; see `NcclTransport`.
  NcclGroup(ControlPlane& plane, CudaStreamDriver& driver, int card,
            const NcclTransportOptions& chosen)
      : control(plane),
        streams(driver),
        device(card),
        options(chosen),
        rank(plane.rank()),
        size(plane.size()) {
    workspaces.emplace_back(device);
    agree_on_options();
    const GroupProbe probe = probe_group(control, device);
    capabilities = probe.capabilities;
    ranks_per_card = std::max(options.ranks_per_card, probe.ranks_per_device);
    std::vector<ProcessIdentity> processes;  // by rank
    for (const MachineFacts& facts : probe.ranks) {
      processes.push_back(facts.process);
    }
    finder = CauseFinder(std::move(processes));
    nccl_version = capabilities.nccl_runtime_version;
    whole_lines = probe.whole_lines;
    if (size == 1) {
      capabilities.peer_import = true;
      return;
    }
    trace_rings = make_trace_rings(control);
    communicator = Communicator::create(control, device, finder);
    barrier_word = make_memory(device, sizeof(float));
    if (options.peer_mapping && capabilities.machines == 1 && capabilities.peer_access) {
      connect_peers(probe);
    } else if (!options.peer_mapping) {
      capabilities.obstacle = "CudaOptions::peer_mapping is false";
    }
    control.when_left([this] { end_enqueued(); });
  }
  NcclGroup(const NcclGroup&) = delete;
  NcclGroup& operator=(const NcclGroup&) = delete;
  ~NcclGroup() { control.when_left(nullptr); }

  [[nodiscard]] bool own_failed() const noexcept { return peers != nullptr && peers->failed(); }
  /// Whether the own kernels have found a failure themselves: where they were told to end because
  /// the group had failed, what they missed then says nothing.
  [[nodiscard]] bool own_found_failure() const noexcept { return own_failed() && !ended; }
  [[nodiscard]] bool failed() const noexcept {
    return own_failed() || (communicator != nullptr && communicator->broken()) ||
           control.poisoned();
  }

  /// Throws what a rank said that has left the group, also where this one has left with it before.
  void check_peers(PeerLook look = PeerLook::now) {
    control.check_peers(look);
    if (control.poisoned()) {
      if (const auto said = control.left_with()) {
        said->raise("wait", control.name());
      }
      throw_failed();
    }
  }

  /// Has what this rank has enqueued end, once it has left the group, by whichever call or thread:
  /// it may free memory next, for which a card waits until no kernel runs. A kernel of NCCL that is
  /// told to stop still sends what it has, and its peers end as if all were well, so that only
  /// words tell them: they are said before it is told, and looked for behind it. Any thread.
  void end_enqueued() noexcept {
    if (peers != nullptr) {
      if (!peers->failed()) {
        ended = true;
      }
      peers->give_up();
    }
    if (communicator != nullptr) {
      communicator->abort();
    }
  }

  /// A call, or a launch of a graph that may hold some, comes on `stream`. Throws where it cannot
  /// work, because the group has failed or another rank has left, which the recorder learns.
  void enter(cudaStream_t stream, bool can_work = true) {
    const bool calm = can_work && !own_failed() && communicator != nullptr &&
                      !communicator->broken() && control.is_calm();
    if (!calm) [[unlikely]] {
      look_around(can_work);
    }
    if (size > 1) {
      last_stream.store(stream, std::memory_order_relaxed);
      used.store(true, std::memory_order_release);
    }
  }
  /// Throws where a call cannot work.
  [[gnu::cold, gnu::noinline]] void look_around(bool can_work) {
    reporting(control.recorder(), [&] {
      if (failed() || !can_work) {
        throw_failed();
      }
      if (size > 1) {
        check_peers(PeerLook::lately);
      }
    });
  }
  /// Whether the last one came on `stream`. Any thread.
  [[nodiscard]] bool came_on(cudaStream_t stream) const noexcept {
    return used.load(std::memory_order_acquire) &&
           last_stream.load(std::memory_order_relaxed) == stream;
  }

  /// Leaves the group behind `error`: the others learn why before NCCL is told to end, and this
  /// rank throws the same, `.error`. See `CauseFinder`.
  [[nodiscard]] FirstCause leave(const std::exception_ptr& error,
                                 CauseFinder::Clock::time_point latest) {
    if (communicator != nullptr) {
      communicator->mark_broken();
    }
    return finder.leave(control, error, latest);
  }
  /// The same where no stream is waited for. Throws it.
  [[noreturn]] void fail(const std::exception_ptr& error) {
    std::rethrow_exception(leave(error, CauseFinder::Clock::time_point::max()).error);
  }

  /// What the own kernels have failed with.
  [[nodiscard]] std::exception_ptr own_failure() const {
    return detail::own_failure(*peers, control.name(), rank);
  }

  /// With the words that this rank has left with, which its calls have not heard where another
  /// group said them.
  [[noreturn]] void throw_failed() const {
    const auto said = control.left_with();
    throw TransportError({.call = "a collective", .rank = rank, .group = control.name()},
                         fmt::format("an earlier call of this group failed{}; form the group anew",
                                     said && !said->text.empty() ? ": " + said->text : ""));
  }

  /// Whether the stream of the call under way is being captured. A card answers slowly, so what the
  /// call's beginning has found is not asked again.
  [[nodiscard]] bool is_captured(cudaStream_t stream) const {
    return (capture ? *capture : streams.capture_id(stream)) != 0;
  }

  /// Up to which total the own kernels take a collective for which there is room.
  [[nodiscard]] std::size_t own_limit(Collective collective) const noexcept {
    return options.own_max_bytes ? static_cast<std::size_t>(*options.own_max_bytes)
                                 : default_own_max_bytes(collective, size, whole_lines);
  }

  /// Whether the own kernels take a call.
  [[nodiscard, gnu::always_inline]] bool own(Collective collective, const ConstTensorView& in,
                                             const TensorView& out, ReduceOp op) const {
    return peers != nullptr && peers_take(collective, in, out, op);
  }
  /// The same where there are some.
  [[nodiscard]] bool peers_take(Collective collective, const ConstTensorView& in,
                                const TensorView& out, ReduceOp op) const {
    if (std::max(in.bytes(), out.bytes()) > own_limit(collective)) {
      return false;
    }
    switch (collective) {
      case Collective::all_gather:
        return peers->can_all_gather(in.bytes());
      case Collective::reduce_scatter:
        return peers->can_reduce_scatter(out.bytes(), in.dtype(), op);
      case Collective::all_reduce:
        return peers->can_all_reduce(in.bytes(), in.dtype(), op);
      case Collective::all_to_all:
      case Collective::broadcast:
      case Collective::all_reduce_rms_norm:
        return false;
    }
    return false;
  }

  /// Whether one launch of theirs takes an all-reduce and a norm.
  [[nodiscard]] bool own_norm(const cuda::NormShape& shape) const {
    return peers != nullptr &&
           static_cast<std::size_t>(shape.rows * shape.row_bytes()) <=
               own_limit(Collective::all_reduce) &&
           peers->can_all_reduce_rms_norm(shape);
  }

  ControlPlane& control;
  CudaStreamDriver& streams;
  int device;
  NcclTransportOptions options;
  int rank;
  int size;
  bool debug_checks = false;  ///< Places of buffers are compared before every call.
  int nccl_version = 0;
  bool whole_lines = false;
  SymmetricCapabilities capabilities;
  CauseFinder finder;                          ///< Knows the ranks' processes.
  int ranks_per_card = 1;                      ///< At most, as far as is known.
  TraceRings trace_rings;                      ///< Of the ranks of this machine.
  CallPath path = CallPath::unknown;           ///< Of the call under way, where it is NCCL's.
  std::int64_t form = 0;                       ///< Of that: see `Transport::agree_also`.
  std::optional<CaptureId> capture = {};       ///< Of its stream, where that has been asked.
  std::shared_ptr<Communicator> communicator;  ///< Null in a group of one.
  UniqueMemory barrier_word;
  std::vector<Workspace> workspaces;  ///< By lane.
  std::size_t lane = 0;
  std::atomic<cudaStream_t> last_stream{nullptr};  ///< Of the last call or launch, where `used`.
  std::atomic<bool> used{false};                   ///< Whether there was one.
  std::atomic<bool> ended{false};                  ///< See `own_found_failure`.
  std::unique_ptr<CudaPeerKernels> peers;  ///< Null where the ranks do not map each other's memory.

 private:
  void agree_on_options() {
    std::uint64_t history = kHashSeed;
    for (const std::int64_t word :
         {options.own_max_bytes.value_or(-1), std::int64_t{options.peer_mapping},
          std::int64_t{options.visibility_guard}}) {
      history = mix(history, static_cast<std::uint64_t>(word));
    }
    std::exception_ptr wrong;
    try {
      check_options(options);
    } catch (const ConfigError&) {
      wrong = std::current_exception();
    }
    agree(control,
          {.place = fmt::format("connection of group {} over NCCL", control.name()),
           .history = history},
          wrong);
  }

  /// What a call's launch may take of the cards.
  struct Budget {
    int blocks = 0;
    cuda::ClusterRoom clusters;
  };

  /// Collective. What all ranks' cards can afford.
  [[nodiscard]] Budget agree_on_budget(const GroupProbe& probe) const {
    const cuda::BlockDemand demand{.multiprocessors = probe.multiprocessors,
                                   .ranks_per_card = ranks_per_card,
                                   .kernels_at_once = options.kernels_at_once};
    cuda::ClusterRoom room;
    {
      const DeviceGuard guard(device);
      const RelaxedCapture relaxed;
      room = cuda::norm_cluster_room(size);
    }
    Budget budget{cuda::block_budget(demand), cuda::cluster_budget(room, demand)};
    for (const Budget& theirs : gather_values(control, budget)) {
      budget.blocks = std::min(budget.blocks, theirs.blocks);
      budget.clusters = cuda::least(budget.clusters, theirs.clusters);
    }
    return budget;
  }

  void connect_peers(const GroupProbe& probe) {
    const Budget budget = agree_on_budget(probe);
    auto outcome = CudaPeerKernels::create(control, device,
                                           {.max_blocks = budget.blocks,
                                            .max_clusters = budget.clusters,
                                            .whole_lines = probe.whole_lines,
                                            .limit = options.kernel_limit});
    peers = std::move(outcome.kernels);
    capabilities.peer_import = peers != nullptr;
    capabilities.obstacle = std::move(outcome.refusal);
    if (peers && rank == 0 && capabilities.nvlink_reach && !probe.whole_lines) {
      warn_without_lines();
    }
  }

  /// Once a process: groups of the same cards have the same reason.
  void warn_without_lines() const {
    static std::atomic<bool> told = false;
    if (!told.exchange(true)) {
      log(LogLevel::warning,
          "group {}: NVLink joins the cards, but flag lines are not known to arrive "
          "whole between these (NCCL's rule for LL128): larger merges take the plan "
          "packed, and larger collectives NCCL",
          control.name());
    }
  }
};

/// What every call begins with: the device made current, and the communicator kept. The caller's
/// device may be another, and may change between calls; a time-out of another group, on its thread,
/// ends this one's communicator as well.
struct NcclCall {
  [[gnu::always_inline]] NcclCall(NcclGroup& group, StreamRef reference)
      : guard(group.device), use(use_of(group)), stream(native(reference)) {
    group.enter(stream, group.communicator == nullptr || use);
  }

  DeviceGuard guard;
  UsedUntilEnded::Use use;
  cudaStream_t stream;

 private:
  static UsedUntilEnded::Use use_of(const NcclGroup& group) noexcept {
    return group.communicator != nullptr ? group.communicator->use() : UsedUntilEnded::Use();
  }
};

}  // namespace cohort::detail
