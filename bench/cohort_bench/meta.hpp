// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <span>
#include <string>

#include "bed.hpp"

/// \file
/// The facts of a run.

namespace cohort::bench {

/// Collective. Command, commit, date, host, ranks, versions, and the environment variables that
/// bear on the libraries.
[[nodiscard]] Meta describe_run(std::span<const std::string> command, const Options& options,
                                Bed& bed, ControlPlane& world);

}  // namespace cohort::bench
