// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cohort/transport.hpp>
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "report.hpp"

/// \file
/// What the tool needs of a kind of device: facts, a backend with a stream, and copies to and fro.

namespace cohort::info {

class Device {
 public:
  Device() = default;
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  virtual ~Device() = default;

  [[nodiscard]] virtual std::shared_ptr<Backend> backend() = 0;
  [[nodiscard]] virtual StreamRef stream() = 0;
  /// Copies of contiguous tensors; both return when the bytes are there.
  virtual void upload(const void* from, const TensorView& to) = 0;
  virtual void download(const ConstTensorView& from, void* to) = 0;
};

[[nodiscard]] std::unique_ptr<Device> host_device();

// With CUDA or without: cuda_device.cpp or no_cuda_device.cpp.

/// Why no card can be used, or nothing where one can.
[[nodiscard]] std::string cuda_obstacle();
/// Cards, driver, toolkit and NCCL; where CUDA is not built in, that.
[[nodiscard]] std::vector<Section> cuda_facts();
/// Throws `ConfigError` where no card can be used.
[[nodiscard]] std::unique_ptr<Device> cuda_device();

}  // namespace cohort::info
