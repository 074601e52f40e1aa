// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <array>
#include <cstdint>
#include <mutex>
#include <random>
#include <string>

#include "cohort/fixed_text.hpp"
#include "cohort/machine.hpp"
#include "cohort/owner_process.hpp"
#include "cohort/process_state.hpp"
#include "cohort/system_calls.hpp"

/// \file
/// Who a rank is on its machine, as a plain value that ranks send each other. Needs no CUDA.

namespace cohort {

/// Identity of a process. Two ranks with equal `process_key` are threads of one process.
struct ProcessIdentity {
  std::array<char, 40> boot_id{};         ///< The kernel's, new at each start of the machine.
  std::array<std::uint64_t, 2> secret{};  ///< Proves a connection; known to the group alone.
  std::uint64_t process_key = 0;          ///< Random, once per process.
  std::uint64_t pid_namespace = 0;        ///< Process numbers compare within one only.
  std::uint64_t start_time = 0;           ///< Of the process, in ticks since the boot.
  std::int64_t pid = 0;
  std::uint64_t uid = 0;           ///< Effective.
  std::int64_t boot_id_error = 0;  ///< errno where the boot id could not be read.

  [[nodiscard]] bool same_machine(const ProcessIdentity& other) const noexcept {
    return boot_id == other.boot_id && boot_id[0] != '\0';
  }
  [[nodiscard]] bool same_process(const ProcessIdentity& other) const noexcept {
    return same_machine(other) && process_key == other.process_key;
  }
};

namespace detail {

[[nodiscard]] inline std::uint64_t random_word() {
  std::random_device device;
  return (std::uint64_t{device()} << 32) | device();
}

/// A random number that the threads of a process share, and a forked child does not.
[[nodiscard]] inline std::uint64_t process_key() {
  struct Key {
    std::mutex mutex;
    OwnerProcess owner;
    std::uint64_t word = random_word();
  };
  auto& key = process_wide<Key>("process key 1");
  const std::lock_guard lock(key.mutex);
  if (!key.owner.is_here()) {
    key.owner = {};
    key.word = random_word();
  }
  return key.word;
}

}  // namespace detail

/// This rank's identity, with a fresh secret.
[[nodiscard]] inline ProcessIdentity this_process() {
  ProcessIdentity me;
  const BootId boot = read_boot_id();
  detail::copy_text(boot.text, me.boot_id);
  me.boot_id_error = boot.error;
  me.secret = {detail::random_word(), detail::random_word()};
  me.process_key = detail::process_key();
  me.pid_namespace = cohort::pid_namespace();
  me.start_time = process_start_time("self");
  me.pid = static_cast<std::int64_t>(::getpid());
  me.uid = static_cast<std::uint64_t>(::geteuid());
  return me;
}

/// What NCCL tells hosts apart by: NCCL_HOSTID where it is set, otherwise host name and boot id
/// (NCCL's src/misc/utils.cc, getHostHash). `host_id` is that variable's value or null.
[[nodiscard]] inline std::string nccl_host_identity(const char* host_id) {
  if (host_id != nullptr) {
    return host_id;
  }
  std::array<char, 256> name{};
  static_cast<void>(::gethostname(name.data(), name.size() - 1));
  return std::string(name.data()) + boot_id();
}

}  // namespace cohort
