// SPDX-License-Identifier: Apache-2.0
#include "options.hpp"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <utility>

#include "cohort/error.hpp"
#include "command_line/cli11.hpp"

namespace dcp_decode {
namespace {

using cohort::ConfigError;

void require(bool holds, const std::string& text) {
  if (!holds) {
    throw ConfigError(text);
  }
}

void check(const Options& options, int ranks) {
  const int tp = options.layout.tp;
  cohort::validate(options.layout, ranks);
  require(options.heads % tp == 0,
          fmt::format("--heads {}: tp={} ranks must divide them", options.heads, tp));
  require(options.value_dim <= options.latent_dim,
          fmt::format("--value-dim {}: values are the first elements of the latent part, which has "
                      "{}",
                      options.value_dim, options.latent_dim));
}

/// DeepSeek-V3's attention: 128 heads, a latent of 512, a rotary part of 64. Source: DeepSeek-AI,
/// "DeepSeek-V3 Technical Report", 2024, arXiv:2412.19437, section 4.2. In absorbed form the values
/// are the latent itself.
void apply_deepseek_v3(const CLI::App& app, Options& options) {
  const auto preset = [&](const char* name, std::int64_t& option, std::int64_t value) {
    option = app.count(name) == 0 ? value : option;
  };
  preset("--heads", options.heads, 128);
  preset("--latent-dim", options.latent_dim, 512);
  preset("--rope-dim", options.rope_dim, 64);
  preset("--value-dim", options.value_dim, 512);
}

}  // namespace

Options parse_options(int argc, char** argv, int ranks, std::optional<EarlyExit>& exit) {
  Options options;
  std::string preset;
  std::string merge = "automatic";
  std::string symmetric = "on";
  std::string base = "e";
  std::string backend = "automatic";
  options.layout = {.tp = 0, .pp = 1, .dcp = 0};

  CLI::App app(
      "Decodes with a KV cache that the ranks of a DCP group share, and checks every step\n\n"
      "  mpirun -n 4 dcp_decode --tp 2 --pp 2 --dcp 2 --steps 4");
  const auto size = [&app](const char* name, std::int64_t& option, const char* text) {
    app.add_option(name, option, text)
        ->check(CLI::Range(std::int64_t{1}, std::int64_t{1} << 24))
        ->capture_default_str();
  };
  const auto choice = [&app](const char* name, std::string& option,
                             const std::vector<std::string>& values, const char* text) {
    app.add_option(name, option, text)->check(CLI::IsMember(values))->capture_default_str();
  };
  app.add_option("--tp", options.layout.tp, "ranks of a tensor-parallel group [ranks / pp]")
      ->check(CLI::PositiveNumber);
  app.add_option("--pp", options.layout.pp, "stages [1]")->check(CLI::PositiveNumber);
  app.add_option("--dcp", options.layout.dcp, "ranks that share a KV cache [tp]")
      ->check(CLI::PositiveNumber);
  size("--batch", options.batch, "sequences");
  size("--heads", options.heads, "query heads of the model");
  size("--latent-dim", options.latent_dim, "latent elements of a query");
  size("--rope-dim", options.rope_dim, "rotary elements of a query");
  size("--value-dim", options.value_dim, "elements of a head's output");
  size("--context", options.context, "tokens of the longest sequence at first");
  size("--steps", options.steps, "tokens to decode for each sequence");
  choice("--merge", merge, {"staged", "packed", "one_kernel", "automatic"},
         "how partial attentions are merged");
  choice("--symmetric", symmetric, {"on", "off"}, "symmetric memory for the buffers");
  choice("--lse-base", base, {"e", "2"}, "base of the log-sum-exp");
  choice("--backend", backend, {"automatic", "host", "cuda"}, "where the tensors live");
  app.add_flag("--graph", options.graph, "capture a layer once and launch it every step");
  app.add_option("--seed", options.seed, "of all data")->capture_default_str();
  app.add_option("--json", options.json, "file for the figures");
  app.add_option("--preset", preset, "sizes of a known model; explicit sizes win")
      ->check(CLI::IsMember({"deepseek-v3"}));

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    auto [text, status] = cohort::tools::refusal(app, error);
    exit = EarlyExit{status, std::move(text)};
    return options;
  }
  if (preset == "deepseek-v3") {
    apply_deepseek_v3(app, options);
  }
  options.merge = cohort::merge_plan_from_string(merge).value();
  options.symmetric = symmetric == "on";
  options.lse_base = base == "e" ? cohort::LseBase::e : cohort::LseBase::two;
  options.backend = backend == "host"   ? BackendChoice::host
                    : backend == "cuda" ? BackendChoice::cuda
                                        : BackendChoice::automatic;
  auto& layout = options.layout;
  layout.tp = layout.tp == 0 ? std::max(1, ranks / layout.pp) : layout.tp;
  layout.dcp = layout.dcp == 0 ? layout.tp : layout.dcp;
  check(options, ranks);
  return options;
}

}  // namespace dcp_decode
