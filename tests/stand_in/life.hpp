// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <barrier>
#include <chrono>
#include <cohort/cohort.hpp>
#include <cohort/cuda.hpp>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "support/threads.hpp"

/// \file
/// The life of an engine's state on devices that are stood in for: formed, used eagerly and in a
/// graph, shut down.

namespace cohort::test::stand_in {

/// What a rank does, in this order.
enum class Stage {
  prepare,      ///< The backend and the engine's streams; where a rank fails, none goes on.
  create,       ///< Groups are formed.
  reserve,      ///< A decode step's workspace.
  collectives,  ///< Eager calls in symmetric memory; the arenas grow.
  messages,     ///< Eager calls in other memory, strided, large and between pairs.
  synchronize,  ///< Both streams.
  merge,        ///< Two calls of the decode step.
  capture,      ///< Calls of two groups.
  launch,       ///< The graph, twice, and a call behind it.
  wait,         ///< For both streams.
  grow,         ///< A segment for an arena.
  shutdown,     ///< Of the graph and the groups.
};

/// The stages in which a rank that is refused something tells the others what it was. Not `wait`:
/// the groups are asked one after another, only the one that was asked is told, and nothing keeps
/// the other rank from going on to another group.
[[nodiscard]] inline bool tells(Stage stage) noexcept {
  return stage == Stage::messages || stage == Stage::synchronize || stage == Stage::launch;
}

/// How a rank's life ended.
struct End {
  Stage stage = Stage::prepare;  ///< The last that was begun.
  bool threw = false;
  bool typed = false;  ///< What it threw is an `Error`.
  std::string text = {};
};

struct LifeOptions {
  int ranks = 2;
  bool peer_mapping = true;
  std::chrono::milliseconds control_limit{3'000};
  std::chrono::milliseconds wait_limit{2'000};
  /// Called as a stage begins; what it throws is the engine's own error.
  std::function<void(int rank, Stage stage)> before = {};
};

/// One rank of the engine.
class Rank {
 public:
  Rank(const LifeOptions& options, ControlPlane& plane, End& end)
      : options_(options), plane_(plane), end_(end) {}

  /// False where it threw.
  bool prepare() {
    return guarded([&] {
      enter(Stage::prepare);
      if (cudaSetDevice(plane_.rank()) != cudaSuccess) {
        throw TransportError({.call = "cudaSetDevice"}, "the engine's device");
      }
      backend_ = cuda_backend({.device = plane_.rank(),
                               .environment = {.leave_alone = true},
                               .peer_mapping = options_.peer_mapping});
      first_ = make_stream();
      second_ = make_stream();
    });
  }

  void live() {
    guarded([&] { all_stages(); });
  }

 private:
  using Stream = std::shared_ptr<std::remove_pointer_t<cudaStream_t>>;

  void enter(Stage stage) {
    end_.stage = stage;
    if (options_.before) {
      options_.before(plane_.rank(), stage);
    }
  }

  template <class Body>
  bool guarded(Body body) {
    try {
      body();
      return true;
    } catch (const Error& error) {
      end_ = {end_.stage, true, true, error.what()};
    } catch (const std::exception& error) {
      end_ = {end_.stage, true, false, error.what()};
    }
    return false;
  }

  [[nodiscard]] Stream make_stream() const {
    const int device = plane_.rank();
    const DeviceGuard guard(device);
    cudaStream_t stream = nullptr;
    if (cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) != cudaSuccess) {
      throw TransportError({.call = "cudaStreamCreateWithFlags"}, "the engine's stream");
    }
    return {stream, [device](cudaStream_t owned) {
              const DeviceGuard current(device);
              cudaStreamDestroy(owned);
            }};
  }

  void all_stages() {
    const StreamRef first = backend_->stream(first_.get());
    const StreamRef second = backend_->stream(second_.get());
    enter(Stage::create);
    ParallelState state = ParallelState::create(
        plane_, {.layout = {.tp = options_.ranks, .pp = 1, .dcp = options_.ranks},
                 .backend = backend_,
                 .symmetric = {.enabled = true, .selection = Selection::all()}});
    enter(Stage::reserve);
    state.dcp().reserve_for({.batch = kBatch, .heads = heads(), .value = kValue});
    collectives(state.tp(), first, second);
    messages(state.tp(), first);
    enter(Stage::synchronize);
    state.tp().synchronize(first, options_.wait_limit);
    state.tp().synchronize(second, options_.wait_limit);
    decode(state, first, second);
    enter(Stage::grow);
    state.tp().reserve(kGrown);
    enter(Stage::shutdown);
    state.tp().shutdown();
    state.shutdown();
  }

  void collectives(TensorParallelGroup& tp, StreamRef first, StreamRef second) {
    enter(Stage::collectives);
    const SymmetricScope scope(tp, first);
    Tensor x = empty({kSide, kSide}, DType::f32);
    Tensor y = empty({kSide, kSide}, DType::f32);
    tp.all_reduce(x, first);
    tp.all_reduce_into(y, x, first, ReduceOp::max);
    const Tensor columns = tp.all_gather(x, -1, first);
    const Tensor rows = tp.all_gather(x, 0, second);
    const Tensor part = tp.reduce_scatter_along_dim(x, 0, first);
    tp.broadcast(x, 0, first);
  }

  void messages(TensorParallelGroup& tp, StreamRef stream) {
    const SymmetricScope plain(ScopeTarget{nullptr, backend_.get()}, stream);
    const int rank = plane_.rank();
    Tensor x = empty({kSide, kSide}, DType::f32);
    Tensor large = empty({kLarge}, DType::f32);
    Tensor to_all = empty({options_.ranks * kSide}, DType::f32);
    Tensor from_all = empty({options_.ranks * kSide}, DType::f32);
    std::vector<std::int64_t> sizes;
    for (int i = 0; i < options_.ranks; ++i) {
      sizes.push_back(i + 1);
    }
    const Tensor uneven = empty({rank + 1, kSide}, DType::f32);
    enter(Stage::messages);
    tp.all_reduce(x.view().transpose(0, 1), stream);
    tp.broadcast(x.view().slice(1, 0, kSide / 2), 1, stream);
    tp.all_to_all_into(from_all, to_all, stream);
    tp.all_reduce(large, stream);
    if (rank == 0) {
      tp.send(x, 1, stream);
    } else if (rank == 1) {
      tp.recv(x, 0, stream);
    }
    tp.barrier(stream);
    const Tensor gathered = tp.all_gatherv(uneven, sizes, 0, stream);
  }

  void decode(ParallelState& state, StreamRef first, StreamRef second) {
    DecodeContextParallelGroup& dcp = state.dcp();
    enter(Stage::merge);
    const SymmetricScope scope(dcp, first);
    Tensor out = empty({kBatch, heads(), kValue}, DType::bf16);
    Tensor lse = empty({kBatch, heads()}, DType::f32);
    Tensor x = empty({kSide, kSide}, DType::f32);
    const Tensor query = empty({kBatch, heads() / options_.ranks, kValue}, DType::bf16);
    const Tensor merged = dcp.merge_attention(out, lse, LseBase::e, first);
    const Tensor gathered = dcp.gather_query(query, query, first);
    enter(Stage::capture);
    CapturedGraph graph = state.capture(first, [&] {
      state.tp().all_reduce(x, first);
      const Tensor again = dcp.merge_attention(out, lse, LseBase::e, first);
      const Tensor wide = state.tp().all_gather(x, 0, first);
    });
    enter(Stage::launch);
    graph.launch(first);
    graph.launch(second);
    state.tp().all_reduce(lse, first);
    enter(Stage::wait);
    state.synchronize(first, options_.wait_limit);
    state.synchronize(second, options_.wait_limit);
  }

  static constexpr int kBatch = 4;
  static constexpr int kValue = 64;
  static constexpr std::int64_t kSide = 96;
  static constexpr std::int64_t kLarge = std::int64_t{1} << 20;
  static constexpr std::size_t kGrown = std::size_t{8} << 20;

  [[nodiscard]] int heads() const noexcept { return 4 * options_.ranks; }

  const LifeOptions& options_;
  ControlPlane& plane_;
  End& end_;
  std::shared_ptr<CudaBackend> backend_;
  Stream first_;
  Stream second_;
};

/// All ranks' lives, each on a thread of its own; how they ended, by rank.
[[nodiscard]] inline std::vector<End> live(const LifeOptions& options = {}) {
  std::vector<End> ends(static_cast<std::size_t>(options.ranks));
  std::barrier<> prepared(options.ranks);
  std::atomic<bool> all_prepared{true};
  run_ranks(
      options.ranks,
      [&](ControlPlane& plane) {
        Rank rank(options, plane, ends[static_cast<std::size_t>(plane.rank())]);
        if (!rank.prepare()) {
          all_prepared = false;
        }
        prepared.arrive_and_wait();
        if (all_prepared) {
          rank.live();
        }
      },
      options.control_limit);
  return ends;
}

}  // namespace cohort::test::stand_in
