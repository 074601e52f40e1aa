// SPDX-License-Identifier: Apache-2.0
#include "options.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <optional>

#include "../cohort_bench/option_words.hpp"
#include "cohort/error.hpp"
#include "cohort/topology.hpp"
#include "command_line/command_line.hpp"

namespace decode_engine {

namespace {

using cohort::ConfigError;
using cohort::bench::Named;
namespace words = cohort::bench::detail;

struct Preset {
  std::string_view name;
  Sizes sizes;
  bool copies = false;
  std::vector<std::int64_t> contexts;
};

/// V2-Lite and V3: DeepSeek-AI, "DeepSeek-V2", 2024, arXiv:2405.04434, appendix B, and
/// "DeepSeek-V3 Technical Report", 2024, arXiv:2412.19437, section 4.2. The SwiGLU is as wide as
/// the experts that a token takes: 6 + 2 of 1408, 8 + 1 of 2048. V3 has 61 layers; four fit a card
/// with room for a cache.
const std::vector<Preset>& presets() {
  static const std::vector<Preset> all = {
      {"tiny",
       {.layers = 2,
        .hidden = 160,
        .heads = 8,
        .query_rank = 48,
        .latent = 64,
        .rope = 16,
        .nope = 32,
        .value = 4,
        .inner = 64,
        .vocabulary = 31},
       true,
       {64, 256}},
      {"v2-lite",
       {.layers = 27,
        .hidden = 2048,
        .heads = 16,
        .query_rank = 0,
        .latent = 512,
        .rope = 64,
        .nope = 128,
        .value = 128,
        .inner = 11264,
        .vocabulary = 102400},
       false,
       {1024, 8192}},
      {"v3",
       {.layers = 4,
        .hidden = 7168,
        .heads = 128,
        .query_rank = 1536,
        .latent = 512,
        .rope = 64,
        .nope = 128,
        .value = 128,
        .inner = 18432,
        .vocabulary = 129280},
       false,
       {1024, 8192, 32768}},
  };
  return all;
}

const Preset& preset_named(std::string_view name) {
  std::string known;
  for (const Preset& preset : presets()) {
    if (preset.name == name) {
      return preset;
    }
    known += fmt::format("{}{}", known.empty() ? "" : ", ", preset.name);
  }
  throw ConfigError(fmt::format("--preset: expected {}, got \"{}\"", known, name));
}

const Way& way_named(std::string_view option, std::string_view name) {
  std::string known;
  for (const Way& way : kWays) {
    if (way.name == name) {
      return way;
    }
    known += fmt::format("{}{}", known.empty() ? "" : ", ", way.name);
  }
  throw ConfigError(fmt::format("{}: expected {}, got \"{}\"", option, known, name));
}

constexpr std::int64_t kMost = std::int64_t{1} << 24;

/// The options that are sizes of the model.
std::int64_t* size_option(Sizes& sizes, std::string_view option) {
  const std::array<std::pair<std::string_view, std::int64_t*>, 10> all{{
      {"--layers", &sizes.layers},
      {"--hidden", &sizes.hidden},
      {"--heads", &sizes.heads},
      {"--query-rank", &sizes.query_rank},
      {"--latent", &sizes.latent},
      {"--rope", &sizes.rope},
      {"--nope", &sizes.nope},
      {"--value", &sizes.value},
      {"--inner", &sizes.inner},
      {"--vocabulary", &sizes.vocabulary},
  }};
  const auto* const found = std::find_if(all.begin(), all.end(),
                                         [&](const auto& entry) { return entry.first == option; });
  return found == all.end() ? nullptr : found->second;
}

bool set_run_option(Options& options, std::string_view option, std::string_view value) {
  const auto count = [&](std::int64_t least) {
    return words::parse_count(option, value, least, kMost);
  };
  const auto list = [&] {
    std::vector<std::int64_t> all;
    for (const auto word : words::split_list(value)) {
      all.push_back(std::min(words::parse_size(option, word), kMost));
    }
    return all;
  };
  if (option == "--tp") {
    options.tp = static_cast<int>(count(1));
  } else if (option == "--pp") {
    options.pp = static_cast<int>(count(1));
  } else if (option == "--dcp") {
    options.dcp = static_cast<int>(count(1));
  } else if (option == "--backend") {
    options.backend = words::parse_name(option, value,
                                        std::array{Named{cohort::BackendKind::host, "host"},
                                                   Named{cohort::BackendKind::cuda, "cuda"}});
  } else if (option == "--weights") {
    options.copies =
        words::parse_name(option, value, std::array{Named{true, "copy"}, Named{false, "random"}});
  } else if (option == "--mode") {
    options.graph =
        words::parse_name(option, value, std::array{Named{true, "graph"}, Named{false, "eager"}});
  } else if (option == "--ways") {
    options.ways.clear();
    for (const auto word : words::split_list(value)) {
      options.ways.push_back(&way_named(option, word));
    }
  } else if (option == "--spoil") {
    options.spoilt = &way_named(option, value);
  } else if (option == "--seed") {
    options.seed = static_cast<std::uint64_t>(count(0));
  } else if (option == "--prompts") {
    options.prompts = count(1);
  } else if (option == "--tokens") {
    options.tokens = count(0);
  } else if (option == "--fp64") {
    options.fp64 = count(0);
  } else if (option == "--contexts") {
    options.contexts = list();
  } else if (option == "--batches") {
    options.batches = list();
  } else if (option == "--fill") {
    options.fill = list();
  } else if (option == "--steps") {
    options.steps = count(1);
  } else if (option == "--iters") {
    options.iters = count(0);
  } else if (option == "--room") {
    options.room = words::parse_size(option, value);
  } else if (option == "--json") {
    options.json = value;
  } else {
    return false;
  }
  return true;
}

void check(const Options& options, int ranks) {
  const Sizes& s = options.sizes;
  cohort::validate({.tp = options.tp, .pp = options.pp, .dcp = options.dcp}, ranks);
  const auto divided = [&](const char* name, std::int64_t value) {
    if (value < 1 || value % options.tp != 0) {
      throw ConfigError(
          fmt::format("{} {}: tp={} ranks must divide them", name, value, options.tp));
    }
  };
  divided("--heads", s.heads);
  divided("--inner", s.inner);
  if (s.layers < options.pp) {
    throw ConfigError(fmt::format("--layers {}: expected one for each of {} stages at least",
                                  s.layers, options.pp));
  }
  if (s.rope % 2 != 0) {
    throw ConfigError(fmt::format("--rope {}: expected an even number", s.rope));
  }
}

}  // namespace

std::string usage() {
  const auto line = [](std::string_view option, const std::string& text) {
    return fmt::format("  {:<20}{}\n", option, text);
  };
  std::string ways;
  for (const Way& way : kWays) {
    ways += fmt::format("{}{}", ways.empty() ? "" : ",", way.name);
  }
  return "Decodes with a model shaped as DeepSeek-V3 by several ways of communication side by "
         "side:\n"
         "what is chosen, against one rank alone and fp64, and the time of a token.\n\n"
         "  mpirun -n 2 decode_engine --preset tiny --json decode.json\n\n" +
         line("--preset NAME", "tiny (default), v2-lite or v3: sizes, which the next ones change") +
         line("--layers N", "layers of the model") +
         line("--hidden N", "elements of a hidden state") + line("--heads N", "query heads") +
         line("--query-rank N", "of the queries' compression; 0 for none") +
         line("--latent N", "of the compression of keys and values") +
         line("--rope N", "rotated elements of a key") +
         line("--nope N", "other elements of a head's key") +
         line("--value N", "elements of a head's value") + line("--inner N", "of the SwiGLU") +
         line("--vocabulary N", "tokens that there are") +
         line("--weights NAME", "copy, which continues a repeated sequence, or random") +
         line("--tp N", "ranks of a tensor-parallel group, ranks / pp") +
         line("--pp N", "stages, 1") + line("--dcp N", "ranks that share a cache, tp") +
         line("--ways LIST", ways) + line("--backend NAME", "host (default) or cuda") +
         line("--mode NAME", "graph (default): a step is one; or eager") +
         line("--seed N", "of weights and prompts, 1") +
         line("--prompts N", "sequences of the accuracy, 16") +
         line("--tokens N", "decoded behind each prompt, 256; 0 for no accuracy") +
         line("--fp64 N", "first positions that are compared with fp64, 64 of a small model") +
         line("--spoil WAY", "leave a sum out of this way, to see the checks fail") +
         line("--contexts LIST", "tokens in the cache of timed steps; K is binary") +
         line("--batches LIST", "sequences of timed steps, 1,8") +
         line("--fill LIST", "contexts to time with as many sequences as fit the room, none") +
         line("--steps N", "of a sample, 4") + line("--iters N", "samples, 20; 0 for no times") +
         line("--room SIZE", "of the cache on a rank, 64G; ways that need more are left out") +
         line("--json FILE", "write rows as JSON lines") + line("--help", "this text");
}

Options parse_options(std::span<const std::string> arguments, int ranks) {
  std::vector<std::pair<std::string_view, std::string_view>> given;
  Options options;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    std::string_view option = arguments[i];
    const auto equals = option.find('=');
    if (option == "--help" || option == "-h") {
      options.help = true;
      return options;
    }
    if (const auto known = cohort::tools::options_in(usage());
        std::find(known.begin(), known.end(), option.substr(0, equals)) == known.end()) {
      throw ConfigError(cohort::tools::no_such_option(option, usage()));
    }
    if (equals == std::string_view::npos && i + 1 == arguments.size()) {
      throw ConfigError(fmt::format("{}: expected a value", option));
    }
    given.emplace_back(option.substr(0, equals), equals == std::string_view::npos
                                                     ? std::string_view(arguments[++i])
                                                     : option.substr(equals + 1));
  }

  std::string_view preset = "tiny";
  for (const auto& [option, value] : given) {
    preset = option == "--preset" ? value : preset;
  }
  options.sizes = preset_named(preset).sizes;
  options.copies = preset_named(preset).copies;
  options.contexts = preset_named(preset).contexts;
  options.fp64 = options.copies ? options.fp64 : 0;
  for (const auto& [option, value] : given) {
    if (std::int64_t* const size = size_option(options.sizes, option)) {
      *size = words::parse_count(option, value, option == "--query-rank" ? 0 : 1, kMost);
    } else if (option != "--preset") {
      set_run_option(options, option, value);
    }
  }
  options.tp = options.tp == 0 ? std::max(1, ranks / options.pp) : options.tp;
  options.dcp = options.dcp == 0 ? options.tp : options.dcp;
  if (options.ways.empty()) {
    for (const Way& way : kWays) {
      options.ways.push_back(&way);
    }
  }
  check(options, ranks);
  return options;
}

}  // namespace decode_engine
