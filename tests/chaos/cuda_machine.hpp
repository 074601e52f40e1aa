// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cohort/cohort.hpp>
#include <cohort/cuda.hpp>
#include <cstdlib>
#include <memory>
#include <string>

#include "chaos/machine.hpp"
#include "support/group_tensors.hpp"

namespace cohort::chaos {

/// A card, which the ranks share where there are fewer cards than ranks.
class CudaMachine final : public Machine, private test::DeviceAccess {
 public:
  CudaMachine(const Plan& plan, int rank, int cards, std::chrono::milliseconds limit)
      : limit_(limit),
        backend_(start(plan, rank, cards)),
        stream_(make_stream(backend_->device().index)) {
    test::device_access = this;
  }
  ~CudaMachine() override { test::device_access = nullptr; }
  CudaMachine(const CudaMachine&) = delete;
  CudaMachine& operator=(const CudaMachine&) = delete;

  [[nodiscard]] std::shared_ptr<Backend> backend() override { return backend_; }
  [[nodiscard]] bool starts_slowly() const override { return true; }
  [[nodiscard]] StreamRef stream() override { return backend_->stream(stream_.get()); }
  [[nodiscard]] StreamRef capture_stream() override { return stream(); }
  void follow(GroupCoordinator& group) override { group_ = &group; }

 private:
  static std::shared_ptr<CudaBackend> start(const Plan& plan, int rank, int cards) {
    if (cards < plan.ranks) {  // NCCL refuses two ranks of a host on one card
      ::setenv("NCCL_HOSTID", ("chaos" + std::to_string(rank)).c_str(), 1);
      ::setenv("NCCL_SOCKET_IFNAME", "lo", 0);
    }
    return cuda_backend({.device = rank % cards,
                         .environment = {.multicast = false},
                         .peer_mapping = plan.map_peers});
  }

  void read(void* to, const void* from, std::size_t bytes) override {
    group_->synchronize(stream(), limit_);
    const DeviceGuard guard(backend_->device().index);
    cuda_check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
  }
  void write(void* to, const void* from, std::size_t bytes) override {
    {
      const DeviceGuard guard(backend_->device().index);
      cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_.get()),
                 "cudaMemcpyAsync");
    }
    group_->synchronize(stream(), limit_);
  }

  std::chrono::milliseconds limit_;
  std::shared_ptr<CudaBackend> backend_;
  UniqueStream stream_;
  GroupCoordinator* group_ = nullptr;
};

/// What does not exist on cards.
[[nodiscard]] inline Plan for_cards(Plan plan) {
  plan.mixed_memory = false;  // NCCL's symmetric kernels want buffers in windows on all ranks
  if (!plan.map_peers) {
    plan.symmetric = false;  // NCCL 2.28's symmetric kernels cannot be told to stop waiting
  }
  // Of the process: CUDA reserves addresses, and allocates on threads of its own, as it likes.
  if (plan.fault == Fault::memory || plan.fault == Fault::allocation) {
    plan.fault = Fault::late;
  }
  if (plan.fault == Fault::arguments && plan.phase == Phase::calling) {
    plan.debug_checks = true;  // NCCL compares nothing
  }
  plan.other = Other::extent;
  return plan;
}

}  // namespace cohort::chaos
