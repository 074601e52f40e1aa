// SPDX-License-Identifier: Apache-2.0
// Decodes with a KV cache that the ranks of a DCP group share, as an engine does: queries are
// gathered, every rank attends to its own tokens, the partial attentions are merged, and every step
// is compared with an attention over all tokens in fp64.
//
//   mpirun -n 4 dcp_decode                         one DCP group of four ranks
//   mpirun -n 4 dcp_decode --tp 2 --pp 2 --dcp 2   two stages
//   mpirun -n 8 dcp_decode --preset deepseek-v3
//
// The last line is the verdict; the exit status is 0 for PASS, 1 for FAIL or a failed run, 2 for
// options that cannot work.

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cohort/cohort.hpp"
#include "cohort/mpi.hpp"
#include "dcp_decode/decoder.hpp"
#include "dcp_decode/options.hpp"
#include "dcp_decode/report.hpp"
#include "support/machine.hpp"

namespace {

using namespace dcp_decode;

/// The backend that all ranks can use, and why that one. Collective.
struct Resolved {
  BackendChoice choice = BackendChoice::host;
  std::string text;
};
Resolved resolve_backend(BackendChoice wanted, cohort::ControlPlane& world) {
  if (wanted != BackendChoice::automatic) {
    return {wanted, wanted == BackendChoice::cuda ? "cuda" : "host"};
  }
  const std::string mine = example::cuda_obstacle();
  const auto obstacles = world.all_gather(std::as_bytes(std::span(mine)));
  const auto first = std::find_if(obstacles.begin(), obstacles.end(),
                                  [](const auto& bytes) { return !bytes.empty(); });
  if (first == obstacles.end()) {
    return {BackendChoice::cuda, "cuda"};
  }
  const std::string why(reinterpret_cast<const char*>(first->data()), first->size());
  return {BackendChoice::host, fmt::format("host (no cuda: {})", why)};
}

std::string describe(const Options& options) {
  return fmt::format(
      "{}, batch {}, {} heads, latent {} + rope {}, value {}, context up to {}, {} steps",
      cohort::to_string(options.layout), options.batch, options.heads, options.latent_dim,
      options.rope_dim, options.value_dim, options.context, options.steps);
}

bool decode(const Options& options, cohort::ControlPlane& world) {
  const bool speaks = world.rank() == 0;
  const Resolved backend = resolve_backend(options.backend, world);
  const auto machine = example::make_machine(backend.choice);
  auto state = cohort::ParallelState::create(world, {.layout = options.layout,
                                                     .backend = machine->backend(),
                                                     .symmetric = {.enabled = options.symmetric},
                                                     .merge = {.plan = options.merge}});
  const auto groups = describe_groups(state, world);
  if (speaks) {
    fmt::print("{}\nbackend: {}\n", describe(options), backend.text);
    for (const auto& line : groups) {
      fmt::print("{}\n", line);
    }
  }

  Summary summary;
  cohort::MergeChoice choice;
  {
    Decoder decoder(options, state, *machine);
    summary = summarize(options, world, decoder);
    if (speaks) {
      fmt::print(
          "cache: {} tokens a stage, {} to {} on a rank; {} times a rank holds no token of a "
          "sequence\n",
          summary.tokens, summary.least_own_tokens, summary.most_own_tokens, summary.empty_shards);
    }
    const std::int64_t stride = (options.steps + 7) / 8;
    for (std::int64_t step = 1; step <= options.steps; ++step) {
      decoder.step();
      if (step == 1 && speaks) {
        const auto& taken = state.dcp().last_merge_choice();
        fmt::print("merge: {} ({})\n", cohort::to_string(taken.plan), taken.reason);
        std::fflush(stdout);
      }
      if (step % stride == 0 || step == options.steps) {
        summary = summarize(options, world, decoder);
        if (speaks) {
          fmt::print("step {}/{}: {} tokens, max_rel_error={:.2e}\n", step, options.steps,
                     summary.tokens, summary.deviation.max_rel_error);
          std::fflush(stdout);
        }
      }
    }
    choice = state.dcp().last_merge_choice();
  }
  state.shutdown();
  if (speaks) {
    if (!options.json.empty()) {
      write_json(options, groups, backend.text, choice, summary);
    }
    print(options, summary);
  }
  return summary.passed;
}

int run(int argc, char** argv, cohort::MpiSession& mpi) {
  auto& world = mpi.world();
  try {
    std::optional<EarlyExit> exit;
    const Options options = parse_options(argc, argv, world.size(), exit);
    if (exit) {
      if (world.rank() == 0) {
        fmt::print("{}", exit->text);
      }
      return exit->status;
    }
    return decode(options, world) ? 0 : 1;
  } catch (const cohort::ConfigError& error) {
    // Options are the same on all ranks, and so is this.
    if (world.rank() == 0) {
      fmt::print(stderr, "dcp_decode: {}\n", error.what());
    }
    return 2;
  } catch (const cohort::Error& error) {
    fmt::print(stderr, "dcp_decode: rank {}: {}\n", world.rank(), error.what());
    return 1;
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    cohort::MpiSession mpi(argc, argv);
    return run(argc, argv, mpi);
  } catch (const cohort::Error& error) {
    fmt::print(stderr, "dcp_decode: {}\n", error.what());
    return 1;
  }
}
