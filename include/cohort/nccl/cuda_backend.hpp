// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

#include "cohort/cuda/cuda_memory.hpp"
#include "cohort/cuda/cuda_ops.hpp"
#include "cohort/cuda/cuda_stream.hpp"
#include "cohort/cuda/handles.hpp"
#include "cohort/runtime_env.hpp"
#include "cohort/transport.hpp"

/// \file
/// The backend for NVIDIA cards: one device, its streams and memory, and transports over NCCL. What
/// needs NCCL's header is compiled in the library, so that an engine's sources need none.

namespace cohort {

/// How cards are used; each option has a default that fits most engines.
struct CudaOptions {
  /// Ordinal of the device. By default the process's local rank picks it, round robin.
  std::optional<int> device = {};
  /// Variables that CUDA and NCCL read. `cuda_backend` sets what is unset before it starts CUDA; a
  /// value that is already set wins.
  RuntimeEnvOptions environment = {};
  /// `false` keeps the library from mapping peers' memory: no inboxes, no peer kernels. Equal on
  /// all ranks.
  bool peer_mapping = true;
  /// Time limit of a wait in one of the library's kernels: 1 ms to `kLongestTimeLimit`.
  std::chrono::milliseconds kernel_limit{60'000};
  /// Own kernels of all groups that this rank may have under way at once, on as many streams; calls
  /// of NCCL count as well. Decides how many multiprocessors one kernel may hold, because kernels
  /// that wait for peers must not keep each other off a card: see cuda/block_budget.hpp. Of a
  /// group's ranks the one that can afford least decides.
  int kernels_at_once = 2;
  /// Total bytes up to which the library's kernels take small collectives; 0 turns them off. Equal
  /// on all ranks. COHORT_OWN_MAX_BYTES replaces it; without both, `default_own_max_bytes` holds.
  std::optional<std::int64_t> own_max_bytes = {};
  /// For the guard's own test; see nccl/visibility_guard.hpp.
  bool visibility_guard = true;
};

/// One device. Restores the caller's current device after every call.
class CudaBackend final : public Backend {
 public:
  /// Throws `ConfigError` for an option that cannot be, and where the device does not exist or the
  /// library has no code for it,
  /// `TransportError`.
  explicit CudaBackend(const CudaOptions& options)
      : options_(options),
        device_(start(options)),
        streams_(device_),
        ops_(device_),
        memory_(std::make_shared<CudaMemory>(device_)) {
    if (runtime_settings().own_max_bytes) {
      options_.own_max_bytes = runtime_settings().own_max_bytes;
    }
  }

  /// Cards.
  [[nodiscard]] BackendKind kind() const noexcept override { return BackendKind::cuda; }
  /// This rank's card.
  [[nodiscard]] Device device() const noexcept override { return {DeviceKind::cuda, device_}; }
  /// CUDA streams of that card.
  [[nodiscard]] CudaStreamDriver& streams() noexcept override { return streams_; }
  /// Local work on the card.
  [[nodiscard]] TensorOps& ops() noexcept override { return ops_; }

  /// A reference to the engine's stream, which must be one of this device.
  [[nodiscard]] StreamRef stream(cudaStream_t stream) noexcept { return streams_.ref(stream); }

  [[nodiscard]] std::unique_ptr<Segment> allocate_segment(std::size_t bytes) override;
  /// 2 MiB: what the driver maps at once on all cards that have virtual memory functions.
  [[nodiscard]] std::size_t segment_granularity() const noexcept override {
    return std::size_t{2} << 20;
  }
  [[nodiscard]] Tensor allocate(const Dims& shape, DType dtype, StreamRef stream) override {
    // No stream means the legacy default stream, as in CUDA itself.
    return memory_->allocate(shape, dtype, stream.valid() ? stream : streams_.ref(nullptr));
  }

  [[nodiscard]] std::unique_ptr<Transport> connect(ControlPlane& group) override;

 private:
  /// Sets the environment, then starts CUDA on the device.
  [[nodiscard]] static int start(const CudaOptions& options);

  CudaOptions options_;
  int device_;
  CudaStreamDriver streams_;
  CudaOps ops_;
  std::shared_ptr<CudaMemory> memory_;
  int ranks_per_card_ = 1;
};

/// The backend for the device that the options, or the process's local rank, pick. Call it before
/// anything else starts CUDA or NCCL. Throws `ConfigError` and `TransportError`.
[[nodiscard]] inline std::shared_ptr<CudaBackend> cuda_backend(const CudaOptions& options = {}) {
  return std::make_shared<CudaBackend>(options);
}

}  // namespace cohort
