#include "cohort/cuda/device_choice.hpp"

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

}  // namespace

TEST_CASE("the launcher's local rank is found", "[device_choice]") {
  CHECK_FALSE(local_rank(env({})).has_value());
  CHECK(local_rank(env({{"OMPI_COMM_WORLD_LOCAL_RANK", "3"}})) == 3);
  CHECK(local_rank(env({{"SLURM_LOCALID", "2"}, {"LOCAL_RANK", "5"}})) == 2);
  CHECK(local_rank(env({{"LOCAL_RANK", "0"}})) == 0);
  CHECK(local_rank(env({{"SLURM_LOCALID", ""}, {"LOCAL_RANK", "1"}})) == 1);
  CHECK_THROWS_MATCHES(local_rank(env({{"LOCAL_RANK", "first"}})), ConfigError,
                       says("LOCAL_RANK", "first"));
}

TEST_CASE("of launchers in each other, the innermost knows the local rank", "[device_choice]") {
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

TEST_CASE("local ranks go round the visible devices", "[device_choice]") {
  CHECK(choose_device({}, 0, 8) == 0);
  CHECK(choose_device({}, 7, 8) == 7);
  CHECK(choose_device({}, 7, 1) == 0);  // one visible card per process
  CHECK(choose_device({}, 5, 2) == 1);  // several processes per card
  CHECK(choose_device({}, {}, 4) == 0);
}

TEST_CASE("a device that was asked for wins, or does not exist", "[device_choice]") {
  CHECK(choose_device(2, 0, 4) == 2);
  CHECK_THROWS_MATCHES(choose_device(4, 0, 4), ConfigError, says("device", "0 to 3", "4"));
  CHECK_THROWS_MATCHES(choose_device(-1, 0, 4), ConfigError, says("device", "-1"));
  CHECK_THROWS_MATCHES(choose_device({}, 0, 0), ConfigError, says("no CUDA device"));
}
