// SPDX-License-Identifier: Apache-2.0
#include "cuda_facts.hpp"

#include <cuda_runtime_api.h>
#include <fmt/format.h>
#include <nccl.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <span>
#include <sstream>
#include <string>
#include <vector>

#include "cohort/cuda/cuda_check.hpp"
#include "cohort/cuda/handles.hpp"
#include "cohort/nccl/nccl_check.hpp"

namespace cohort::bench {

namespace {

/// "580.65.06" of "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  ...", or "unknown".
[[nodiscard]] std::string driver_version() {
  std::ifstream file("/proc/driver/nvidia/version");
  std::string line;
  std::getline(file, line);
  std::istringstream words(line);
  for (std::string word; words >> word;) {
    const bool digits = std::all_of(word.begin(), word.end(),
                                    [](char c) { return (c >= '0' && c <= '9') || c == '.'; });
    if (digits && word.find('.') != std::string::npos) {
      return word;
    }
  }
  return "unknown";
}

[[nodiscard]] std::string dotted(int version, int major_unit, int minor_unit) {
  return fmt::format("{}.{}.{}", version / major_unit, version % major_unit / minor_unit,
                     version % minor_unit);
}

}  // namespace

void describe_cuda(Meta& meta, ControlPlane& world, int device) {
  const DeviceGuard guard(device);
  cudaDeviceProp properties{};
  cuda_check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  std::array<char, 32> bus{};
  cuda_check(cudaDeviceGetPCIBusId(bus.data(), static_cast<int>(bus.size()), device),
             "cudaDeviceGetPCIBusId");
  const std::string mine = fmt::format("{} ({})", properties.name, bus.data());
  std::vector<std::string> by_rank;
  for (const auto& bytes : world.all_gather(std::as_bytes(std::span(mine)))) {
    by_rank.emplace_back(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  }
  int runtime = 0;
  int nccl = 0;
  cuda_check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  nccl_check(ncclGetVersion(&nccl), "ncclGetVersion");
  meta.list("gpus", by_rank);
  meta.text("driver", driver_version());
  meta.text("cuda", fmt::format("{}.{}", runtime / 1000, runtime % 1000 / 10));
  meta.text("nccl", dotted(nccl, 10000, 100));
}

}  // namespace cohort::bench
