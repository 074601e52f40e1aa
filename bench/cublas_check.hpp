// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cublas_v2.h>

#include "cohort/error.hpp"

namespace cohort::bench {

/// Throws `TransportError` with cuBLAS's code unless a call has succeeded.
inline void cublas_check(cublasStatus_t code, const char* call) {
  if (code != CUBLAS_STATUS_SUCCESS) {
    throw TransportError({.call = call, .native_code = static_cast<long>(code)},
                         cublasGetStatusString(code));
  }
}

}  // namespace cohort::bench
