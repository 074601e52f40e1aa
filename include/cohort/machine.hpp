#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <fstream>
#include <string>

/// \file
/// Which machine this process runs on, and where its process number is valid.

namespace cohort {

/// The kernel's boot id: the same for all containers of a machine, different after each boot; ""
/// where it cannot be read. Source: random(4).
[[nodiscard]] inline std::string boot_id() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string id;
  file >> id;
  return id;
}

/// Number of this process's PID namespace, or 0 where it cannot be read. Source: pid_namespaces(7).
[[nodiscard]] inline std::uint64_t pid_namespace() {
  struct stat status {};
  return ::stat("/proc/self/ns/pid", &status) == 0 ? static_cast<std::uint64_t>(status.st_ino) : 0;
}

}  // namespace cohort
