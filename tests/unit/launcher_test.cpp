// SPDX-License-Identifier: Apache-2.0
#include "cohort/launcher.hpp"

#include <map>
#include <optional>
#include <string>

#include "support/catch.hpp"

using namespace cohort;
using cohort::test::says;

namespace {

EnvLookup env(std::map<std::string, std::string> values) {
  return [values = std::move(values)](const std::string& name) -> std::optional<std::string> {
    const auto found = values.find(name);
    return found == values.end() ? std::nullopt : std::optional(found->second);
  };
}

// "4 by PMI_SIZE", or "".
std::string started(std::map<std::string, std::string> values) {
  const auto found = launcher_size(env(std::move(values)));
  return found ? std::to_string(found->size) + " by " + found->variable : "";
}

}  // namespace

TEST_CASE("the launcher's local rank is found", "[launcher]") {
  CHECK_FALSE(local_rank(env({})).has_value());
  CHECK(local_rank(env({{"OMPI_COMM_WORLD_LOCAL_RANK", "3"}})) == 3);
  CHECK(local_rank(env({{"SLURM_LOCALID", "2"}, {"LOCAL_RANK", "5"}})) == 2);
  CHECK(local_rank(env({{"LOCAL_RANK", "0"}})) == 0);
  CHECK(local_rank(env({{"SLURM_LOCALID", ""}, {"LOCAL_RANK", "1"}})) == 1);
  CHECK_THROWS_MATCHES(local_rank(env({{"LOCAL_RANK", "first"}})), ConfigError,
                       says("LOCAL_RANK", "first"));
}

TEST_CASE("of launchers in each other, the innermost knows the local rank", "[launcher]") {
  CHECK(local_rank(
            env({{"SLURM_LOCALID", "0"}, {"LOCAL_RANK", "3"}, {"TORCHELASTIC_RUN_ID", "x"}})) == 3);
  CHECK(local_rank(env({{"OMPI_COMM_WORLD_LOCAL_RANK", "0"},
                        {"LOCAL_RANK", "3"},
                        {"TORCHELASTIC_RUN_ID", "x"}})) == 3);
  CHECK(local_rank(env({{"SLURM_LOCALID", "0"}, {"OMPI_COMM_WORLD_LOCAL_RANK", "3"}})) == 3);
  CHECK(local_rank(env({{"SLURM_LOCALID", "2"}, {"TORCHELASTIC_RUN_ID", "x"}})) == 2);
  CHECK(local_rank(env({{"PALS_LOCAL_RANKID", "2"}})) == 2);
  CHECK(local_rank(env({{"FLUX_TASK_LOCAL_ID", "4"}})) == 4);
}

TEST_CASE("each launcher says how many processes it started", "[launcher]") {
  CHECK(started({}).empty());
  CHECK(started({{"OMPI_COMM_WORLD_SIZE", "4"}, {"PMIX_RANK", "0"}}) ==
        "4 by OMPI_COMM_WORLD_SIZE");
  CHECK(started({{"PMI_SIZE", "4"}, {"PMI_RANK", "1"}, {"PMI_FD", "7"}}) == "4 by PMI_SIZE");
  CHECK(started({{"PMI_SIZE", "4"}, {"PMI_RANK", "1"}, {"PMI_PORT", "h:1"}}) == "4 by PMI_SIZE");
  CHECK(started({{"PMI_SIZE", "4"}, {"PMI_RANK", "1"}, {"PMI_CONTROL_PORT", "1"}}) ==
        "4 by PMI_SIZE");
  CHECK(started({{"SLURM_STEP_NUM_TASKS", "4"}, {"SLURM_STEP_ID", "0"}, {"SLURM_PROCID", "3"}}) ==
        "4 by SLURM_STEP_NUM_TASKS");
  CHECK(started({{"SLURM_NTASKS", "4"}, {"SLURM_STEP_ID", "0"}, {"SLURM_PROCID", "3"}}) ==
        "4 by SLURM_NTASKS");
  CHECK(started({{"WORLD_SIZE", "4"}, {"TORCHELASTIC_RUN_ID", "x"}}) == "4 by WORLD_SIZE");
  CHECK_THROWS_MATCHES(started({{"OMPI_COMM_WORLD_SIZE", "four"}, {"PMIX_RANK", "0"}}), ConfigError,
                       says("OMPI_COMM_WORLD_SIZE", "four"));
}

TEST_CASE("a size that another level left says nothing", "[launcher]") {
  CHECK(started({{"WORLD_SIZE", "4"}}).empty());  // the engine's own
  CHECK(started({{"OMPI_COMM_WORLD_SIZE", "4"}, {"OMPI_COMM_WORLD_RANK", "1"}}).empty());
  CHECK(started({{"PMI_SIZE", "4"}, {"PMI_RANK", "1"}}).empty());
  CHECK(started({{"PMI_SIZE", "4"}, {"PMI_FD", "7"}}).empty());
  CHECK(started({{"PMI_SIZE", ""}, {"PMI_RANK", "1"}, {"PMI_FD", "7"}}).empty());
  // The shell of salloc, as a step of its own too, and the script of sbatch.
  CHECK(started({{"SLURM_NTASKS", "4"}}).empty());
  CHECK(started({{"SLURM_NTASKS", "4"}, {"SLURM_PROCID", "0"}}).empty());
  for (const char* own : {"4294967290", "4294967291"}) {
    CHECK(started({{"SLURM_NTASKS", "4"}, {"SLURM_STEP_ID", own}, {"SLURM_PROCID", "0"}}).empty());
  }
}

TEST_CASE("of launchers in each other, the innermost knows the size", "[launcher]") {
  const std::map<std::string, std::string> srun = {
      {"SLURM_STEP_NUM_TASKS", "2"}, {"SLURM_STEP_ID", "0"}, {"SLURM_PROCID", "0"}};
  auto both = srun;
  both.insert({{"OMPI_COMM_WORLD_SIZE", "8"}, {"PMIX_RANK", "0"}});
  CHECK(started(both) == "8 by OMPI_COMM_WORLD_SIZE");
  both.insert({{"WORLD_SIZE", "16"}, {"TORCHELASTIC_RUN_ID", "x"}});
  CHECK(started(both) == "16 by WORLD_SIZE");
  both = srun;
  both.insert({{"PMI_SIZE", "1"}, {"PMI_RANK", "0"}, {"PMI_FD", "7"}});
  CHECK(started(both) == "1 by PMI_SIZE");
  both.insert({{"OMPI_COMM_WORLD_SIZE", "8"}, {"PMIX_RANK", "0"}});
  CHECK(started(both) == "1 by PMI_SIZE");
  both["PMI_SIZE"] = "9";
  CHECK(started(both) == "8 by OMPI_COMM_WORLD_SIZE");
}
