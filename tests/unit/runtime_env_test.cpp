// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cohort/runtime_env.hpp>
#include <cstdlib>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using test::says;
using namespace std::chrono_literals;

namespace {

using Action = EnvSetting::Action;
using Variables = std::map<std::string, std::string>;

EnvLookup from(Variables variables) {
  return [variables = std::move(variables)](const std::string& name) {
    const auto found = variables.find(name);
    return found == variables.end() ? std::nullopt : std::optional<std::string>(found->second);
  };
}

// Takes variables out of the environment for the life of a test case.
class EnvGuard {
 public:
  explicit EnvGuard(std::vector<std::string> names) {
    for (auto& name : names) {
      before_[name] = process_env(name);
      ::unsetenv(name.c_str());
    }
  }
  ~EnvGuard() {
    for (const auto& [name, value] : before_) {
      if (value) {
        ::setenv(name.c_str(), value->c_str(), 1);
      } else {
        ::unsetenv(name.c_str());
      }
    }
  }
  EnvGuard(const EnvGuard&) = delete;
  EnvGuard& operator=(const EnvGuard&) = delete;

 private:
  std::map<std::string, std::optional<std::string>> before_;
};

}  // namespace

TEST_CASE("by default only CUDA's two variables are wanted", "[runtime_env]") {
  const std::vector<EnvSetting> expected = {
      {"CUDA_DEVICE_MAX_CONNECTIONS", "8", std::nullopt, Action::set},
      {"CUDA_MODULE_LOADING", "AUTO", std::nullopt, Action::set}};
  CHECK(plan({}, from({})) == expected);
}

TEST_CASE("each choice wants its variable, and never multicast on", "[runtime_env]") {
  for (const bool multicast : {false, true}) {
    for (const bool exclusive : {false, true}) {
      std::map<std::string, std::string> wanted;
      for (const auto& setting :
           plan({.multicast = multicast, .exclusive_graphs = exclusive}, from({}))) {
        wanted[setting.name] = setting.wanted;
      }
      INFO("multicast " << multicast << " exclusive " << exclusive);
      CHECK(wanted.contains("NCCL_NVLS_ENABLE") == !multicast);
      CHECK(wanted.contains("NCCL_GRAPH_MIXING_SUPPORT") == exclusive);
      for (const auto& [name, value] : wanted) {
        if (name.starts_with("NCCL_")) {
          CHECK(value == "0");
        }
      }
    }
  }
}

TEST_CASE("a value that is set wins, an empty one too", "[runtime_env]") {
  const auto settings = plan({.multicast = false}, from({{"CUDA_DEVICE_MAX_CONNECTIONS", "1"},
                                                         {"CUDA_MODULE_LOADING", ""},
                                                         {"NCCL_NVLS_ENABLE", "0"}}));
  const std::vector<EnvSetting> expected = {{"CUDA_DEVICE_MAX_CONNECTIONS", "8", "1", Action::left},
                                            {"CUDA_MODULE_LOADING", "AUTO", "", Action::left},
                                            {"NCCL_NVLS_ENABLE", "0", "0", Action::left}};
  CHECK(settings == expected);
  CHECK(describe(settings[0]) == "CUDA_DEVICE_MAX_CONNECTIONS=1 left (wanted 8)");
  CHECK(describe(settings[1]) == "CUDA_MODULE_LOADING= left (wanted AUTO)");
  CHECK(describe(settings[2]) == "NCCL_NVLS_ENABLE=0 left");
  CHECK(describe(plan({}, from({}))[1]) == "CUDA_MODULE_LOADING=AUTO set");
}

TEST_CASE("apply sets what is unset, once, and leaves the rest", "[runtime_env]") {
  const EnvGuard guard({"CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_MODULE_LOADING", "NCCL_NVLS_ENABLE",
                        "NCCL_GRAPH_MIXING_SUPPORT"});
  ::setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1", 1);
  const RuntimeEnvOptions options{.multicast = false, .exclusive_graphs = false};

  const auto first = apply(options);
  const std::vector<EnvSetting> expected = {
      {"CUDA_DEVICE_MAX_CONNECTIONS", "8", "1", Action::left},
      {"CUDA_MODULE_LOADING", "AUTO", std::nullopt, Action::set},
      {"NCCL_NVLS_ENABLE", "0", std::nullopt, Action::set}};
  CHECK(first == expected);
  CHECK(process_env("CUDA_DEVICE_MAX_CONNECTIONS") == "1");
  CHECK(process_env("CUDA_MODULE_LOADING") == "AUTO");
  CHECK(process_env("NCCL_NVLS_ENABLE") == "0");
  CHECK_FALSE(process_env("NCCL_GRAPH_MIXING_SUPPORT").has_value());

  for (const auto& setting : apply(options)) {
    CHECK(setting.action == Action::left);
  }
}

TEST_CASE("an environment that is to be left alone is, and told of", "[runtime_env]") {
  const EnvGuard guard({"CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_MODULE_LOADING", "NCCL_NVLS_ENABLE"});
  ::setenv("CUDA_MODULE_LOADING", "EAGER", 1);
  const auto settings = apply({.multicast = false, .leave_alone = true});
  const std::vector<EnvSetting> expected = {
      {"CUDA_DEVICE_MAX_CONNECTIONS", "8", std::nullopt, Action::left},
      {"CUDA_MODULE_LOADING", "AUTO", "EAGER", Action::left},
      {"NCCL_NVLS_ENABLE", "0", std::nullopt, Action::left}};
  CHECK(settings == expected);
  CHECK(describe(settings[0]) == "CUDA_DEVICE_MAX_CONNECTIONS left unset (wanted 8)");
  CHECK(describe(settings[1]) == "CUDA_MODULE_LOADING=EAGER left (wanted AUTO)");
  CHECK_FALSE(process_env("CUDA_DEVICE_MAX_CONNECTIONS").has_value());
  CHECK(process_env("CUDA_MODULE_LOADING") == "EAGER");
  CHECK_FALSE(process_env("NCCL_NVLS_ENABLE").has_value());
}

TEST_CASE("planning does not touch the environment", "[runtime_env]") {
  const EnvGuard guard({"CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_NVLS_ENABLE"});
  (void)plan({.multicast = false});
  CHECK_FALSE(process_env("CUDA_DEVICE_MAX_CONNECTIONS").has_value());
  CHECK_FALSE(process_env("NCCL_NVLS_ENABLE").has_value());
}

TEST_CASE("unset and empty variables give the defaults", "[runtime_env]") {
  const RuntimeSettings defaults = read_settings(from({}));
  CHECK_FALSE(defaults.timeout.has_value());
  CHECK_FALSE(defaults.merge_plan.has_value());
  CHECK_FALSE(defaults.own_max_bytes.has_value());
  CHECK_FALSE(defaults.debug_checks.has_value());
  CHECK_FALSE(defaults.log_level);
  CHECK_FALSE(defaults.wait_notice);
  CHECK_FALSE(defaults.trace_dir);
  CHECK(read_settings(from({{"COHORT_TIMEOUT_MS", ""},
                            {"COHORT_MERGE_PLAN", ""},
                            {"COHORT_OWN_MAX_BYTES", ""},
                            {"COHORT_DEBUG_CHECKS", ""},
                            {"COHORT_LOG", ""},
                            {"COHORT_WAIT_NOTICE", ""},
                            {"COHORT_TRACE_DIR", ""}})) == defaults);
}

TEST_CASE("values are understood", "[runtime_env]") {
  const RuntimeSettings settings = read_settings(from({{"COHORT_TIMEOUT_MS", "250"},
                                                       {"COHORT_MERGE_PLAN", "one_kernel"},
                                                       {"COHORT_OWN_MAX_BYTES", "0"},
                                                       {"COHORT_DEBUG_CHECKS", "1"},
                                                       {"COHORT_LOG", "info"},
                                                       {"COHORT_WAIT_NOTICE", "0"},
                                                       {"COHORT_TRACE_DIR", "/tmp/a b"}}));
  CHECK(settings.timeout == 250ms);
  CHECK(settings.merge_plan == MergePlan::one_kernel);
  CHECK(settings.own_max_bytes == 0);
  CHECK(settings.debug_checks == true);
  CHECK(settings.log_level == LogLevel::info);
  CHECK(settings.wait_notice == 0);
  CHECK(settings.trace_dir == "/tmp/a b");
  CHECK(read_settings(from({{"COHORT_OWN_MAX_BYTES", "9223372036854775807"}})).own_max_bytes ==
        std::numeric_limits<std::int64_t>::max());
}

TEST_CASE("junk is a ConfigError that names variable and value", "[runtime_env]") {
  const std::vector<std::pair<std::string, std::vector<std::string>>> junk = {
      {"COHORT_TIMEOUT_MS",
       {"0", "-1", "+5", " 5", "5 ", "5s", "1e3", "0x10", "86400001", "99999999999999999999",
        "abc"}},
      {"COHORT_WAIT_NOTICE", {"-1", "101", "25%", "often"}},
      {"COHORT_MERGE_PLAN", {"Packed", "one-kernel", "fastest", " staged"}},
      {"COHORT_OWN_MAX_BYTES", {"-1", "64K", "9223372036854775808", "1.5"}},
      {"COHORT_DEBUG_CHECKS", {"2", "true", "yes", "01"}},
      {"COHORT_LOG", {"debug", "INFO", "1"}}};
  for (const auto& [name, values] : junk) {
    for (const auto& value : values) {
      INFO(name << "=" << value);
      CHECK_THROWS_MATCHES(read_settings(from({{name, value}})), ConfigError,
                           says(name, "\"" + value + "\""));
    }
  }
}

TEST_CASE("the process's settings are read once", "[runtime_env]") {
  const EnvGuard guard({"COHORT_TIMEOUT_MS", "COHORT_MERGE_PLAN", "COHORT_OWN_MAX_BYTES",
                        "COHORT_DEBUG_CHECKS", "COHORT_LOG"});
  ::setenv("COHORT_TIMEOUT_MS", "junk", 1);
  CHECK_THROWS_AS(runtime_settings(), ConfigError);
  ::setenv("COHORT_TIMEOUT_MS", "1234", 1);
  CHECK(runtime_settings().timeout == 1234ms);
  ::setenv("COHORT_TIMEOUT_MS", "99", 1);
  CHECK(runtime_settings().timeout == 1234ms);
}

TEST_CASE("NCCL's variables are understood as NCCL does", "[runtime_env]") {
  CHECK(read_nccl_env(from({})).win_enable);
  CHECK_FALSE(read_nccl_env(from({})).cumem_forbidden);
  CHECK_FALSE(read_nccl_env(from({{"NCCL_WIN_ENABLE", "0"}})).win_enable);
  CHECK_FALSE(read_nccl_env(from({{"NCCL_WIN_ENABLE", "0x0"}})).win_enable);
  CHECK(read_nccl_env(from({{"NCCL_WIN_ENABLE", "1"}})).win_enable);
  CHECK(read_nccl_env(from({{"NCCL_WIN_ENABLE", ""}})).win_enable);
  CHECK(read_nccl_env(from({{"NCCL_CUMEM_ENABLE", "0"}})).cumem_forbidden);
  CHECK_FALSE(read_nccl_env(from({{"NCCL_CUMEM_ENABLE", "-2"}})).cumem_forbidden);
  CHECK_FALSE(read_nccl_env(from({{"NCCL_CUMEM_ENABLE", "99999999999999999999"}})).cumem_forbidden);
  CHECK_FALSE(read_nccl_env(from({})).symmetric_asked_for);
  CHECK_FALSE(read_nccl_env(from({{"NCCL_SYM_NOWIN_ENABLE", "0"}})).symmetric_asked_for);
  CHECK_FALSE(read_nccl_env(from({{"NCCL_SYM_KERNEL", ""}})).symmetric_asked_for);
  CHECK(read_nccl_env(from({{"NCCL_SYM_NOWIN_ENABLE", "1"}})).symmetric_asked_for);
  CHECK(read_nccl_env(from({{"NCCL_SYM_KERNEL", "AllGather_ST"}})).symmetric_asked_for);
}

TEST_CASE("the table documents exactly what is read and set", "[runtime_env]") {
  std::set<std::string> used;
  const EnvLookup recorder = [&used](const std::string& name) -> std::optional<std::string> {
    used.insert(name);
    return std::nullopt;
  };
  (void)plan({.multicast = false, .exclusive_graphs = true}, recorder);
  const std::set<std::string> set = std::exchange(used, {});
  (void)read_settings(recorder);
  (void)read_nccl_env(recorder);

  std::set<std::string> documented_set;
  std::set<std::string> documented_read;
  for (const auto& variable : kEnvVariables) {
    auto& names =
        variable.use == EnvVariable::Use::set_when_unset ? documented_set : documented_read;
    CHECK(names.insert(std::string(variable.name)).second);
    CHECK_FALSE(variable.values.empty());
    CHECK_FALSE(variable.default_value.empty());
    CHECK_FALSE(variable.meaning.empty());
  }
  CHECK(set == documented_set);
  CHECK(used == documented_read);
}
