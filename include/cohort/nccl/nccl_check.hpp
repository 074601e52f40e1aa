// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>
#include <nccl.h>

#include <atomic>
#include <string>

#include "cohort/dtype.hpp"
#include "cohort/error.hpp"
#include "cohort/log.hpp"
#include "cohort/symmetric_policy.hpp"
#include "cohort/transport.hpp"

/// \file
/// NCCL's return codes as `TransportError`, and the library's types and operations as NCCL's.

namespace cohort {

/// "unhandled cuda error (run with NCCL_DEBUG=INFO for details); last error: ...".
[[nodiscard]] inline std::string nccl_error_text(ncclResult_t code) {
  std::string text = ncclGetErrorString(code);
  if (const char* last = ncclGetLastError(nullptr); last != nullptr && *last != '\0') {
    text += std::string("; last error: ") + last;
  }
  return text;
}

/// Throws `TransportError` unless `code` is success.
inline void nccl_check(ncclResult_t code, const char* call, int rank = -1,
                       const std::string& group = {}) {
  if (code != ncclSuccess) {
    throw TransportError(
        {.call = call, .native_code = static_cast<long>(code), .rank = rank, .group = group},
        nccl_error_text(code));
  }
}

/// The version of the NCCL that was loaded. One warning a process where the headers' is another.
/// Throws `TransportError`.
[[nodiscard]] inline int nccl_runtime_version() {
  int version = 0;
  nccl_check(ncclGetVersion(&version), "ncclGetVersion");
  static std::atomic<bool> told = false;
  if (version != NCCL_VERSION_CODE && !told.exchange(true)) {
    log(LogLevel::warning, "built with NCCL {}, but {} was loaded; decisions follow the loaded one",
        nccl_version_string(NCCL_VERSION_CODE), nccl_version_string(version));
  }
  return version;
}

/// NCCL's type, for the types without arithmetic another one of their size. NCCL reduces 8-bit
/// floats on new cards only, and the library never does.
[[nodiscard]] constexpr ncclDataType_t nccl_type(DType dtype) noexcept {
  switch (dtype) {
    case DType::f64:
      return ncclFloat64;
    case DType::f32:
      return ncclFloat32;
    case DType::f16:
      return ncclFloat16;
    case DType::bf16:
      return ncclBfloat16;
    case DType::i8:
      return ncclInt8;
    case DType::i32:
      return ncclInt32;
    case DType::i64:
      return ncclInt64;
    case DType::u8:
    case DType::f8_e4m3:
    case DType::f8_e5m2:
    case DType::b8:
      return ncclUint8;
    case DType::i16:
    case DType::u16:
      return ncclFloat16;  // of whose elements copies keep the bits
  }
  return ncclUint8;
}

[[nodiscard]] constexpr ncclRedOp_t nccl_op(ReduceOp op) noexcept {
  switch (op) {
    case ReduceOp::sum:
      return ncclSum;
    case ReduceOp::prod:
      return ncclProd;
    case ReduceOp::min:
      return ncclMin;
    case ReduceOp::max:
      return ncclMax;
  }
  return ncclSum;
}

/// Whether NCCL has symmetric kernels for the call: copies of any type, and sums of the floating
/// types other than f64. For others it takes its ordinary path, windows or not.
[[nodiscard]] constexpr bool has_symmetric_kernel(Collective collective, DType dtype,
                                                  ReduceOp op) noexcept {
  const bool small_float = dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16;
  switch (collective) {
    case Collective::all_gather:
      return true;
    case Collective::reduce_scatter:
    case Collective::all_reduce:
      return op == ReduceOp::sum && small_float;
    case Collective::all_to_all:
    case Collective::broadcast:
    case Collective::all_reduce_rms_norm:
      return false;
  }
  return false;
}

}  // namespace cohort
