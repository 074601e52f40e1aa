// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <optional>

#include "cohort/error.hpp"

/// \file
/// Which device a process uses. Pure.

namespace cohort {

/// The device for a process: the one asked for, otherwise by local rank, round robin, so that one
/// visible card per process works, and several processes per card. Without a local rank, 0.
/// @throw ConfigError if there is no device, or none with the number asked for.
[[nodiscard]] inline int choose_device(std::optional<int> wanted, std::optional<int> local,
                                       int devices) {
  if (devices < 1) {
    throw ConfigError("cuda_backend: no CUDA device is visible to this process");
  }
  if (wanted && (*wanted < 0 || *wanted >= devices)) {
    throw ConfigError(
        fmt::format("cuda_backend: device: expected 0 to {}, got {}", devices - 1, *wanted));
  }
  return wanted ? *wanted : local.value_or(0) % devices;
}

}  // namespace cohort
