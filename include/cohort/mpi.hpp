// SPDX-License-Identifier: Apache-2.0
#pragma once

/// \file
/// The parts of Cohort that need MPI. Link `cohort::mpi`.

#include "cohort/mpi/mpi_control_plane.hpp"  // IWYU pragma: export
#include "cohort/mpi/mpi_session.hpp"        // IWYU pragma: export
