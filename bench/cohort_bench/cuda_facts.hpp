// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cohort/control_plane.hpp"
#include "rows.hpp"

/// \file
/// The facts of a run on cards.

namespace cohort::bench {

/// Collective. Every rank's card, and the versions of driver and libraries.
void describe_cuda(Meta& meta, ControlPlane& world, int device);

}  // namespace cohort::bench
