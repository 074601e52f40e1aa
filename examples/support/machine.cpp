// SPDX-License-Identifier: Apache-2.0
#include "machine.hpp"

#include <charconv>
#include <string_view>

#include "cohort/error.hpp"
#include "cohort/host/host_backend.hpp"
#include "command_line/command_line.hpp"

#if COHORT_EXAMPLE_CUDA
#include <cuda_runtime_api.h>

#include "cohort/cuda.hpp"
#endif

namespace example {
namespace {

using cohort::TensorView;

class HostMachine final : public Machine {
 public:
  std::shared_ptr<cohort::Backend> backend() override { return backend_; }
  cohort::StreamRef stream() override { return stream_; }
  std::shared_ptr<void> mirror(const TensorView& tensor) override {
    return {tensor.data(), [](void*) {}};
  }
  void upload(const void*, const TensorView&) override {}
  void download(const TensorView&, void*) override {}

 private:
  std::shared_ptr<cohort::Backend> backend_ = cohort::host_backend();
  cohort::HostStream stream_;
};

#if COHORT_EXAMPLE_CUDA

class CudaMachine final : public Machine {
 public:
  std::shared_ptr<cohort::Backend> backend() override { return backend_; }
  cohort::StreamRef stream() override { return backend_->stream(stream_.get()); }

  /// Page-locked, which asynchronous copies and graphs need.
  std::shared_ptr<void> mirror(const TensorView& tensor) override {
    const cohort::DeviceGuard guard(backend_->device().index);
    void* memory = nullptr;
    cohort::cuda_check(cudaMallocHost(&memory, tensor.bytes()), "cudaMallocHost");
    return {memory, [](void* m) { cohort::cuda_report(cudaFreeHost(m), "cudaFreeHost"); }};
  }
  void upload(const void* mirror, const TensorView& tensor) override {
    copy(tensor.data(), mirror, tensor.bytes(), cudaMemcpyHostToDevice);
  }
  void download(const TensorView& tensor, void* mirror) override {
    copy(mirror, tensor.data(), tensor.bytes(), cudaMemcpyDeviceToHost);
  }

 private:
  void copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
    const cohort::DeviceGuard guard(backend_->device().index);
    cohort::cuda_check(cudaMemcpyAsync(to, from, bytes, kind, stream_.get()), "cudaMemcpyAsync");
  }

  std::shared_ptr<cohort::CudaBackend> backend_ = cohort::cuda_backend();
  cohort::UniqueStream stream_ = cohort::make_stream(backend_->device().index);
};

#endif

BackendChoice backend_of(std::string_view value) {
  if (value == "host") {
    return BackendChoice::host;
  }
  if (value == "cuda") {
    return BackendChoice::cuda;
  }
  if (value != "automatic") {
    cohort::tools::refuse("--backend: expected host, cuda or automatic, got \"" +
                          std::string(value) + "\"");
  }
  return BackendChoice::automatic;
}

}  // namespace

Arguments arguments(int argc, char** argv, std::string_view help, std::size_t most) {
  const std::string all =
      std::string(help) +
      "\n  --backend NAME  host (default), cuda, or automatic: cuda where it is\n";
  cohort::tools::help_if_asked(argc, argv, all);
  Arguments found;
  for (int i = 1; i < argc; ++i) {
    const std::string_view word = argv[i];
    int number = 0;
    if (word == "--backend") {
      found.backend = backend_of(++i < argc ? argv[i] : "");
    } else if (std::from_chars(word.data(), word.data() + word.size(), number).ptr ==
                   word.data() + word.size() &&
               found.numbers.size() < most) {
      found.numbers.push_back(number);
    } else {
      cohort::tools::refuse(cohort::tools::no_such_option(word, all));
    }
  }
  return found;
}

#if COHORT_EXAMPLE_CUDA

std::string cuda_obstacle() {
  cohort::apply(cohort::RuntimeEnvOptions{});  // before the question starts CUDA
  int devices = 0;
  const cudaError_t code = cudaGetDeviceCount(&devices);
  if (code != cudaSuccess) {
    return cudaGetErrorString(code);
  }
  return devices > 0 ? "" : "no CUDA device";
}

std::unique_ptr<Machine> make_machine(BackendChoice choice) {
  if (choice == BackendChoice::cuda ||
      (choice == BackendChoice::automatic && cuda_obstacle().empty())) {
    return std::make_unique<CudaMachine>();
  }
  return std::make_unique<HostMachine>();
}

#else

std::string cuda_obstacle() { return "built without CUDA"; }

std::unique_ptr<Machine> make_machine(BackendChoice choice) {
  if (choice == BackendChoice::cuda) {
    throw cohort::ConfigError("--backend cuda: " + cuda_obstacle());
  }
  return std::make_unique<HostMachine>();
}

#endif

}  // namespace example
