// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "cohort/runtime_env.hpp"

/// \file
/// What the program that started this process says about it. Pure.

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

namespace detail {

/// The number that a launcher left in a variable; nothing where it is unset or empty.
/// @throw ConfigError where it holds no number.
[[nodiscard]] inline std::optional<std::int64_t> launcher_number(const EnvLookup& lookup,
                                                                 const char* name) {
  const auto text = lookup(name);
  if (!text || text->empty()) {
    return std::nullopt;
  }
  return parse_env_integer(name, *text, 0, std::numeric_limits<std::uint32_t>::max());
}

}  // namespace detail

/// The process's number among those of its host, or nothing where no launcher said. torchrun, which
/// marks its workers by TORCHELASTIC_RUN_ID, is always the innermost launcher: srun or mpirun start
/// it once a host, so that their own numbers are 0.
/// @throw ConfigError where a variable holds no number.
[[nodiscard]] inline std::optional<int> local_rank(const EnvLookup& lookup = process_env) {
  if (lookup("TORCHELASTIC_RUN_ID")) {
    if (const auto rank = detail::launcher_number(lookup, "LOCAL_RANK")) {
      return static_cast<int>(*rank);
    }
  }
  for (const char* name : kLocalRankVariables) {
    if (const auto rank = detail::launcher_number(lookup, name)) {
      return static_cast<int>(*rank);
    }
  }
  return std::nullopt;
}

/// How many processes a launcher started together, this one among them.
struct LauncherSize {
  std::int64_t size = 1;      ///< Processes that the launcher started.
  const char* variable = "";  ///< Who says so.
};

namespace detail {

/// Of mpirun of Open MPI. Without PMIX_RANK the process has no connection to it: whoever starts a
/// process that is to be alone under mpirun takes that out, and may leave the rest.
[[nodiscard]] inline std::optional<LauncherSize> open_mpi_size(const EnvLookup& lookup) {
  const auto size = launcher_number(lookup, "OMPI_COMM_WORLD_SIZE");
  if (!size || !lookup("PMIX_RANK")) {
    return std::nullopt;
  }
  return LauncherSize{*size, "OMPI_COMM_WORLD_SIZE"};
}

/// Of whatever speaks PMI: mpirun of MPICH, Intel MPI and MVAPICH, PALS, Flux, srun. Again only
/// with the connection, without which size and rank are what another level left.
[[nodiscard]] inline std::optional<LauncherSize> pmi_size(const EnvLookup& lookup) {
  const auto size = launcher_number(lookup, "PMI_SIZE");
  const bool connected = lookup("PMI_FD") || lookup("PMI_PORT") || lookup("PMI_CONTROL_PORT");
  if (!size || !lookup("PMI_RANK") || !connected) {
    return std::nullopt;
  }
  return LauncherSize{*size, "PMI_SIZE"};
}

/// Of srun. A shell of salloc and a script of sbatch have SLURM_NTASKS too, but no step, or a step
/// of their own with a reserved number.
/// Source: SLURM_MAX_NORMAL_STEP_ID in slurm.h, and "OUTPUT ENVIRONMENT VARIABLES" of srun(1).
[[nodiscard]] inline std::optional<LauncherSize> srun_size(const EnvLookup& lookup) {
  constexpr std::int64_t kMaxNormalStep = 0xfffffff0;
  const auto step = launcher_number(lookup, "SLURM_STEP_ID");
  if (!step || *step > kMaxNormalStep || !lookup("SLURM_PROCID")) {
    return std::nullopt;
  }
  for (const char* name : {"SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"}) {
    if (const auto size = launcher_number(lookup, name)) {
      return LauncherSize{*size, name};
    }
  }
  return std::nullopt;
}

}  // namespace detail

/// What the launcher nearest to this process says, or nothing where none is known to have started
/// it. torchrun is always the innermost and srun always the outermost. Which of two kinds of mpirun
/// started the other, nothing tells; the smaller size never speaks against a program that is right.
/// @throw ConfigError where a variable holds no number.
[[nodiscard]] inline std::optional<LauncherSize> launcher_size(
    const EnvLookup& lookup = process_env) {
  if (lookup("TORCHELASTIC_RUN_ID")) {
    if (const auto size = detail::launcher_number(lookup, "WORLD_SIZE")) {
      return LauncherSize{*size, "WORLD_SIZE"};
    }
  }
  const auto open_mpi = detail::open_mpi_size(lookup);
  const auto pmi = detail::pmi_size(lookup);
  if (open_mpi && pmi) {
    return open_mpi->size <= pmi->size ? open_mpi : pmi;
  }
  if (open_mpi || pmi) {
    return open_mpi ? open_mpi : pmi;
  }
  return detail::srun_size(lookup);
}

}  // namespace cohort
