// SPDX-License-Identifier: Apache-2.0
#include "machine_facts.hpp"

#include <fmt/format.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cohort/error.hpp>
#include <cohort/host/memory_limits.hpp>
#include <cohort/host/shared_memory.hpp>
#include <cohort/machine.hpp>
#include <cohort/runtime_env.hpp>
#include <string>

namespace cohort::info {
namespace {

std::string bytes(double count) {
  constexpr double kGiB = 1024.0 * 1024 * 1024;
  return count >= kGiB ? fmt::format("{:.1f} GiB", count / kGiB)
                       : fmt::format("{:.0f} MiB", count / (1024 * 1024));
}

Fact kernel() {
  utsname names{};
  ::uname(&names);
  return {"kernel", fmt::format("{} {} on {}", names.sysname, names.release, names.machine)};
}

Fact cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  const long online = ::sysconf(_SC_NPROCESSORS_ONLN);
  const int allowed =
      ::sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : static_cast<int>(online);
  return {"cores", fmt::format("{} of {} may be used by this process", allowed, online)};
}

/// A small piece of what every window is made of.
Fact windows_memory() {
  constexpr std::size_t kTrial = 4096;
  try {
    static_cast<void>(host::make_shared_memory(kTrial, host::Commit::at_once));
    return {"memory files", "can be made"};
  } catch (const Error& error) {
    return {"memory files", "cannot be made", error.what()};
  }
}

Fact free_memory() {
  return {
      "memory for segments",
      fmt::format("{} can be taken", bytes(static_cast<double>(host::detail::available_memory())))};
}

Fact shm() {
  struct statvfs status {};
  if (::statvfs("/dev/shm", &status) != 0) {
    return {"/dev/shm", "is not there; only MPI may need it"};
  }
  return {"/dev/shm", fmt::format("{} free; only MPI may need it",
                                  bytes(static_cast<double>(status.f_bavail) *
                                        static_cast<double>(status.f_frsize)))};
}

Fact limit(const char* name, decltype(RLIMIT_NOFILE) resource, bool in_bytes) {
  rlimit limits{};
  ::getrlimit(resource, &limits);
  const std::string value = limits.rlim_cur == RLIM_INFINITY ? "unlimited"
                            : in_bytes ? bytes(static_cast<double>(limits.rlim_cur))
                                       : fmt::format("{}", limits.rlim_cur);
  return {name, value};
}

}  // namespace

Section machine_facts() {
  const std::string boot = boot_id();
  return {"Machine",
          {},
          {kernel(),
           {"boot id", boot.empty() ? "cannot be read" : boot,
            boot.empty() ? "ranks cannot tell whether they share a machine" : ""},
           cores(),
           windows_memory(),
           free_memory(),
           shm(),
           limit("limit of open files", RLIMIT_NOFILE, false),
           limit("limit of a file's size", RLIMIT_FSIZE, true),
           limit("limit of address space", RLIMIT_AS, true)}};
}

Section environment_facts() {
  Section section{"Environment (set here, or what holds)", {}, {}};
  for (const auto& variable : kEnvVariables) {
    const auto value = process_env(std::string(variable.name));
    section.facts.push_back({std::string(variable.name),
                             value ? *value : fmt::format("not set: {}", variable.default_value)});
  }
  return section;
}

}  // namespace cohort::info
