// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <cstddef>
#include <utility>

#include "cohort/cuda/descriptor_exchange.hpp"
#include "cohort/cuda/driver.hpp"
#include "cohort/cuda/handles.hpp"

/// \file
/// Device memory that other processes can map: an allocation handle of the driver's virtual memory
/// functions, its mapping here, and its export as a file descriptor.

namespace cohort {

/// An allocation handle mapped into this process for one device. Move-only.
///
/// Teardown is local: the memory itself lives until every process that mapped it lets go.
class DeviceMapping {
 public:
  DeviceMapping() = default;
  DeviceMapping(DeviceMapping&& other) noexcept
      : handle_(std::exchange(other.handle_, 0)),
        address_(std::exchange(other.address_, 0)),
        mapped_(std::exchange(other.mapped_, false)),
        bytes_(other.bytes_),
        device_(other.device_) {}
  DeviceMapping& operator=(DeviceMapping&& other) noexcept {
    if (this != &other) {
      reset();
      handle_ = std::exchange(other.handle_, 0);
      address_ = std::exchange(other.address_, 0);
      mapped_ = std::exchange(other.mapped_, false);
      bytes_ = other.bytes_;
      device_ = other.device_;
    }
    return *this;
  }
  DeviceMapping(const DeviceMapping&) = delete;
  DeviceMapping& operator=(const DeviceMapping&) = delete;
  ~DeviceMapping() { reset(); }

  /// New memory on `device`, exportable, its contents undefined. `bytes` is rounded up to the
  /// driver's granularity. Throws `TransportError`.
  [[nodiscard]] static DeviceMapping allocate(int device, std::size_t bytes) {
    const auto& api = detail::driver();
    const DeviceGuard guard(device);
    cuda_check(cudaFree(nullptr), "cudaFree");  // the driver's functions need the context
    const CUmemAllocationProp properties = exportable(device);
    std::size_t step = 0;
    detail::driver_check(api.granularity(&step, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
                         "cuMemGetAllocationGranularity");
    const std::size_t rounded = (bytes + step - 1) / step * step;
    CUmemGenericAllocationHandle handle = 0;
    detail::driver_check(api.create(&handle, rounded, &properties, 0), "cuMemCreate");
    return DeviceMapping(handle, device, rounded);
  }

  /// Memory of another process, for use by `device`. The descriptor stays the caller's. Throws
  /// `TransportError`.
  [[nodiscard]] static DeviceMapping import(int device, std::size_t bytes, int descriptor) {
    const DeviceGuard guard(device);
    cuda_check(cudaFree(nullptr), "cudaFree");
    CUmemGenericAllocationHandle handle = 0;
    // The driver's interface takes the descriptor's value in the place of a pointer.
    void* const value = reinterpret_cast<void*>(static_cast<std::intptr_t>(descriptor));
    detail::driver_check(
        detail::driver().import_handle(&handle, value, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
        "cuMemImportFromShareableHandle");
    return DeviceMapping(handle, device, bytes);
  }

  /// A file descriptor of the allocation behind any pointer, also one of ncclMemAlloc. Throws
  /// `TransportError` where the memory is none that can be exported, as with cudaMalloc.
  [[nodiscard]] static UniqueFd export_descriptor(void* data) {
    const auto& api = detail::driver();
    CUmemGenericAllocationHandle handle = 0;
    detail::driver_check(api.retain_handle(&handle, data), "cuMemRetainAllocationHandle");
    int descriptor = -1;
    const CUresult code =
        api.export_handle(&descriptor, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    detail::driver_report(api.release(handle), "cuMemRelease");
    detail::driver_check(code, "cuMemExportToShareableHandle");
    return os::keep(descriptor);
  }

  /// Leaves the memory mapped for good: for kernels that never end.
  void abandon() noexcept {
    handle_ = 0;
    address_ = 0;
    mapped_ = false;
  }

  [[nodiscard]] void* data() const noexcept {
    return reinterpret_cast<void*>(static_cast<std::uintptr_t>(address_));
  }
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }
  [[nodiscard]] int device() const noexcept { return device_; }

 private:
  /// Takes the handle over, also where mapping it fails.
  DeviceMapping(CUmemGenericAllocationHandle handle, int device, std::size_t bytes)
      : handle_(handle), bytes_(bytes), device_(device) {
    try {
      map();
    } catch (...) {
      reset();
      throw;
    }
  }

  static CUmemAllocationProp exportable(int device) {
    CUmemAllocationProp properties{};
    properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    properties.location.id = device;
    properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    return properties;
  }

  void map() {
    const auto& api = detail::driver();
    detail::driver_check(api.reserve(&address_, bytes_, 0, 0, 0), "cuMemAddressReserve");
    detail::driver_check(api.map(address_, bytes_, 0, handle_, 0), "cuMemMap");
    mapped_ = true;
    CUmemAccessDesc access{};
    access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    access.location.id = device_;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    detail::driver_check(api.set_access(address_, bytes_, &access, 1), "cuMemSetAccess");
  }

  void reset() noexcept {
    if (handle_ == 0 && address_ == 0) {
      return;
    }
    const auto& api = detail::driver();
    if (std::exchange(mapped_, false)) {
      detail::driver_report(api.unmap(address_, bytes_), "cuMemUnmap");
    }
    if (const auto address = std::exchange(address_, 0); address != 0) {
      detail::driver_report(api.free(address, bytes_), "cuMemAddressFree");
    }
    if (const auto handle = std::exchange(handle_, 0); handle != 0) {
      detail::driver_report(api.release(handle), "cuMemRelease");
    }
  }

  CUmemGenericAllocationHandle handle_ = 0;
  CUdeviceptr address_ = 0;
  bool mapped_ = false;
  std::size_t bytes_ = 0;
  int device_ = 0;
};

}  // namespace cohort
