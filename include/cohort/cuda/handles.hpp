// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <utility>

#include "cohort/cuda/cuda_check.hpp"
#include "cohort/cuda/quick_questions.hpp"

/// \file
/// Owners of CUDA's handles: each frees on destruction, reports what could not be freed, and can
/// be moved.

namespace cohort {

/// Makes a device current for a block and restores the caller's.
class DeviceGuard {
 public:
  /// Throws `TransportError`.
  explicit DeviceGuard(int device) {
    if (!detail::is_current_quickly(device)) [[unlikely]] {
      change(device);
    }
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (changed_) [[unlikely]] {
      change_back();
    }
  }

 private:
  [[gnu::cold, gnu::noinline]] void change(int device) {
    cuda_check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) {
      cuda_check(cudaSetDevice(device), "cudaSetDevice");
      changed_ = true;
    }
  }
  [[gnu::cold, gnu::noinline]] void change_back() const noexcept {
    cuda_report(cudaSetDevice(before_), "cudaSetDevice");
  }

  int before_ = 0;
  bool changed_ = false;
};

/// Lets this thread make calls that a capture of its own would forbid, such as cudaMalloc. The
/// calls themselves are not captured.
class RelaxedCapture {
 public:
  RelaxedCapture() {
    cuda_check(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode");
  }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;
  ~RelaxedCapture() {
    cuda_report(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode");
  }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

namespace detail {

/// A handle with its destroying function. `call` names the function in messages.
template <class Handle, auto destroy, const auto& call>
class UniqueCuda {
 public:
  UniqueCuda() = default;
  explicit UniqueCuda(Handle handle) noexcept : handle_(handle) {}
  UniqueCuda(UniqueCuda&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  UniqueCuda& operator=(UniqueCuda&& other) noexcept {
    if (this != &other) {
      reset();
      handle_ = std::exchange(other.handle_, nullptr);
    }
    return *this;
  }
  UniqueCuda(const UniqueCuda&) = delete;
  UniqueCuda& operator=(const UniqueCuda&) = delete;
  ~UniqueCuda() { reset(); }

  void reset() noexcept {
    if (handle_ != nullptr) {
      cuda_report(destroy(std::exchange(handle_, nullptr)), call);
    }
  }
  [[nodiscard]] Handle get() const noexcept { return handle_; }
  [[nodiscard]] Handle release() noexcept { return std::exchange(handle_, nullptr); }
  [[nodiscard]] explicit operator bool() const noexcept { return handle_ != nullptr; }

 private:
  Handle handle_ = nullptr;
};

inline constexpr char kStreamDestroy[] = "cudaStreamDestroy";
inline constexpr char kEventDestroy[] = "cudaEventDestroy";
inline constexpr char kGraphDestroy[] = "cudaGraphDestroy";
inline constexpr char kGraphExecDestroy[] = "cudaGraphExecDestroy";
inline constexpr char kFree[] = "cudaFree";
inline constexpr char kFreeHost[] = "cudaFreeHost";
inline constexpr char kMemPoolDestroy[] = "cudaMemPoolDestroy";

}  // namespace detail

/// A stream that is destroyed with its owner.
using UniqueStream = detail::UniqueCuda<cudaStream_t, &cudaStreamDestroy, detail::kStreamDestroy>;
/// An event, likewise.
using UniqueEvent = detail::UniqueCuda<cudaEvent_t, &cudaEventDestroy, detail::kEventDestroy>;
/// A graph, likewise.
using UniqueGraph = detail::UniqueCuda<cudaGraph_t, &cudaGraphDestroy, detail::kGraphDestroy>;
/// An instantiated graph, likewise.
using UniqueGraphExec =
    detail::UniqueCuda<cudaGraphExec_t, &cudaGraphExecDestroy, detail::kGraphExecDestroy>;
/// Memory of cudaMalloc.
using UniqueMemory = detail::UniqueCuda<void*, &cudaFree, detail::kFree>;
/// Memory of cudaHostAlloc.
using UniqueHostMemory = detail::UniqueCuda<void*, &cudaFreeHost, detail::kFreeHost>;
/// A memory pool, likewise.
using UniqueMemPool =
    detail::UniqueCuda<cudaMemPool_t, &cudaMemPoolDestroy, detail::kMemPoolDestroy>;

/// A stream that does not wait for the legacy default stream. Throws `TransportError`.
[[nodiscard]] inline UniqueStream make_stream(int device) {
  const DeviceGuard guard(device);
  cudaStream_t stream = nullptr;
  cuda_check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking),
             "cudaStreamCreateWithFlags");
  return UniqueStream(stream);
}

/// An event without timing. Throws `TransportError`.
[[nodiscard]] inline UniqueEvent make_event(int device) {
  const DeviceGuard guard(device);
  cudaEvent_t event = nullptr;
  cuda_check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  return UniqueEvent(event);
}

/// Zeroed memory, also within a capture of this thread, which it does not join. Returns when the
/// zeros are there. Throws `TransportError`.
[[nodiscard]] inline UniqueMemory make_memory(int device, std::size_t bytes) {
  const DeviceGuard guard(device);
  const RelaxedCapture relaxed;
  void* data = nullptr;
  cuda_check(cudaMalloc(&data, bytes), "cudaMalloc");
  UniqueMemory memory(data);
  const UniqueStream stream = make_stream(device);
  cuda_check(cudaMemsetAsync(data, 0, bytes, stream.get()), "cudaMemsetAsync");
  cuda_check(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
  return memory;
}

}  // namespace cohort
