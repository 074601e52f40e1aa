// SPDX-License-Identifier: Apache-2.0
// A decode from the first matrix to the chosen token, by several ways of communication. See
// ../README.md.

#include <fmt/format.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "../cohort_bench/meta.hpp"
#include "cohort/error.hpp"
#include "cohort/mpi.hpp"
#include "session.hpp"

namespace decode_engine {
namespace {

/// Collective.
[[nodiscard]] std::unique_ptr<Exchange> make_exchange(Session& session, const Way& way,
                                                      const Place& place) {
  const Sizes& sizes = session.options.sizes;
  if (!way.raw) {
    return make_cohort_exchange(session.world, session.device, sizes, place, way.merge);
  }
  return session.options.backend == cohort::BackendKind::cuda
             ? make_nccl_exchange(session.world, session.device, sizes, place)
             : make_mpi_exchange(session.device, sizes, place);
}

/// Why a way cannot be measured here, or "".
[[nodiscard]] std::string obstacle(const Options& options, const Way& way) {
  return way.dcp && options.dcp == 1 ? "needs a DCP group of at least two ranks" : "";
}

/// Collective. The ways that can be measured.
void form_lanes(Session& session, Told& told) {
  const Options& options = session.options;
  for (const Way* const way : options.ways) {
    if (const std::string why = obstacle(options, *way); !why.empty()) {
      told.text += fmt::format("# no {}: {}\n", way->name, why);
      continue;
    }
    const Place place = session.place(way->dcp);
    session.lanes.push_back({way, place, make_exchange(session, *way, place)});
  }
}

[[nodiscard]] std::string describe(const Options& options) {
  const Sizes& s = options.sizes;
  return fmt::format(
      "tp {}, pp {}, dcp {}; {} layers, hidden {}, {} heads of {}+{} with values of {}, queries "
      "through {}, latent {}+{}, inner {}, vocabulary {}, {} weights",
      options.tp, options.pp, options.dcp, s.layers, s.hidden, s.heads, s.nope, s.rope, s.value,
      s.query_rank, s.latent, s.rope, s.inner, s.vocabulary, options.copies ? "copying" : "random");
}

/// The first rank's output.
class Output {
 public:
  Output(const std::string& path, cohort::ControlPlane& world) : speaks_(world.rank() == 0) {
    if (!path.empty()) {
      if (speaks_) {
        file_.open(path);
      }
      const bool open = !speaks_ || file_.is_open();
      if (world.broadcast(std::as_bytes(std::span(&open, 1)), 0).at(0) == std::byte{0}) {
        throw cohort::ConfigError(fmt::format("--json {}: cannot be written", path));
      }
    }
  }

  void write(const Told& told) {
    if (speaks_) {
      fmt::print("{}", told.text);
      std::fflush(stdout);
      for (const auto& row : told.rows) {
        file_ << row << std::endl;
      }
    }
  }

 private:
  bool speaks_;
  std::ofstream file_;
};

[[nodiscard]] bool run(const std::vector<std::string>& command, const Options& options,
                       cohort::ControlPlane& world) {
  const auto device =
      options.backend == cohort::BackendKind::cuda ? make_cuda_device() : make_host_device();
  const auto model = options.copies ? copy_model(options.sizes, options.seed)
                                    : random_model(options.sizes, options.seed);
  Output output(options.json, world);
  cohort::bench::Meta meta = cohort::bench::describe_run("decode_engine", command,
                                                         cohort::to_string(options.backend), world);
  device->describe(meta, world);
  meta.text("model", describe(options));
  output.write({.text = meta.to_json() + "\n", .rows = {meta.to_json()}});

  Session session{options, *model, *device, world,
                  [&output](const Told& told) { output.write(told); }};
  Told lanes;
  form_lanes(session, lanes);
  output.write(lanes);
  bool passed = true;
  if (options.tokens > 0) {
    passed = measure_accuracy(session);
  }
  if (options.iters > 0) {
    measure_time(session);
  }
  for (const Lane& lane : session.lanes) {
    lane.exchange->close();
  }
  output.write({.text = passed ? "PASS\n" : "FAILED\n"});
  return passed;
}

}  // namespace
}  // namespace decode_engine

int main(int argc, char** argv) {
  const std::vector<std::string> command(argv, argv + argc);
  try {
    cohort::MpiSession mpi(argc, argv);
    const auto& world = mpi.world();
    try {
      const auto options =
          decode_engine::parse_options(std::span(command).subspan(1), world.size());
      if (options.help) {
        if (world.rank() == 0) {
          fmt::print("{}", decode_engine::usage());
        }
        return EXIT_SUCCESS;
      }
      return decode_engine::run(command, options, mpi.world()) ? EXIT_SUCCESS : EXIT_FAILURE;
    } catch (const cohort::ConfigError& error) {
      // Every rank gets here alike.
      if (world.rank() == 0) {
        fmt::print(stderr, "decode_engine: {}\n", error.what());
      }
      return 2;
    }
  } catch (const std::exception& error) {
    fmt::print(stderr, "decode_engine: {}\n", error.what());
    return EXIT_FAILURE;
  }
}
