// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <span>
#include <string>
#include <string_view>

#include "cohort/control_plane.hpp"
#include "rows.hpp"

/// \file
/// The facts of a run.

namespace cohort::bench {

/// Collective. Command, commit, date, host, ranks, versions, and the environment variables that
/// bear on the libraries; the device's own facts are the caller's to add.
[[nodiscard]] Meta describe_run(std::string_view program, std::span<const std::string> command,
                                std::string_view backend, ControlPlane& world);

}  // namespace cohort::bench
