// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "report.hpp"

namespace cohort::info {

/// This process's machine: kernel, cores, limits, memory for host windows.
[[nodiscard]] Section machine_facts();

/// The variables that the library reads or sets, with their values here.
[[nodiscard]] Section environment_facts();

}  // namespace cohort::info
