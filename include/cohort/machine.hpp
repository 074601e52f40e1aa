// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/stat.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include "cohort/system_calls.hpp"

/// \file
/// Which machine this process runs on, and where its process number is valid.

namespace cohort {

/// The kernel's boot id: the same for all containers of a machine, different after each boot.
/// Source: random(4).
struct BootId {
  std::string text;  ///< "" where it cannot be read.
  int error = 0;     ///< errno then.
};

/// Reads the kernel's boot id, which tells machines apart.
[[nodiscard]] inline BootId read_boot_id() {
  os::TextFile file = os::read_text("/proc/sys/kernel/random/boot_id");
  file.text.erase(std::min(file.text.size(), file.text.find('\n')));
  return {.text = file.error == 0 ? std::move(file.text) : "", .error = file.error};
}

/// The boot id, empty where it cannot be read.
[[nodiscard]] inline std::string boot_id() { return read_boot_id().text; }

/// Number of this process's PID namespace, or 0 where it cannot be read. Source: pid_namespaces(7).
[[nodiscard]] inline std::uint64_t pid_namespace() {
  struct stat status {};
  return ::stat("/proc/self/ns/pid", &status) == 0 ? static_cast<std::uint64_t>(status.st_ino) : 0;
}

}  // namespace cohort
