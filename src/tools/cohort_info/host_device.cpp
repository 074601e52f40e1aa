// SPDX-License-Identifier: Apache-2.0
#include <cohort/host/host_backend.hpp>
#include <cohort/host/host_stream.hpp>
#include <cstring>

#include "device.hpp"

namespace cohort::info {
namespace {

class HostDevice final : public Device {
 public:
  std::shared_ptr<Backend> backend() override { return backend_; }
  StreamRef stream() override { return stream_; }
  void upload(const void* from, const TensorView& to) override {
    std::memcpy(to.data(), from, to.bytes());
  }
  void download(const ConstTensorView& from, void* to) override {
    std::memcpy(to, from.data(), from.bytes());
  }

 private:
  std::shared_ptr<Backend> backend_ = host_backend();
  HostStream stream_;
};

}  // namespace

std::unique_ptr<Device> host_device() { return std::make_unique<HostDevice>(); }

}  // namespace cohort::info
