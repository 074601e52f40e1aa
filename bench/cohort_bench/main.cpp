// SPDX-License-Identifier: Apache-2.0
// Microbenchmarks of Cohort and of the library under it, side by side. See ../README.md.

#include <fmt/format.h>
#include <mpi.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "benches.hpp"
#include "cohort/mpi.hpp"
#include "console.hpp"
#include "goals.hpp"
#include "meta.hpp"

namespace cohort::bench {
namespace {

void run_bench(Session& session, Bench bench) {
  switch (bench) {
    case Bench::ceiling:
      return bench_ceiling(session);
    case Bench::all_gather:
      return bench_all_gather(session);
    case Bench::reduce_scatter:
      return bench_reduce_scatter(session);
    case Bench::all_reduce:
      return bench_all_reduce(session);
    case Bench::all_gather_dim:
      return bench_all_gather_dim(session);
    case Bench::all_reduce_norm:
      return bench_all_reduce_norm(session);
    case Bench::gather_query:
      return bench_gather_query(session);
    case Bench::dcp_merge:
      return bench_dcp_merge(session);
    case Bench::merge_by_token:
      return bench_merge_by_token(session);
    case Bench::merge_replicated:
      return bench_merge_replicated(session);
    case Bench::merge_splits:
      return bench_merge_splits(session);
    case Bench::merge_sink:
      return bench_merge_sink(session);
    case Bench::gather_quantised:
      return bench_gather_quantised(session);
    case Bench::place_step:
      return bench_place_step(session);
    case Bench::decode_step:
      return bench_decode_step(session);
    case Bench::arena:
      return bench_arena(session);
    case Bench::scope:
      return bench_scope(session);
    case Bench::recorder:
      return bench_recorder(session);
    case Bench::registration:
      return bench_registration(session);
    case Bench::formation:
      return bench_formation(session);
  }
}

/// Every run that communicates says what the machine itself can do.
[[nodiscard]] std::vector<Bench> in_order(const Options& options) {
  std::vector<Bench> wanted;
  bool communicates = false;
  for (const Bench bench : options.benches) {
    communicates = communicates ||
                   (bench != Bench::arena && bench != Bench::scope && bench != Bench::recorder &&
                    bench != Bench::registration && bench != Bench::formation);
  }
  for (const auto& entry : kBenches) {
    if (options.has(entry.value) || (entry.value == Bench::ceiling && communicates)) {
      wanted.push_back(entry.value);
    }
  }
  return wanted;
}

/// Variables that would replace what the command line asks for.
void refuse_overrides() {
  for (const char* name : {"COHORT_OWN_MAX_BYTES", "COHORT_MERGE_PLAN"}) {
    if (const char* value = std::getenv(name); value != nullptr && *value != '\0') {
      throw ConfigError(fmt::format("{}={}: the benchmark chooses paths and plans itself; unset it",
                                    name, value));
    }
  }
}

void on_signal(int) { interrupt(); }

/// 0: all measured and right. 1: wrong elements. 130: interrupted, rows so far kept.
[[nodiscard]] int run(const std::vector<std::string>& command, const Options& options,
                      ControlPlane& world) {
  refuse_overrides();
  Console console(world.rank() == 0);
  const auto bed = options.backend == BackendKind::host ? make_host_bed() : make_cuda_bed();
  Meta meta =
      describe_run("cohort_bench", command, detail::name_in(kBackends, options.backend), world);
  meta.text("inputs", to_string(*options.inputs));
  bed->describe(meta, world);
  console.open(options.json, meta, world);
  static_cast<void>(std::signal(SIGINT, on_signal));
  static_cast<void>(std::signal(SIGTERM, on_signal));

  const auto raw = bed->raw(world);
  const auto loop = options.has(Path::shared_loop) ? bed->shared_loop(world) : nullptr;
  Lanes lanes(*bed, world);
  Runner runner(options, *bed, world, lanes, console);
  Session session{options, *bed, world, lanes, *raw, loop.get(), console, runner};
  for (const Bench bench : in_order(options)) {
    if (!runner.stopped()) {
      run_bench(session, bench);
    }
  }
  bed->synchronize();
  lanes.close();

  if (options.goals) {
    console.print(goals_table(goals_of(options.backend, console.rows())));
  }
  if (runner.wrong() > 0) {
    console.print(fmt::format("FAILED: {} wrong elements over all ranks\n", runner.wrong()));
    return EXIT_FAILURE;
  }
  if (runner.stopped()) {
    console.print(fmt::format("interrupted; {} rows kept\n", console.rows().size()));
    return 130;
  }
  return EXIT_SUCCESS;
}

}  // namespace
}  // namespace cohort::bench

int main(int argc, char** argv) {
  using namespace cohort::bench;
  const std::vector<std::string> command(argv, argv + argc);
  try {
    cohort::MpiSession mpi(argc, argv);
    int status = EXIT_SUCCESS;
    try {
      const Options options = parse_options(std::span(command).subspan(1));
      if (options.help) {
        if (mpi.world().rank() == 0) {
          static_cast<void>(std::fputs(usage().c_str(), stdout));
        }
        return EXIT_SUCCESS;
      }
      status = run(command, options, mpi.world());
    } catch (const cohort::ConfigError& error) {
      // Every rank gets here alike.
      if (mpi.world().rank() == 0) {
        static_cast<void>(std::fprintf(stderr, "cohort_bench: %s\n", error.what()));
      }
      status = 2;
    }
    return status;
  } catch (const std::exception& error) {
    static_cast<void>(std::fprintf(stderr, "cohort_bench: %s\n", error.what()));
    return EXIT_FAILURE;
  }
}
