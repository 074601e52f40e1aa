// SPDX-License-Identifier: Apache-2.0
// An engine whose processes meet over Unix sockets of its own, without MPI. It implements
// cohort::Messenger (own_control_plane/unix_messenger.hpp) and gets groups, collectives and time
// limits from Cohort.
//
//   build/host/bin/own_control_plane [RANKS]      2 or more, default 4; starts its ranks itself

#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cohort/cohort.hpp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "command_line/command_line.hpp"
#include "own_control_plane/unix_messenger.hpp"

namespace {

using namespace std::chrono_literals;

void require(bool condition, std::string_view what) {
  if (!condition) {
    throw std::logic_error("wrong: " + std::string(what));
  }
}

// Rank 0 prints; the others keep quiet, so the output is the same each time.
template <class... Args>
void say(cohort::ControlPlane& world, fmt::format_string<Args...> text, Args&&... args) {
  if (world.rank() == 0) {
    fmt::print("{}\n", fmt::format(text, std::forward<Args>(args)...));
    std::fflush(stdout);
  }
}

// Every rank sends a line; every rank gets all lines.
void messages(cohort::ControlPlane& world) {
  const std::string mine = fmt::format("hello from rank {}", world.rank());
  for (const auto& bytes : world.all_gather(std::as_bytes(std::span(mine)))) {
    say(world, "{}", std::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
  }
}

// Tensor-parallel groups over the engine's own control plane: columns of a matrix are gathered.
void collectives(cohort::ControlPlane& world) {
  const int n = world.size();
  auto state =
      cohort::ParallelState::create(world, {.layout = {.tp = n, .pp = 1, .dcp = n % 2 == 0 ? 2 : 1},
                                            .backend = cohort::host_backend(),
                                            .symmetric = {.enabled = true}});
  constexpr int kRows = 3;
  constexpr int kColumns = 2;

  std::vector<float> mine(kRows * kColumns);
  for (int i = 0; i < kRows * kColumns; ++i) {
    mine[static_cast<std::size_t>(i)] = static_cast<float>(100 * world.rank() + i);
  }
  const cohort::TensorView shard(mine.data(), cohort::DType::f32, {kRows, kColumns});
  const cohort::Tensor whole = state.tp().all_gather(shard, -1);
  require(whole.shape() == cohort::Dims{kRows, kColumns * n}, "shape of the gathered matrix");
  const auto* values = whole.data_as<float>();
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kColumns * n; ++column) {
      const int rank = column / kColumns;
      const int expected = 100 * rank + row * kColumns + column % kColumns;
      require(values[row * kColumns * n + column] == static_cast<float>(expected),
              "element of the gathered matrix");
    }
  }
  say(world, "{} gathered [{}, {}] of each rank along dim -1: every element right",
      state.tp().name(), kRows, kColumns);
  world.barrier();
}

// The last rank stays away. The others learn who is missing, and go on without it.
void missing_rank(cohort::ControlPlane& world) {
  const int last = world.size() - 1;
  std::vector<int> all(static_cast<std::size_t>(world.size()));
  std::iota(all.begin(), all.end(), 0);
  if (world.rank() == last) {
    std::this_thread::sleep_for(600ms);
    return;
  }
  const auto group = world.subgroup(all, 1, "impatient");
  try {
    group->all_gather_within({}, 200ms);
    require(false, "an all_gather returned without a rank");
  } catch (const cohort::TimeoutError& error) {
    require(error.missing() == std::vector{last}, "who is missing");
    say(world, "time-out: {}", error.what());
  }
  all.pop_back();
  const auto survivors = world.subgroup(all, 2, "survivors");
  survivors->barrier();
  say(world, "{} of {} ranks go on in group {}", survivors->size(), world.size(),
      survivors->name());
}

int run_rank(const std::string& job, int rank, int size) {
  try {
    constexpr auto kLimit = 10s;
    const auto messenger =
        std::make_shared<own_control_plane::UnixMessenger>(job, rank, size, kLimit);
    cohort::MessageControlPlane world(messenger, kLimit);
    messages(world);
    collectives(world);
    missing_rank(world);
    return EXIT_SUCCESS;
  } catch (const std::exception& error) {
    fmt::print(stderr, "rank {}: {}\n", rank, error.what());
    return EXIT_FAILURE;
  }
}

}  // namespace

int main(int argc, char** argv) {
  constexpr std::string_view kHelp =
      "Starts RANKS ranks (2 to 64, default 4) that meet over Unix sockets of their own, without "
      "MPI.\n\n"
      "  own_control_plane 6\n\n  --help  this text\n";
  cohort::tools::help_if_asked(argc, argv, kHelp);
  const int size = argc > 1 ? std::atoi(argv[1]) : 4;
  if (argc > 2 || size < 2 || size > 64) {
    const std::string_view word = argv[argc > 2 ? 2 : 1];
    cohort::tools::refuse(word.substr(0, 2) == "--" || argc > 2
                              ? cohort::tools::no_such_option(word, kHelp)
                              : fmt::format("RANKS: expected 2 to 64, got {}", word));
  }
  const std::string job = fmt::format("cohort-example-{}", ::getpid());
  const pid_t starter = ::getpid();
  int failed = 0;
  for (int rank = 0; rank < size; ++rank) {
    const pid_t child = ::fork();
    if (child == 0) {
      // No rank outlives the program, however that ends.
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      std::exit(::getppid() == starter ? run_rank(job, rank, size) : EXIT_FAILURE);
    }
    failed += child < 0 ? 1 : 0;
  }
  // Each wait of a rank has a limit, so all of them end.
  for (int status = 0; ::wait(&status) > 0;) {
    failed += WIFEXITED(status) && WEXITSTATUS(status) == EXIT_SUCCESS ? 0 : 1;
  }
  fmt::print("{} of {} ranks ended well\n", size - failed, size);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
