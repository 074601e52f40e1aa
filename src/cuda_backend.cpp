// SPDX-License-Identifier: Apache-2.0
#include "cohort/nccl/cuda_backend.hpp"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include "cohort/call_time.hpp"
#include "cohort/cuda/device_choice.hpp"
#include "cohort/cuda/kernels.hpp"
#include "cohort/cuda/support_kernels.hpp"
#include "cohort/error.hpp"
#include "cohort/launcher.hpp"
#include "cohort/log.hpp"
#include "cohort/nccl/known_faults.hpp"
#include "cohort/nccl/nccl_check.hpp"
#include "cohort/nccl/nccl_transport.hpp"
#include "cohort/nccl/nccl_window.hpp"

// The backend's parts that need NCCL.

namespace cohort {

std::unique_ptr<Segment> CudaBackend::allocate_segment(std::size_t bytes) {
  return std::make_unique<NcclSegment>(device_, bytes);
}

std::unique_ptr<Transport> CudaBackend::connect(ControlPlane& group) {
  auto transport = std::make_unique<NcclTransport>(
      group, streams_, device_,
      NcclTransportOptions{.peer_mapping = options_.peer_mapping,
                           .kernel_limit = options_.kernel_limit,
                           .kernels_at_once = options_.kernels_at_once,
                           .ranks_per_card = ranks_per_card_,
                           .own_max_bytes = options_.own_max_bytes,
                           .visibility_guard = options_.visibility_guard});
  // The world is connected first: groups of few ranks learn who else is on their cards.
  ranks_per_card_ = transport->ranks_per_card();
  return transport;
}

int CudaBackend::start(const CudaOptions& options) {
  if (!is_time_limit(options.kernel_limit)) {
    throw ConfigError(fmt::format("CudaOptions.kernel_limit: expected 1 to {} ms, got {}",
                                  kLongestTimeLimit.count(), options.kernel_limit.count()));
  }
  for (const EnvSetting& setting : apply(options.environment)) {
    log(LogLevel::info, describe(setting));
  }
  int devices = 0;
  const cudaError_t code = cudaGetDeviceCount(&devices);
  if (code != cudaErrorNoDevice) {
    cuda_check(code, "cudaGetDeviceCount");
  }
  const int device = choose_device(options.device, local_rank(), devices);
  const DeviceGuard guard(device);
  cuda_check(cudaFree(nullptr), "cudaFree");  // creates the device's context
  cuda::require_code();
  cuda::load_local_kernels();
  log(LogLevel::info, describe_nccl(nccl_runtime_version()));
  return device;
}

}  // namespace cohort
