// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <array>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "cohort/error.hpp"
#include "cohort/log.hpp"
#include "cohort/merge_plan.hpp"
#include "cohort/process_state.hpp"

/// \file
/// Every environment variable that the library sets or reads, in one table, but for those in which
/// launchers tell a rank its place (launcher.hpp), and the only code that sets one. A value that is
/// already set always wins.
///
/// CUDA and NCCL read their variables once, when they start, so `apply` must run before the first
/// call of either, and before the process has threads (`setenv` races with their `getenv`).

namespace cohort {

/// One row of the documentation below.
struct EnvVariable {
  /// What the library does with a variable.
  enum class Use : std::uint8_t {
    set_when_unset,  ///< `apply` sets it unless it is set; CUDA or NCCL reads it.
    read_by_cohort,  ///< The library reads it.
  };

  std::string_view name;           ///< As in the environment.
  Use use;                         ///< Set or read.
  std::string_view values;         ///< What may be given.
  std::string_view default_value;  ///< What holds while it is unset and `apply` leaves it unset.
  std::string_view meaning;        ///< What it decides.
};

/// Everything that is set or read.
inline constexpr std::array kEnvVariables = {
    EnvVariable{"CUDA_DEVICE_MAX_CONNECTIONS", EnvVariable::Use::set_when_unset, "1 to 32",
                "CUDA's own, 8",
                "Hardware queues that streams share. Set to 8: a smaller value inherited from a "
                "launcher makes independent streams wait for each other."},
    EnvVariable{"CUDA_MODULE_LOADING", EnvVariable::Use::set_when_unset, "LAZY, EAGER, AUTO",
                "CUDA's own",
                "When kernels are loaded. Set to AUTO, which leaves the choice to CUDA, so that no "
                "other library in the process picks for the engine."},
    EnvVariable{"NCCL_NVLS_ENABLE", EnvVariable::Use::set_when_unset, "0, 1, 2",
                "NCCL's own, which probes",
                "NVLink multicast. Set to 0 when the user turns multicast off; never set to 1, "
                "which would skip NCCL's probe."},
    EnvVariable{"NCCL_GRAPH_MIXING_SUPPORT", EnvVariable::Use::set_when_unset, "0, 1",
                "NCCL's own, 1",
                "Whether a communicator may mix graph launches with eager calls. Set to 0 when the "
                "user chooses exclusive graphs."},
    EnvVariable{"NCCL_WIN_ENABLE", EnvVariable::Use::read_by_cohort, "0, 1", "1",
                "0 turns NCCL's windows off; the policy then refuses them with this reason."},
    EnvVariable{"NCCL_CUMEM_ENABLE", EnvVariable::Use::read_by_cohort, "0, 1, -2",
                "-2, NCCL probes the driver",
                "0 makes ncclMemAlloc fall back to cudaMalloc; windows are refused then."},
    EnvVariable{
        "NCCL_SYM_NOWIN_ENABLE", EnvVariable::Use::read_by_cohort, "0, 1", "0",
        "1 lets NCCL take symmetric kernels without windows too, from 2.29.2 on; such calls "
        "are then guarded as well."},
    EnvVariable{"NCCL_SYM_KERNEL", EnvVariable::Use::read_by_cohort, "a kernel's name",
                "NCCL's cost model",
                "Makes NCCL take one symmetric kernel, from 2.29.2 on without windows too; guarded "
                "as well."},
    EnvVariable{"NCCL_HOSTID", EnvVariable::Use::read_by_cohort, "any text",
                "host name and boot id",
                "What NCCL takes for the host's identity; ranks that differ in it are on different "
                "hosts for windows, never for peer mapping."},
    EnvVariable{"COHORT_TIMEOUT_MS", EnvVariable::Use::read_by_cohort, "1 to 86400000",
                "what the program asks for, or 60000",
                "Time limit of a control-plane operation, milliseconds."},
    EnvVariable{"COHORT_MERGE_PLAN", EnvVariable::Use::read_by_cohort,
                "automatic, staged, packed, one_kernel", "the plan that the program asks for",
                "Replaces the program's merge plan. Must be equal on all ranks."},
    EnvVariable{"COHORT_OWN_MAX_BYTES", EnvVariable::Use::read_by_cohort, "0 to 2^63-1",
                "the backend's measured threshold",
                "Largest message, total bytes, that the library's own small collectives take; 0 "
                "turns them off. Must be equal on all ranks."},
    EnvVariable{"COHORT_DEBUG_CHECKS", EnvVariable::Use::read_by_cohort, "0, 1",
                "what the program asks for, or 0",
                "1 compares each collective's arguments across ranks before the call."},
    EnvVariable{"COHORT_LOG", EnvVariable::Use::read_by_cohort, "info, warning, error", "warning",
                "Lowest level of the messages that are passed on."},
    EnvVariable{"COHORT_WAIT_NOTICE", EnvVariable::Use::read_by_cohort, "0 to 100", "25",
                "Share of its time limit, in percent, after which a wait for other ranks says once "
                "whom it misses in which call; 0 for never."},
    EnvVariable{
        "COHORT_TRACE_DIR", EnvVariable::Use::read_by_cohort, "a folder",
        "what the program asks for, or none",
        "Where each rank writes its last calls when a call has failed; see trace_writer.hpp "
        "and cohort_trace."},
};

/// Gives a variable's value, or nothing while it is unset. Tests bring their own.
using EnvLookup = std::function<std::optional<std::string>(const std::string& name)>;

/// The process's environment.
[[nodiscard]] inline std::optional<std::string> process_env(const std::string& name) {
  const char* value = std::getenv(name.c_str());
  return value == nullptr ? std::nullopt : std::optional<std::string>(value);
}

// ---------------------------------------------------------------------------------------------
// What is set

/// The user's choices that reach CUDA and NCCL through variables.
struct RuntimeEnvOptions {
  /// `false` turns NVLink multicast off; `true` leaves it to NCCL's probe.
  bool multicast = true;
  /// The program promises never to run an eager call on a communicator while a graph launch that
  /// uses it is outstanding, nor two unordered graphs. Off by default: decode in graphs with eager
  /// prefill breaks the promise.
  bool exclusive_graphs = false;
  /// Nothing is set, whatever is asked for above: for a process in which CUDA has started, so that
  /// it no longer reads its variables, and threads run, with whose `getenv` setting one races. An
  /// engine that wants multicast off or exclusive graphs sets their variables before.
  bool leave_alone = false;
};

/// One variable that the library wants set.
struct EnvSetting {
  /// What `apply` did: set it, or left what was set.
  enum class Action : std::uint8_t { set, left };

  std::string name;                     ///< The variable.
  std::string wanted;                   ///< What the library would set.
  std::optional<std::string> existing;  ///< The value that was there; an empty one counts as set.
  Action action = Action::set;          ///< `left` where there was a value, or all was to be left.

  friend bool operator==(const EnvSetting&, const EnvSetting&) = default;
};

/// "set" or "left".
[[nodiscard]] constexpr std::string_view to_string(EnvSetting::Action action) noexcept {
  return action == EnvSetting::Action::set ? "set" : "left";
}

/// What `apply` would do, in the order of the table. NCCL's configuration files are not looked at:
/// for NCCL the environment comes before them.
[[nodiscard]] inline std::vector<EnvSetting> plan(const RuntimeEnvOptions& options,
                                                  const EnvLookup& lookup = process_env) {
  std::vector<EnvSetting> settings;
  const auto want = [&](const char* name, const char* value) {
    auto existing = lookup(name);
    const auto action =
        existing || options.leave_alone ? EnvSetting::Action::left : EnvSetting::Action::set;
    settings.push_back({name, value, std::move(existing), action});
  };
  want("CUDA_DEVICE_MAX_CONNECTIONS", "8");
  want("CUDA_MODULE_LOADING", "AUTO");
  if (!options.multicast) {
    want("NCCL_NVLS_ENABLE", "0");
  }
  if (options.exclusive_graphs) {
    want("NCCL_GRAPH_MIXING_SUPPORT", "0");
  }
  return settings;
}

/// Sets what is unset in the process's environment. Local; call it before CUDA and NCCL start and
/// before the process has threads. Calling it again changes nothing.
///
/// @return `plan`'s list: what was set and what was left.
/// @throw TransportError if the system has no memory for a variable.
inline std::vector<EnvSetting> apply(const RuntimeEnvOptions& options) {
  auto settings = plan(options);
  for (const EnvSetting& setting : settings) {
    if (setting.action == EnvSetting::Action::left) {
      continue;
    }
    if (::setenv(setting.name.c_str(), setting.wanted.c_str(), 0) != 0) {
      const int code = errno;
      throw TransportError({.call = "setenv", .native_code = code},
                           setting.name + ": " + std::generic_category().message(code));
    }
  }
  return settings;
}

/// "NCCL_NVLS_ENABLE=1 left (wanted 0)", "NCCL_NVLS_ENABLE left unset (wanted 0)" or
/// "CUDA_MODULE_LOADING=AUTO set".
[[nodiscard]] inline std::string describe(const EnvSetting& setting) {
  if (setting.action == EnvSetting::Action::set) {
    return fmt::format("{}={} set", setting.name, setting.wanted);
  }
  if (!setting.existing) {
    return fmt::format("{} left unset (wanted {})", setting.name, setting.wanted);
  }
  const auto& existing = *setting.existing;
  return existing == setting.wanted
             ? fmt::format("{}={} left", setting.name, existing)
             : fmt::format("{}={} left (wanted {})", setting.name, existing, setting.wanted);
}

// ---------------------------------------------------------------------------------------------
// What is read

/// The library's own variables, parsed.
struct RuntimeSettings {
  std::optional<std::chrono::milliseconds> timeout;  ///< COHORT_TIMEOUT_MS
  std::optional<MergePlan> merge_plan;               ///< COHORT_MERGE_PLAN
  std::optional<std::int64_t> own_max_bytes;         ///< COHORT_OWN_MAX_BYTES
  std::optional<bool> debug_checks;                  ///< COHORT_DEBUG_CHECKS
  std::optional<LogLevel> log_level;                 ///< COHORT_LOG
  std::optional<int> wait_notice;                    ///< COHORT_WAIT_NOTICE
  std::optional<std::string> trace_dir;              ///< COHORT_TRACE_DIR

  friend bool operator==(const RuntimeSettings&, const RuntimeSettings&) = default;
};

/// A decimal integer without sign, spaces or suffix.
/// @throw ConfigError naming the variable, the range and the text.
[[nodiscard]] inline std::int64_t parse_env_integer(std::string_view name, std::string_view text,
                                                    std::int64_t min, std::int64_t max) {
  std::int64_t value = 0;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  const bool starts_with_digit = !text.empty() && text.front() >= '0' && text.front() <= '9';
  if (!starts_with_digit || error != std::errc{} || stop != end || value < min || value > max) {
    throw ConfigError(
        fmt::format("{}: expected an integer from {} to {}, got \"{}\"", name, min, max, text));
  }
  return value;
}

/// "0" or "1".
/// @throw ConfigError naming the variable and the text.
[[nodiscard]] inline bool parse_env_flag(std::string_view name, std::string_view text) {
  if (text != "0" && text != "1") {
    throw ConfigError(fmt::format("{}: expected 0 or 1, got \"{}\"", name, text));
  }
  return text == "1";
}

/// The name of a merge plan.
/// @throw ConfigError naming the variable and the text.
[[nodiscard]] inline MergePlan parse_env_merge_plan(std::string_view name, std::string_view text) {
  if (const auto plan = merge_plan_from_string(text)) {
    return *plan;
  }
  throw ConfigError(
      fmt::format("{}: expected automatic, staged, packed or one_kernel, got \"{}\"", name, text));
}

/// The name of a log level.
/// @throw ConfigError naming the variable and the text.
[[nodiscard]] inline LogLevel parse_env_log_level(std::string_view name, std::string_view text) {
  for (const LogLevel level : {LogLevel::info, LogLevel::warning, LogLevel::error}) {
    if (text == to_string(level)) {
      return level;
    }
  }
  throw ConfigError(fmt::format("{}: expected info, warning or error, got \"{}\"", name, text));
}

/// Parses the library's own variables. An empty value counts as unset.
/// @throw ConfigError if a value cannot be understood.
[[nodiscard]] inline RuntimeSettings read_settings(const EnvLookup& lookup) {
  RuntimeSettings settings;
  const auto with = [&lookup](const char* name, const auto& use) {
    if (const auto text = lookup(name); text && !text->empty()) {
      use(name, *text);
    }
  };
  with("COHORT_TIMEOUT_MS", [&](auto name, const auto& text) {
    constexpr std::int64_t kDay = 86'400'000;
    settings.timeout = std::chrono::milliseconds(parse_env_integer(name, text, 1, kDay));
  });
  with("COHORT_MERGE_PLAN", [&](auto name, const auto& text) {
    settings.merge_plan = parse_env_merge_plan(name, text);
  });
  with("COHORT_OWN_MAX_BYTES", [&](auto name, const auto& text) {
    settings.own_max_bytes =
        parse_env_integer(name, text, 0, std::numeric_limits<std::int64_t>::max());
  });
  with("COHORT_DEBUG_CHECKS",
       [&](auto name, const auto& text) { settings.debug_checks = parse_env_flag(name, text); });
  with("COHORT_LOG",
       [&](auto name, const auto& text) { settings.log_level = parse_env_log_level(name, text); });
  with("COHORT_WAIT_NOTICE", [&](auto name, const auto& text) {
    settings.wait_notice = static_cast<int>(parse_env_integer(name, text, 0, 100));
  });
  with("COHORT_TRACE_DIR", [&](auto, const auto& text) { settings.trace_dir = text; });
  return settings;
}

/// NCCL's variables that bear on windows, understood as NCCL does.
struct NcclEnv {
  bool win_enable = true;            ///< NCCL_WIN_ENABLE is not 0.
  bool cumem_forbidden = false;      ///< NCCL_CUMEM_ENABLE is 0; otherwise the driver decides.
  bool symmetric_asked_for = false;  ///< NCCL_SYM_NOWIN_ENABLE is not 0, or NCCL_SYM_KERNEL is set.
  std::optional<std::string> host_id = {};  ///< NCCL_HOSTID
};

/// Reads them. NCCL takes an integer of any C notation and falls back to its default for an empty
/// or overflowing value, so nothing here is an error.
/// Source: `ncclLoadParam` in NCCL's misc/param.cc.
[[nodiscard]] inline NcclEnv read_nccl_env(const EnvLookup& lookup = process_env) {
  const auto value = [&lookup](const char* name, long long otherwise) {
    const auto text = lookup(name);
    if (!text || text->empty()) {
      return otherwise;
    }
    errno = 0;
    const long long number = std::strtoll(text->c_str(), nullptr, 0);
    return errno == 0 ? number : otherwise;
  };
  return {.win_enable = value("NCCL_WIN_ENABLE", 1) != 0,
          .cumem_forbidden = value("NCCL_CUMEM_ENABLE", 1) == 0,
          .symmetric_asked_for = value("NCCL_SYM_NOWIN_ENABLE", 0) != 0 ||
                                 !lookup("NCCL_SYM_KERNEL").value_or("").empty(),
          .host_id = lookup("NCCL_HOSTID")};
}

/// The process's settings, read at the first call and constant afterwards. Thread-safe.
/// @throw ConfigError if a value cannot be understood; the next call then reads again.
[[nodiscard]] inline const RuntimeSettings& runtime_settings() {
  return detail::process_wide<const RuntimeSettings>("runtime settings 2", [] {
    return std::make_unique<RuntimeSettings>(read_settings(process_env));
  });
}

}  // namespace cohort
