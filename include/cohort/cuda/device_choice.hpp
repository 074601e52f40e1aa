#pragma once

#include <fmt/format.h>

#include <array>
#include <optional>
#include <string>

#include "cohort/error.hpp"
#include "cohort/runtime_env.hpp"

/// \file
/// Which device a process uses. Pure.

namespace cohort {

/// Where launchers tell a process its number on its host, in the order in which they are asked:
/// Open MPI, MPICH and Intel MPI, MVAPICH, PALS, Flux, Slurm, and torchrun. Those that start others
/// come later: srun starts mpirun, and each variable is right for its own level only.
inline constexpr std::array kLocalRankVariables = {"OMPI_COMM_WORLD_LOCAL_RANK",
                                                   "MPI_LOCALRANKID",
                                                   "MV2_COMM_WORLD_LOCAL_RANK",
                                                   "PALS_LOCAL_RANKID",
                                                   "FLUX_TASK_LOCAL_ID",
                                                   "SLURM_LOCALID",
                                                   "LOCAL_RANK"};

/// The process's number among those of its host, or nothing where no launcher said. torchrun, which
/// marks its workers by TORCHELASTIC_RUN_ID, is always the innermost launcher: srun or mpirun start
/// it once a host, so that their own numbers are 0.
/// @throw ConfigError where a variable holds no number.
[[nodiscard]] inline std::optional<int> local_rank(const EnvLookup& lookup = process_env) {
  const auto ask = [&lookup](const char* name) -> std::optional<int> {
    const auto text = lookup(name);
    if (!text || text->empty()) {
      return std::nullopt;
    }
    return static_cast<int>(parse_env_integer(name, *text, 0, 1 << 20));
  };
  if (lookup("TORCHELASTIC_RUN_ID")) {
    if (const auto rank = ask("LOCAL_RANK")) {
      return rank;
    }
  }
  for (const char* name : kLocalRankVariables) {
    if (const auto rank = ask(name)) {
      return rank;
    }
  }
  return std::nullopt;
}

/// The device for a process: the one asked for, otherwise by local rank, round robin, so that one
/// visible card per process works, and several processes per card. Without a local rank, 0.
/// @throw ConfigError if there is no device, or none with the number asked for.
[[nodiscard]] inline int choose_device(std::optional<int> wanted, std::optional<int> local,
                                       int devices) {
  if (devices < 1) {
    throw ConfigError("cuda_backend: no CUDA device is visible to this process");
  }
  if (wanted && (*wanted < 0 || *wanted >= devices)) {
    throw ConfigError(
        fmt::format("cuda_backend: device: expected 0 to {}, got {}", devices - 1, *wanted));
  }
  return wanted ? *wanted : local.value_or(0) % devices;
}

}  // namespace cohort
