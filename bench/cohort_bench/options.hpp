// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cohort/dtype.hpp"
#include "cohort/error.hpp"
#include "cohort/symmetric_policy.hpp"
#include "command_line/command_line.hpp"
#include "option_words.hpp"

/// \file
/// The benchmark's command line. Pure.

namespace cohort::bench {

enum class Bench : std::uint8_t {
  ceiling,
  all_gather,
  reduce_scatter,
  all_reduce,
  all_gather_dim,
  all_reduce_norm,
  gather_query,
  dcp_merge,
  merge_by_token,
  merge_replicated,
  merge_splits,
  merge_sink,
  gather_quantised,
  place_step,
  decode_step,
  arena,
  scope,
  recorder,
  registration,
  formation,
};

/// Who moves the bytes, and in which memory.
enum class Path : std::uint8_t {
  raw,            ///< The bare NCCL or MPI call, without Cohort.
  shared_loop,    ///< On the host, the loop over shared memory that engines have of their own.
  raw_symmetric,  ///< The bare NCCL call in registered buffers, without Cohort's visibility guard.
  plain,          ///< Cohort over the library's transport, buffers outside windows.
  symmetric,      ///< Cohort over the library's transport, buffers inside windows.
  compared,       ///< The same, where the ranks compare the buffers' places before eager calls.
  own,            ///< Cohort's own kernels over peer mappings.
};

/// How a merge is carried out.
enum class Plan : std::uint8_t { staged, staged_fp32, packed, one_kernel };

enum class Mode : std::uint8_t {
  eager,
  graph,
  issue,  ///< Eager calls of which only the host's time counts, until the last has returned.
};

/// What becomes of a call's inputs between two calls of it.
enum class Inputs : std::uint8_t {
  written,  ///< Each rank writes all of them before each call, as what produces them does.
  kept,     ///< Nobody writes to them, so that caches of peers keep what they have read.
};

inline constexpr std::array kBenches = {
    Named{Bench::ceiling, "ceiling"},
    Named{Bench::all_gather, "all_gather"},
    Named{Bench::reduce_scatter, "reduce_scatter"},
    Named{Bench::all_reduce, "all_reduce"},
    Named{Bench::all_gather_dim, "all_gather_dim"},
    Named{Bench::all_reduce_norm, "all_reduce_norm"},
    Named{Bench::gather_query, "gather_query"},
    Named{Bench::dcp_merge, "dcp_merge"},
    Named{Bench::merge_by_token, "merge_by_token"},
    Named{Bench::merge_replicated, "merge_replicated"},
    Named{Bench::merge_splits, "merge_splits"},
    Named{Bench::merge_sink, "merge_sink"},
    Named{Bench::gather_quantised, "gather_quantised"},
    Named{Bench::place_step, "place_step"},
    Named{Bench::decode_step, "decode_step"},
    Named{Bench::arena, "arena"},
    Named{Bench::scope, "scope"},
    Named{Bench::recorder, "recorder"},
    Named{Bench::registration, "registration"},
    Named{Bench::formation, "formation"},
};
inline constexpr std::array kPaths = {
    Named{Path::raw, "raw"},
    Named{Path::shared_loop, "shared_loop"},
    Named{Path::raw_symmetric, "raw_symmetric"},
    Named{Path::plain, "plain"},
    Named{Path::symmetric, "symmetric"},
    Named{Path::compared, "compared"},
    Named{Path::own, "own"},
};
inline constexpr std::array kPlans = {
    Named{Plan::staged, "staged"},
    Named{Plan::staged_fp32, "staged_fp32"},
    Named{Plan::packed, "packed"},
    Named{Plan::one_kernel, "one_kernel"},
};
inline constexpr std::array kModes = {Named{Mode::eager, "eager"}, Named{Mode::graph, "graph"},
                                      Named{Mode::issue, "issue"}};
inline constexpr std::array kInputs = {Named{Inputs::written, "written"},
                                       Named{Inputs::kept, "kept"}};
inline constexpr std::array kDTypes = {Named{DType::f32, "f32"}, Named{DType::f16, "f16"},
                                       Named{DType::bf16, "bf16"}};
inline constexpr std::array kBackends = {Named{BackendKind::host, "host"},
                                         Named{BackendKind::cuda, "cuda"}};

[[nodiscard]] constexpr std::string_view to_string(Bench value) {
  return detail::name_in(kBenches, value);
}
[[nodiscard]] constexpr std::string_view to_string(Path value) {
  return detail::name_in(kPaths, value);
}
[[nodiscard]] constexpr std::string_view to_string(Plan value) {
  return detail::name_in(kPlans, value);
}
[[nodiscard]] constexpr std::string_view to_string(Mode value) {
  return detail::name_in(kModes, value);
}
[[nodiscard]] constexpr std::string_view to_string(Inputs value) {
  return detail::name_in(kInputs, value);
}

struct Options {
  std::vector<Bench> benches = detail::values(kBenches);
  BackendKind backend = BackendKind::host;
  /// `compared` only where it is asked for.
  std::vector<Path> paths = {Path::raw,   Path::shared_loop, Path::raw_symmetric,
                             Path::plain, Path::symmetric,   Path::own};
  std::vector<Plan> plans = detail::values(kPlans);
  /// `issue` only where it is asked for.
  std::vector<Mode> modes = {Mode::eager, Mode::graph};
  std::int64_t min_bytes = std::int64_t{2} << 10;
  std::int64_t max_bytes = std::int64_t{4} << 20;
  std::int64_t factor = 2;
  std::vector<std::int64_t> batches = {1, 4, 16, 64, 128};
  std::int64_t heads = 128;
  std::int64_t head_dim = 512;
  std::int64_t rope = 64;
  std::int64_t unabsorbed = 128;
  std::int64_t layers = 61;
  std::int64_t hidden = 7168;
  std::int64_t context = 128 << 10;
  std::vector<DType> dtypes;  ///< Empty: f32 on the host, where MPI has no 16-bit sums; else bf16.
  /// `written` on the host by default; on cards `kept`, which keep no line of a peer's memory.
  std::optional<Inputs> inputs;
  int iters = 200;
  int warmup = 5;
  std::optional<std::int64_t> sample_calls;  ///< Of a sample; else as many as take long enough.
  std::int64_t max_seconds = 10;
  bool check = false;
  bool goals = false;
  bool help = false;
  std::string json;

  [[nodiscard]] bool has(Bench bench) const noexcept { return contains(benches, bench); }
  [[nodiscard]] bool has(Path path) const noexcept { return contains(paths, path); }
  [[nodiscard]] bool has(Plan plan) const noexcept { return contains(plans, plan); }
  [[nodiscard]] bool has(Mode mode) const noexcept { return contains(modes, mode); }

  /// min_bytes, min_bytes * factor, ... up to and including max_bytes.
  [[nodiscard]] std::vector<std::int64_t> sizes() const {
    std::vector<std::int64_t> all;
    for (std::int64_t bytes = min_bytes; bytes <= max_bytes; bytes *= factor) {
      all.push_back(bytes);
      if (bytes > max_bytes / factor) {
        break;
      }
    }
    return all;
  }

 private:
  template <class T>
  static bool contains(const std::vector<T>& set, T value) noexcept {
    return std::find(set.begin(), set.end(), value) != set.end();
  }
};

/// What --help prints.
[[nodiscard]] inline std::string usage() {
  const auto line = [](std::string_view option, const std::string& text) {
    return fmt::format("  {:<22}{}\n", option, text);
  };
  return "Measures Cohort and the library under it side by side: bench/README.md says what and "
         "how.\n\n"
         "  mpirun -n 2 cohort_bench --bench all_gather,dcp_merge --check --json rows.json\n\n" +
         line("--bench LIST", "all, or of " + detail::names(kBenches, ",")) +
         line("--backend NAME", "host (default) or cuda") +
         line("--paths LIST", detail::names(kPaths, ",")) +
         line("--plans LIST", detail::names(kPlans, ",")) +
         line("--modes LIST", detail::names(kModes, ",")) +
         line("--min-bytes SIZE",
              "smallest payload of the collectives, 2K; K, M and G are binary") +
         line("--max-bytes SIZE", "largest payload, 4M") +
         line("--factor N", "from one payload to the next, 2") +
         line("--batches LIST", "queries of a decode step, 1,4,16,64,128") +
         line("--heads N", "query heads of all ranks, 128") +
         line("--head-dim N", "elements of a head's latent query and of its output, 512") +
         line("--rope N", "elements of a head's rotary query, 64") +
         line("--unabsorbed N", "of a head's query and value in decode_step_unabsorbed, 128") +
         line("--layers N", "of the model of decode_step, 61") +
         line("--hidden N", "its hidden size, 7168") +
         line("--context N", "tokens of each sequence in its KV cache, 131072") +
         line("--dtype LIST", "of f32,f16,bf16; f32 on the host and bf16 on cuda by default") +
         line("--inputs NAME",
              "written before each call by its rank, the default on the host, or kept") +
         line("--iters N", "samples of each row, 200") +
         line("--warmup N", "calls before them, 5") +
         line("--sample-calls N",
              "calls of each sample; by default as many as take a millisecond") +
         line("--max-seconds N",
              "most that one group of rows may take, 10; it then has fewer "
              "samples") +
         line("--check", "compare every row's results with what they must be") +
         line("--goals", "then print the project's goals with what this run reached") +
         line("--json FILE", "write rows as JSON lines") + line("--help", "this text");
}

namespace detail {

/// Sets one option that has a value. Returns false for an unknown option.
inline bool set_option(Options& options, std::string_view option, std::string_view value) {
  constexpr std::int64_t kMax = std::int64_t{1} << 31;
  const auto count = [&](std::int64_t min) { return parse_count(option, value, min, kMax); };
  if (option == "--bench") {
    options.benches = parse_names(option, value, kBenches);
  } else if (option == "--backend") {
    options.backend = parse_name(option, value, kBackends);
  } else if (option == "--paths") {
    options.paths = parse_names(option, value, kPaths);
  } else if (option == "--plans") {
    options.plans = parse_names(option, value, kPlans);
  } else if (option == "--modes") {
    options.modes = parse_names(option, value, kModes);
  } else if (option == "--dtype") {
    options.dtypes = parse_names(option, value, kDTypes);
  } else if (option == "--inputs") {
    options.inputs = parse_name(option, value, kInputs);
  } else if (option == "--min-bytes") {
    options.min_bytes = parse_size(option, value);
  } else if (option == "--max-bytes") {
    options.max_bytes = parse_size(option, value);
  } else if (option == "--factor") {
    options.factor = count(2);
  } else if (option == "--batches") {
    options.batches.clear();
    for (const auto part : split_list(value)) {
      options.batches.push_back(parse_count(option, part, 1, 1 << 20));
    }
  } else if (option == "--heads") {
    options.heads = count(1);
  } else if (option == "--head-dim") {
    options.head_dim = count(1);
  } else if (option == "--rope") {
    options.rope = count(1);
  } else if (option == "--unabsorbed") {
    options.unabsorbed = count(1);
  } else if (option == "--layers") {
    options.layers = count(1);
  } else if (option == "--hidden") {
    options.hidden = count(1);
  } else if (option == "--context") {
    options.context = count(1);
  } else if (option == "--iters") {
    options.iters = static_cast<int>(parse_count(option, value, 1, 1'000'000));
  } else if (option == "--warmup") {
    options.warmup = static_cast<int>(parse_count(option, value, 1, 1'000'000));
  } else if (option == "--sample-calls") {
    options.sample_calls = parse_count(option, value, 1, 1'000);
  } else if (option == "--max-seconds") {
    options.max_seconds = parse_count(option, value, 1, 86'400);
  } else if (option == "--json") {
    options.json = value;
  } else {
    return false;
  }
  return true;
}

}  // namespace detail

/// The arguments after the program's name. Options and values are separated by a space or by '='.
/// @throw ConfigError naming the option, what was expected and what came.
[[nodiscard]] inline Options parse_options(std::span<const std::string> arguments) {
  Options options;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    std::string_view option = arguments[i];
    if (option == "--check") {
      options.check = true;
      continue;
    }
    if (option == "--goals") {
      options.goals = true;
      continue;
    }
    if (option == "--help") {
      options.help = true;
      continue;
    }
    std::string_view value;
    if (const auto equals = option.find('='); equals != std::string_view::npos) {
      value = option.substr(equals + 1);
      option = option.substr(0, equals);
    } else if (i + 1 < arguments.size()) {
      value = arguments[++i];
    } else {
      const auto known = tools::options_in(usage());
      throw ConfigError(std::find(known.begin(), known.end(), option) == known.end()
                            ? tools::no_such_option(option, usage())
                            : fmt::format("{}: expected a value", option));
    }
    if (!detail::set_option(options, option, value)) {
      throw ConfigError(tools::no_such_option(option, usage()));
    }
  }
  if (options.max_bytes < options.min_bytes) {
    throw ConfigError(fmt::format("--max-bytes: expected at least --min-bytes, {}, got {}",
                                  options.min_bytes, options.max_bytes));
  }
  if (options.backend == BackendKind::host && options.has(Mode::issue)) {
    throw ConfigError(
        "--modes: issue is of --backend cuda; on the host a call is over when it returns, eager");
  }
  if (options.backend == BackendKind::cuda && options.inputs == Inputs::written) {
    throw ConfigError(
        "--inputs: written is of --backend host; a card keeps no line of a peer's memory, kept");
  }
  options.inputs = options.inputs.value_or(options.backend == BackendKind::host ? Inputs::written
                                                                                : Inputs::kept);
  if (options.dtypes.empty()) {
    options.dtypes = {options.backend == BackendKind::host ? DType::f32 : DType::bf16};
  }
  return options;
}

}  // namespace cohort::bench
