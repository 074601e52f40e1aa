// SPDX-License-Identifier: Apache-2.0
// The driver's entry points that the library asks the runtime for. An allocation is a file in
// memory, so that mappings of several ranks show the same bytes.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <unistd.h>

#include <string_view>

#include "stand_in/machine.hpp"

using namespace cohort::test::stand_in;

namespace {

struct Allocation {
  int file;
  int references;
};

constexpr std::size_t kGranularity = std::size_t{2} << 20;

/// By address.
std::map<CUdeviceptr, Allocation*>& mappings() {
  static std::map<CUdeviceptr, Allocation*> by_address;
  return by_address;
}

Allocation* of(CUmemGenericAllocationHandle handle) {
  return reinterpret_cast<Allocation*>(handle);
}

CUmemGenericAllocationHandle new_allocation(int file) {
  count("allocation", 1);
  return reinterpret_cast<CUmemGenericAllocationHandle>(new Allocation{file, 1});
}

void let_go(Allocation* allocation) {
  if (--allocation->references == 0) {
    ::close(allocation->file);
    delete allocation;
    count("allocation", -1);
  }
}

CUresult get_error_name(CUresult, const char** name) {
  *name = "CUDA_ERROR_OF_STAND_IN";
  return CUDA_SUCCESS;
}

CUresult get_device(CUdevice* device, int ordinal) {
  return call("cuDeviceGet", CUDA_ERROR_UNKNOWN, [&] { *device = ordinal; });
}

CUresult get_device_attribute(int* value, CUdevice_attribute, CUdevice) {
  return call("cuDeviceGetAttribute", CUDA_ERROR_UNKNOWN, [&] { *value = 1; });
}

CUresult get_context_device(CUdevice* device) {
  *device = current_device();
  return CUDA_SUCCESS;
}

CUresult get_granularity(std::size_t* bytes, const CUmemAllocationProp*,
                         CUmemAllocationGranularity_flags) {
  return call("cuMemGetAllocationGranularity", CUDA_ERROR_UNKNOWN, [&] { *bytes = kGranularity; });
}

CUresult create(CUmemGenericAllocationHandle* handle, std::size_t bytes, const CUmemAllocationProp*,
                unsigned long long) {
  return call("cuMemCreate", CUDA_ERROR_OUT_OF_MEMORY, [&] {
    const int file = ::memfd_create("allocation", 0);
    if (file < 0 || ::ftruncate(file, static_cast<off_t>(bytes)) != 0) {
      return CUDA_ERROR_OUT_OF_MEMORY;
    }
    *handle = new_allocation(file);
    return CUDA_SUCCESS;
  });
}

CUresult release_allocation(CUmemGenericAllocationHandle handle) {
  return call("cuMemRelease", CUDA_ERROR_UNKNOWN, [&] { let_go(of(handle)); });
}

CUresult reserve(CUdeviceptr* address, std::size_t bytes, std::size_t, CUdeviceptr,
                 unsigned long long) {
  return call("cuMemAddressReserve", CUDA_ERROR_OUT_OF_MEMORY, [&] {
    void* const place = ::mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    *address = reinterpret_cast<CUdeviceptr>(place);
    count("reservation", 1);
  });
}

CUresult free_address(CUdeviceptr address, std::size_t bytes) {
  return call("cuMemAddressFree", CUDA_ERROR_UNKNOWN, [&] {
    ::munmap(reinterpret_cast<void*>(address), bytes);
    count("reservation", -1);
  });
}

CUresult map(CUdeviceptr address, std::size_t bytes, std::size_t,
             CUmemGenericAllocationHandle handle, unsigned long long) {
  return call("cuMemMap", CUDA_ERROR_UNKNOWN, [&] {
    ::mmap(reinterpret_cast<void*>(address), bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
           of(handle)->file, 0);
    ++of(handle)->references;
    mappings()[address] = of(handle);
    count("mapping", 1);
  });
}

CUresult unmap(CUdeviceptr address, std::size_t bytes) {
  return call("cuMemUnmap", CUDA_ERROR_UNKNOWN, [&] {
    const auto found = mappings().find(address);
    if (found == mappings().end()) {
      misuse("cuMemUnmap of what is not mapped");
      return CUDA_ERROR_INVALID_VALUE;
    }
    let_go(found->second);
    mappings().erase(found);
    ::mmap(reinterpret_cast<void*>(address), bytes, PROT_NONE,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    count("mapping", -1);
    return CUDA_SUCCESS;
  });
}

CUresult set_access(CUdeviceptr, std::size_t, const CUmemAccessDesc*, std::size_t) {
  return call("cuMemSetAccess", CUDA_ERROR_UNKNOWN, [] {});
}

CUresult retain_allocation(CUmemGenericAllocationHandle* handle, void* address) {
  return call("cuMemRetainAllocationHandle", CUDA_ERROR_INVALID_VALUE, [&] {
    const auto found = mappings().find(reinterpret_cast<CUdeviceptr>(address));
    if (found == mappings().end()) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    ++found->second->references;
    *handle = reinterpret_cast<CUmemGenericAllocationHandle>(found->second);
    return CUDA_SUCCESS;
  });
}

CUresult export_allocation(void* file, CUmemGenericAllocationHandle handle,
                           CUmemAllocationHandleType, unsigned long long) {
  return call("cuMemExportToShareableHandle", CUDA_ERROR_UNKNOWN,
              [&] { *static_cast<int*>(file) = ::dup(of(handle)->file); });
}

CUresult import_allocation(CUmemGenericAllocationHandle* handle, void* file,
                           CUmemAllocationHandleType) {
  return call("cuMemImportFromShareableHandle", CUDA_ERROR_UNKNOWN, [&] {
    *handle = new_allocation(::dup(static_cast<int>(reinterpret_cast<std::intptr_t>(file))));
  });
}

CUresult is_capturing(CUstream stream, CUstreamCaptureStatus* status) {
  return call("cuStreamIsCapturing", CUDA_ERROR_UNKNOWN, [&] {
    const Stream& asked = stream_of(stream);
    *status = !asked.capture           ? CU_STREAM_CAPTURE_STATUS_NONE
              : asked.capture->invalid ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                       : CU_STREAM_CAPTURE_STATUS_ACTIVE;
  });
}

struct EntryPoint {
  std::string_view name;
  void* function;
};

template <class Function>
EntryPoint entry_point(std::string_view name, Function* function) {
  return {name, reinterpret_cast<void*>(function)};
}

const EntryPoint kEntryPoints[] = {
    entry_point("cuCtxGetDevice", get_context_device),
    entry_point("cuDeviceGet", get_device),
    entry_point("cuDeviceGetAttribute", get_device_attribute),
    entry_point("cuGetErrorName", get_error_name),
    entry_point("cuMemAddressFree", free_address),
    entry_point("cuMemAddressReserve", reserve),
    entry_point("cuMemCreate", create),
    entry_point("cuMemExportToShareableHandle", export_allocation),
    entry_point("cuMemGetAllocationGranularity", get_granularity),
    entry_point("cuMemImportFromShareableHandle", import_allocation),
    entry_point("cuMemMap", map),
    entry_point("cuMemRelease", release_allocation),
    entry_point("cuMemRetainAllocationHandle", retain_allocation),
    entry_point("cuMemSetAccess", set_access),
    entry_point("cuMemUnmap", unmap),
    entry_point("cuStreamIsCapturing", is_capturing),
};

}  // namespace

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                        unsigned long long,
                                                        cudaDriverEntryPointQueryResult* result) {
  for (const EntryPoint& point : kEntryPoints) {
    if (point.name == name) {
      *function = point.function;
      *result = cudaDriverEntryPointSuccess;
      return cudaSuccess;
    }
  }
  misuse(std::string(name) + " is not stood in for");
  *function = nullptr;
  *result = cudaDriverEntryPointSymbolNotFound;
  return cudaErrorUnknown;
}
