// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cohort/cohort.hpp>
#include <cstddef>
#include <memory>

#include "chaos/machine.hpp"

namespace cohort::chaos {

/// Shared memory of this host.
class HostMachine final : public Machine {
 public:
  explicit HostMachine(const Plan& plan)
      : backend_(
            host_backend({.slot_bytes = plan.small_slots ? std::size_t{4096} : std::size_t{1} << 18,
                          .window_bytes = 2048,  // as large as its tensors
                          .map_peers = plan.map_peers})) {}

  [[nodiscard]] std::shared_ptr<Backend> backend() override { return backend_; }
  [[nodiscard]] bool leaves_nothing() const override { return true; }
  [[nodiscard]] StreamRef stream() override { return {}; }
  [[nodiscard]] StreamRef capture_stream() override { return stream_; }
  void follow(GroupCoordinator&) override {}

 private:
  std::shared_ptr<Backend> backend_;
  HostStream stream_;
};

[[nodiscard]] inline std::unique_ptr<Machine> make_host_machine(const Plan& plan, int,
                                                                std::chrono::milliseconds) {
  return std::make_unique<HostMachine>(plan);
}

}  // namespace cohort::chaos
