// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <string>

#include "cohort/error.hpp"
#include "cohort/log.hpp"

/// \file
/// CUDA's return codes as `TransportError`, and as log lines where nothing may be thrown.

namespace cohort {

/// "cudaErrorInvalidValue: invalid argument".
[[nodiscard]] inline std::string cuda_error_text(cudaError_t code) {
  return fmt::format("{}: {}", cudaGetErrorName(code), cudaGetErrorString(code));
}

/// Throws `TransportError` naming `call` unless `code` is success. Takes the error out of the
/// runtime's own record, so that a later, unrelated check does not find it.
inline void cuda_check(cudaError_t code, const char* call) {
  if (code != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    throw TransportError({.call = call, .native_code = static_cast<long>(code)},
                         cuda_error_text(code));
  }
}

/// As `cuda_check`, for destructors: a message instead of an exception. At process exit the driver
/// may be gone before static objects; that is not worth a line.
inline void cuda_report(cudaError_t code, const char* call) noexcept {
  if (code == cudaSuccess || code == cudaErrorCudartUnloading) {
    return;
  }
  static_cast<void>(cudaGetLastError());
  try {
    log(LogLevel::error, fmt::format("{} failed: {}", call, cuda_error_text(code)));
  } catch (...) {
    log(LogLevel::error, call);
  }
}

}  // namespace cohort
