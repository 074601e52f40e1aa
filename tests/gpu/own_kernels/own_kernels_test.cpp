// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "command_line/command_line.hpp"
#include "world.cuh"

// Every kernel of the library on one card, without MPI and NCCL.

namespace {

struct Options {
  std::int64_t soak = 3000;
  std::uint32_t seed = 1;
  int ranks = 0;  ///< 0: all
  int cards = 1;
  int rounds = 300;
  std::string only;
};

constexpr std::string_view kHelp =
    "Tests every kernel of the library, without MPI and NCCL.\n\n"
    "  gpu_own_kernels --only soak --ranks 2 --cards 2\n\n"
    "  --soak CALLS   of each rank count's soak, 3000\n"
    "  --seed S       of all data, 1\n"
    "  --ranks N      that many; all counts by default\n"
    "  --cards C      collectives, the soak and overlapping kernels deal their ranks out to, 1\n"
    "  --rounds R     in which kernels of several groups overlap, 300\n"
    "  --only NAME    local, collectives, attention, norms, failures, overlap or soak\n";

Options parse(int argc, char** argv) {
  cohort::tools::help_if_asked(argc, argv, kHelp);
  Options options;
  for (int i = 1; i < argc; i += 2) {
    const std::string key = argv[i];
    if (i + 1 == argc) {
      cohort::tools::refuse(cohort::tools::no_such_option(key, kHelp));
    }
    if (key == "--soak") {
      options.soak = std::atoll(argv[i + 1]);
    } else if (key == "--seed") {
      options.seed = static_cast<std::uint32_t>(std::atoll(argv[i + 1]));
    } else if (key == "--ranks") {
      options.ranks = std::atoi(argv[i + 1]);
    } else if (key == "--cards") {
      options.cards = std::atoi(argv[i + 1]);
    } else if (key == "--rounds") {
      options.rounds = std::atoi(argv[i + 1]);
    } else if (key == "--only") {
      options.only = argv[i + 1];
    } else {
      cohort::tools::refuse(cohort::tools::no_such_option(key, kHelp));
    }
  }
  return options;
}

bool has_devices(int wanted) {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count >= wanted;
}

}  // namespace

int main(int argc, char** argv) {
  using namespace cohort::test;
  // One hardware queue per rank's stream, or a waiting kernel would sit before the one that it
  // waits for. And all code loaded at the start, because loading can wait for running kernels.
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
  setenv("CUDA_MODULE_LOADING", "EAGER", 1);
  const Options options = parse(argc, argv);
  Tally tally;
  if (!has_devices(options.cards)) {
    std::printf("skipped: fewer CUDA devices than %d\n", options.cards);
    tally.skipped = 7;  // the parts that `--only` names
  } else {
    const auto wants = [&](const char* part) {
      return options.only.empty() || options.only == part;
    };
    const auto counts = options.ranks != 0 ? std::vector<int>{options.ranks}
                                           : std::vector<int>{2, 3, 4, 5, 8, 9, 16};
    if (wants("local")) {
      test_local(tally);
      test_division(tally);
    }
    if (wants("norms")) {
      test_norms_alone(tally);
    }
    for (const int n : counts) {
      if (wants("collectives")) {
        test_collectives(tally, n, options.cards);
      }
      if (wants("attention")) {
        test_attention(tally, n);
      }
      if (wants("norms")) {
        test_norms(tally, n, options.cards);
      }
      std::printf("n=%d: passed=%d failed=%d\n", n, tally.passed, tally.failed);
      std::fflush(stdout);
    }
    if (wants("failures")) {
      test_failures(tally);
    }
    if (wants("overlap")) {
      test_overlap(tally, options.cards, options.rounds);
    }
    for (const int n : counts) {
      if (wants("soak")) {
        soak(tally, n, options.cards, options.soak, options.seed + static_cast<std::uint32_t>(n));
      }
    }
  }
  std::printf("cohort-test: passed=%d failed=%d skipped=%d\n", tally.passed, tally.failed,
              tally.skipped);
  return tally.failed == 0 ? 0 : 1;
}
