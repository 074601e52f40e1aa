// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <cohort/cuda.hpp>
#include <cohort/nccl/known_faults.hpp>
#include <cohort/nccl/nccl_check.hpp>
#include <string>

#include "device.hpp"

namespace cohort::info {
namespace {

class CudaDevice final : public Device {
 public:
  std::shared_ptr<Backend> backend() override { return backend_; }
  StreamRef stream() override { return backend_->stream(stream_.get()); }
  void upload(const void* from, const TensorView& to) override {
    copy(to.data(), from, to.bytes(), cudaMemcpyHostToDevice);
  }
  void download(const ConstTensorView& from, void* to) override {
    copy(to, from.data(), from.bytes(), cudaMemcpyDeviceToHost);
  }

 private:
  void copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
    const DeviceGuard guard(backend_->device().index);
    cuda_check(cudaMemcpyAsync(to, from, bytes, kind, stream_.get()), "cudaMemcpyAsync");
    cuda_check(cudaStreamSynchronize(stream_.get()), "cudaStreamSynchronize");
  }

  std::shared_ptr<CudaBackend> backend_ = cuda_backend();
  UniqueStream stream_ = make_stream(backend_->device().index);
};

std::string version(int code) { return fmt::format("{}.{}", code / 1000, code % 1000 / 10); }

/// "NVLink" or "PCIe" to each card that this process sees, by ordinal.
std::string links(int from, int devices) {
  std::string text;
  for (int to = 0; to < devices; ++to) {
    if (to == from) {
      continue;
    }
    int access = 0;
    int atomics = 0;
    cuda_check(cudaDeviceCanAccessPeer(&access, from, to), "cudaDeviceCanAccessPeer");
    if (access != 0) {
      cuda_check(cudaDeviceGetP2PAttribute(&atomics, cudaDevP2PAttrNativeAtomicSupported, from, to),
                 "cudaDeviceGetP2PAttribute");
    }
    text += fmt::format("{}{} to card {}", text.empty() ? "; " : ", ",
                        access == 0    ? "no peer access"
                        : atomics != 0 ? "NVLink"
                                       : "PCIe",
                        to);
  }
  return text;
}

Fact card(int ordinal, int devices) {
  cudaDeviceProp properties{};
  cuda_check(cudaGetDeviceProperties(&properties, ordinal), "cudaGetDeviceProperties");
  return {fmt::format("card {}", ordinal),
          fmt::format("{}, compute capability {}.{}, {} multiprocessors, {} GiB{}", properties.name,
                      properties.major, properties.minor, properties.multiProcessorCount,
                      properties.totalGlobalMem >> 30, links(ordinal, devices))};
}

}  // namespace

std::string cuda_obstacle() {
  apply(RuntimeEnvOptions{});  // before the question starts CUDA
  int devices = 0;
  const cudaError_t code = cudaGetDeviceCount(&devices);
  if (code != cudaSuccess) {
    return cudaGetErrorString(code);
  }
  return devices > 0 ? "" : "no CUDA device";
}

std::vector<Section> cuda_facts() {
  Section section{"CUDA", {}, {}};
  int driver_version = 0;
  int runtime_version = 0;
  static_cast<void>(cudaDriverGetVersion(&driver_version));
  static_cast<void>(cudaRuntimeGetVersion(&runtime_version));
  section.facts.push_back(
      {"driver supports CUDA", driver_version == 0 ? "no driver" : version(driver_version)});
  section.facts.push_back({"runtime", version(runtime_version)});
  const std::string header = nccl_version_string(NCCL_VERSION_CODE);
  int loaded = 0;
  nccl_check(ncclGetVersion(&loaded), "ncclGetVersion");
  section.facts.push_back(
      {"NCCL", fmt::format("{} loaded, {} compiled against", nccl_version_string(loaded), header)});
  for (const NcclFact& fact : kNcclFacts) {
    if (fact.holds(loaded)) {
      section.facts.push_back({"  this NCCL", std::string(fact.effect)});
    }
  }
  if (const std::string obstacle = cuda_obstacle(); !obstacle.empty()) {
    section.facts.push_back({"cards", "none: " + obstacle});
    return {section};
  }
  int devices = 0;
  cuda_check(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
  for (int ordinal = 0; ordinal < devices; ++ordinal) {
    section.facts.push_back(card(ordinal, devices));
  }
  return {section};
}

std::unique_ptr<Device> cuda_device() {
  if (const std::string obstacle = cuda_obstacle(); !obstacle.empty()) {
    throw ConfigError("--backend cuda: " + obstacle);
  }
  return std::make_unique<CudaDevice>();
}

}  // namespace cohort::info
