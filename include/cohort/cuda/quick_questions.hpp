// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <optional>

#include "cohort/cuda/driver.hpp"
#include "cohort/error.hpp"

/// \file
/// What every call asks of CUDA, asked of the driver: the runtime takes two to three times as long
/// for the same answer (36 and 58 ns, and 13 and 22 by the driver, on the host of two H200s). Where
/// the driver has none, as in a thread that no device is current in yet, the runtime is to be
/// asked, which makes things ready or says what is wrong.

namespace cohort::detail {

/// The driver's functions of those names, or null.
struct QuickQuestions {
  decltype(&::cuCtxGetDevice) current_device = nullptr;
  decltype(&::cuStreamIsCapturing) is_capturing = nullptr;

  /// Looked up once in each module.
  [[nodiscard]] static const QuickQuestions& get() noexcept {
    static const QuickQuestions questions = look_up();
    return questions;
  }

 private:
  [[nodiscard]] static QuickQuestions look_up() noexcept {
    QuickQuestions found;
    try {
      load_driver_function("cuCtxGetDevice", found.current_device);
      load_driver_function("cuStreamIsCapturing", found.is_capturing);
    } catch (...) {
      return {};
    }
    return found;
  }
};

/// The current device, or nothing where that is not known so quickly. The driver's devices are the
/// runtime's numbers.
[[nodiscard]] inline std::optional<int> current_device_quickly() noexcept {
  const auto ask = QuickQuestions::get().current_device;
  CUdevice device = 0;
  if (ask != nullptr && ask(&device) == CUDA_SUCCESS) [[likely]] {
    return device;
  }
  return std::nullopt;
}

/// Whether a stream that was created is being captured, likewise.
[[nodiscard]] inline std::optional<cudaStreamCaptureStatus> capture_status_quickly(
    cudaStream_t stream) noexcept {
  static_assert(
      static_cast<int>(CU_STREAM_CAPTURE_STATUS_NONE) == cudaStreamCaptureStatusNone &&
      static_cast<int>(CU_STREAM_CAPTURE_STATUS_ACTIVE) == cudaStreamCaptureStatusActive &&
      static_cast<int>(CU_STREAM_CAPTURE_STATUS_INVALIDATED) == cudaStreamCaptureStatusInvalidated);
  const auto ask = QuickQuestions::get().is_capturing;
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  if (ask != nullptr && ask(stream, &status) == CUDA_SUCCESS) [[likely]] {
    return static_cast<cudaStreamCaptureStatus>(status);
  }
  return std::nullopt;
}

}  // namespace cohort::detail
