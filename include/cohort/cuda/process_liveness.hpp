// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cohort/cuda/process_identity.hpp"
#include "cohort/machine.hpp"

/// \file
/// Whether a rank's process is still there, where this one can see it. Needs no CUDA.

namespace cohort {

/// True where the process is known to have ended: it is one of this machine and of this process
/// namespace, and its number is free, belongs to another, or waits for its parent to collect it.
[[nodiscard]] inline bool process_is_gone(const ProcessIdentity& me, const ProcessIdentity& other) {
  if (!me.same_machine(other) || me.pid_namespace != other.pid_namespace || other.pid <= 0) {
    return false;
  }
  return process_ended(other.pid, other.start_time);
}

}  // namespace cohort
