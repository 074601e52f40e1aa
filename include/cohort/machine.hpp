// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/stat.h>

#include <algorithm>
#include <cstdint>
#include <sstream>
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

/// Start of a process in clock ticks since the boot, or 0 where it cannot be read. Together with
/// the number it names one process for good: field 22 of proc(5)'s stat, counted behind the name,
/// which may hold spaces and parentheses.
[[nodiscard]] inline std::uint64_t process_start_time(const std::string& pid) {
  const std::string line = os::read_text("/proc/" + pid + "/stat").text;
  const auto name_end = line.rfind(')');
  if (name_end == std::string::npos) {
    return 0;
  }
  std::istringstream fields(line.substr(name_end + 1));
  std::string skipped;
  for (int field = 3; field < 22; ++field) {
    fields >> skipped;
  }
  std::uint64_t ticks = 0;
  fields >> ticks;
  return ticks;
}

/// True where a process of this process namespace is known to have ended: its number is free,
/// belongs to another, or waits for its parent to collect it.
[[nodiscard]] inline bool process_ended(std::int64_t number, std::uint64_t start_time) {
  const std::string pid = std::to_string(number);
  const std::string line = os::read_text("/proc/" + pid + "/stat").text;
  if (line.empty()) {
    return !os::read_text("/proc/self/stat").text.empty();  // or /proc is not mounted at all
  }
  const auto name_end = line.rfind(')');
  const char state =
      name_end != std::string::npos && name_end + 2 < line.size() ? line[name_end + 2] : '?';
  return state == 'Z' || state == 'X' || process_start_time(pid) != start_time;
}

}  // namespace cohort
