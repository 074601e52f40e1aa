// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cohort/control_plane.hpp>
#include <string>

#include "support/catch.hpp"

/// \file
/// For test cases that every rank of an MPI job runs. A test case that fails on one rank fails; the
/// ranks agree after each test case, within a time limit.

namespace cohort::test {

/// The control plane over all ranks of the job.
[[nodiscard]] ControlPlane& world();

[[nodiscard]] int world_rank();
[[nodiscard]] int world_size();

/// Collective. Skips the test case on all ranks if any rank gives a true condition:
/// `if (skip_all_if(world_size() < 2, "needs two ranks")) return;`
[[nodiscard]] bool skip_all_if(bool condition_here, const std::string& reason);

}  // namespace cohort::test
