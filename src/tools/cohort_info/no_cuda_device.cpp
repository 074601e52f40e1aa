// SPDX-License-Identifier: Apache-2.0
#include <cohort/error.hpp>

#include "device.hpp"

namespace cohort::info {

std::string cuda_obstacle() { return "built without CUDA"; }

std::vector<Section> cuda_facts() {
  return {{"CUDA", {}, {{"cards", "none: built without CUDA"}}}};
}

std::unique_ptr<Device> cuda_device() { throw ConfigError("--backend cuda: " + cuda_obstacle()); }

}  // namespace cohort::info
