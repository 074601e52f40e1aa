// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fstream>
#include <string>

#include "cohort/cuda/process_identity.hpp"

/// \file
/// Whether a rank's process is still there, where this one can see it. Needs no CUDA.

namespace cohort {

/// True where the process is known to have ended: it is one of this machine and of this process
/// namespace, and its number is free, belongs to another, or waits for its parent to collect it.
[[nodiscard]] inline bool process_is_gone(const ProcessIdentity& me, const ProcessIdentity& other) {
  if (!me.same_machine(other) || me.pid_namespace != other.pid_namespace || other.pid <= 0) {
    return false;
  }
  const std::string pid = std::to_string(other.pid);
  std::ifstream file("/proc/" + pid + "/stat");
  std::string line;
  if (!std::getline(file, line)) {
    return std::ifstream("/proc/self/stat").good();  // or /proc is not mounted at all
  }
  const auto name_end = line.rfind(')');  // names may hold spaces and parentheses; see proc(5)
  const char state =
      name_end != std::string::npos && name_end + 2 < line.size() ? line[name_end + 2] : '?';
  return state == 'Z' || state == 'X' || detail::process_start_time(pid) != other.start_time;
}

}  // namespace cohort
