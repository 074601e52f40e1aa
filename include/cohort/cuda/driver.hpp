// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <string>

#include "cohort/error.hpp"
#include "cohort/log.hpp"

/// \file
/// The driver's functions for virtual memory. They are looked up at run time, so that programs
/// link without libcuda and start on machines that have no driver.

namespace cohort::detail {

/// Each member is the driver's function of that name.
struct DriverApi {
  decltype(&::cuGetErrorName) get_error_name = nullptr;
  decltype(&::cuDeviceGet) device_get = nullptr;
  decltype(&::cuDeviceGetAttribute) device_get_attribute = nullptr;
  decltype(&::cuMemGetAllocationGranularity) granularity = nullptr;
  decltype(&::cuMemCreate) create = nullptr;
  decltype(&::cuMemRelease) release = nullptr;
  decltype(&::cuMemAddressReserve) reserve = nullptr;
  decltype(&::cuMemAddressFree) free = nullptr;
  decltype(&::cuMemMap) map = nullptr;
  decltype(&::cuMemUnmap) unmap = nullptr;
  decltype(&::cuMemSetAccess) set_access = nullptr;
  decltype(&::cuMemRetainAllocationHandle) retain_handle = nullptr;
  decltype(&::cuMemExportToShareableHandle) export_handle = nullptr;
  decltype(&::cuMemImportFromShareableHandle) import_handle = nullptr;
};

template <class Function>
void load_driver_function(const char* name, Function& function) {
  constexpr unsigned int kVersion = 12000;  // the oldest toolkit that the project builds with
  void* address = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  const cudaError_t code =
      cudaGetDriverEntryPointByVersion(name, &address, kVersion, cudaEnableDefault, &found);
#else
  static_cast<void>(kVersion);
  const cudaError_t code = cudaGetDriverEntryPoint(name, &address, cudaEnableDefault, &found);
#endif
  if (code != cudaSuccess || found != cudaDriverEntryPointSuccess || address == nullptr) {
    static_cast<void>(cudaGetLastError());
    throw TransportError({.call = "cudaGetDriverEntryPoint", .native_code = code},
                         std::string("the CUDA driver does not offer ") + name);
  }
  function = reinterpret_cast<Function>(address);
}

/// The driver's functions, looked up once. Throws `TransportError` where one is missing.
[[nodiscard]] inline const DriverApi& driver() {
  static const DriverApi api = [] {
    DriverApi found;
    load_driver_function("cuGetErrorName", found.get_error_name);
    load_driver_function("cuDeviceGet", found.device_get);
    load_driver_function("cuDeviceGetAttribute", found.device_get_attribute);
    load_driver_function("cuMemGetAllocationGranularity", found.granularity);
    load_driver_function("cuMemCreate", found.create);
    load_driver_function("cuMemRelease", found.release);
    load_driver_function("cuMemAddressReserve", found.reserve);
    load_driver_function("cuMemAddressFree", found.free);
    load_driver_function("cuMemMap", found.map);
    load_driver_function("cuMemUnmap", found.unmap);
    load_driver_function("cuMemSetAccess", found.set_access);
    load_driver_function("cuMemRetainAllocationHandle", found.retain_handle);
    load_driver_function("cuMemExportToShareableHandle", found.export_handle);
    load_driver_function("cuMemImportFromShareableHandle", found.import_handle);
    return found;
  }();
  return api;
}

[[nodiscard]] inline std::string driver_error_text(CUresult code) {
  const char* name = nullptr;
  return driver().get_error_name(code, &name) == CUDA_SUCCESS && name != nullptr
             ? std::string(name)
             : std::string("CUresult ").append(std::to_string(static_cast<int>(code)));
}

/// Throws `TransportError` naming `call` unless `code` is success.
inline void driver_check(CUresult code, const char* call) {
  if (code != CUDA_SUCCESS) {
    throw TransportError({.call = call, .native_code = static_cast<long>(code)},
                         driver_error_text(code));
  }
}

/// As `driver_check`, for destructors.
inline void driver_report(CUresult code, const char* call) noexcept {
  if (code == CUDA_SUCCESS || code == CUDA_ERROR_DEINITIALIZED) {
    return;
  }
  try {
    log(LogLevel::error, std::string(call) + " failed: " + driver_error_text(code));
  } catch (...) {
    log(LogLevel::error, call);
  }
}

}  // namespace cohort::detail
