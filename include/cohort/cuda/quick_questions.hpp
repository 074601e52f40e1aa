// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <optional>

#include "cohort/cuda/driver.hpp"
#include "cohort/error.hpp"

/// \file
/// What every call asks of CUDA, asked of the driver: the runtime takes two to three times as long
/// for the same answer (36 and 58 ns, and 13 and 22 by the driver, on the host of two H200s). Where
/// the driver has none, as in a thread that no device is current in yet, the runtime is to be
/// asked, which makes things ready or says what is wrong.

namespace cohort::detail {

/// The driver's functions of those names. Whoever stands in a function's place at first looks it
/// up, once in each module, so that a question is a load and a call.
struct QuickQuestions {
  using CurrentDevice = decltype(&::cuCtxGetDevice);
  using IsCapturing = decltype(&::cuStreamIsCapturing);

  [[gnu::cold]] static CUresult first_current_device(CUdevice* device) noexcept;
  [[gnu::cold]] static CUresult first_is_capturing(CUstream stream,
                                                   CUstreamCaptureStatus* status) noexcept;

  inline static constinit std::atomic<CurrentDevice> current_device{&first_current_device};
  inline static constinit std::atomic<IsCapturing> is_capturing{&first_is_capturing};

 private:
  /// `none`, which knows no answer, stays where the driver has no such function.
  template <class Function>
  [[nodiscard]] static Function look_up(const char* name, std::atomic<Function>& place,
                                        Function none) noexcept {
    Function found = none;
    try {
      load_driver_function(name, found);
    } catch (...) {
      found = none;
    }
    place.store(found, std::memory_order_relaxed);
    return found;
  }
};

inline CUresult QuickQuestions::first_current_device(CUdevice* device) noexcept {
  const CurrentDevice none = [](CUdevice*) -> CUresult { return CUDA_ERROR_NOT_FOUND; };
  return look_up("cuCtxGetDevice", current_device, none)(device);
}
inline CUresult QuickQuestions::first_is_capturing(CUstream stream,
                                                   CUstreamCaptureStatus* status) noexcept {
  const IsCapturing none = [](CUstream, CUstreamCaptureStatus*) -> CUresult {
    return CUDA_ERROR_NOT_FOUND;
  };
  return look_up("cuStreamIsCapturing", is_capturing, none)(stream, status);
}

/// The current device, or nothing where that is not known so quickly. The driver's devices are the
/// runtime's numbers.
[[nodiscard]] inline std::optional<int> current_device_quickly() noexcept {
  CUdevice device = 0;
  return QuickQuestions::current_device.load(std::memory_order_relaxed)(&device) == CUDA_SUCCESS
             ? std::optional<int>(device)
             : std::nullopt;
}

/// Whether a device is known to be the current one; false also where that is not known so quickly.
[[nodiscard]] inline bool is_current_quickly(int device) noexcept {
  CUdevice current = 0;
  return QuickQuestions::current_device.load(std::memory_order_relaxed)(&current) == CUDA_SUCCESS &&
         current == device;
}

/// Whether a stream that was created is known not to be captured, likewise.
[[nodiscard]] inline bool is_eager_quickly(cudaStream_t stream) noexcept {
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  return QuickQuestions::is_capturing.load(std::memory_order_relaxed)(stream, &status) ==
             CUDA_SUCCESS &&
         status == CU_STREAM_CAPTURE_STATUS_NONE;
}

}  // namespace cohort::detail
