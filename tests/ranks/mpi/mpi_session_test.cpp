// SPDX-License-Identifier: Apache-2.0
// How a session begins and ends. Each mode is a program of its own, because MPI starts only once;
// the name of the mode is the first argument. The last line of a rank that went right is
// "session <mode>: rank <r> ok".

#include "cohort/mpi/mpi_session.hpp"

#include <mpi.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cohort/cohort.hpp>
#include <cohort/host/host_backend.hpp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

using namespace cohort;
using namespace std::chrono_literals;

namespace {

void check(bool condition, const std::string& text) {
  if (!condition) {
    throw std::logic_error("check failed: " + text);
  }
}

bool finalized() {
  int value = 0;
  MPI_Finalized(&value);
  return value != 0;
}

void ok(std::string_view mode, int rank) {
  std::printf("session %.*s: rank %d ok\n", static_cast<int>(mode.size()), mode.data(), rank);
}

int own(int argc, char** argv) {
  int rank = -1;
  std::unique_ptr<ControlPlane> outlives;
  {
    MpiSession session(argc, argv);
    check(argc == 2 && std::string_view(argv[1]) == "own", "the program's arguments are kept");
    check(session.owns_mpi(), "owns MPI");
    auto& world = session.world();
    rank = world.rank();
    world.barrier();
    // All ranks of this test share a machine.
    check(session.local_rank() == rank, "local rank");
    check(session.local_size() == world.size(), "local size");
    const std::vector<int> alone{rank};
    outlives = world.subgroup(alone, 0, "alone");
    check(session.close(), "nothing went wrong");
    check(session.close(), "a second time it does nothing");
  }
  check(finalized(), "the session finalises MPI");
  outlives->barrier();  // a group of one sends nothing
  outlives.reset();
  try {
    MpiSession again;
    check(false, "MPI starts only once");
  } catch (const UsageError& error) {
    check(std::string(error.what()).find("MPI_Finalize was called") != std::string::npos, "why");
  }
  ok("own", rank);
  return 0;
}

int engine(int argc, char** argv) {
  int provided = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &provided);
  int rank = -1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm mine = MPI_COMM_NULL;
  MPI_Comm_split(MPI_COMM_WORLD, 0, -rank, &mine);  // the engine's own order of ranks
  for (int round = 0; round < 3; ++round) {
    MpiSession session({.ranks = mine});
    check(!session.owns_mpi(), "the engine owns MPI");
    check(session.world().rank() == session.world().size() - 1 - rank, "the engine's order");
    session.world().barrier();
    check(session.close(), "MPI_Finalize would return");
  }
  check(!finalized(), "MPI runs on");
  int sum = 0;
  MPI_Allreduce(&rank, &sum, 1, MPI_INT, MPI_SUM, mine);
  MPI_Comm_free(&mine);
  MPI_Finalize();
  ok("engine", rank);
  return 0;
}

int thread_level(int argc, char** argv) {
  int provided = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_SINGLE, &provided);
  int rank = -1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  try {
    MpiSession session({.thread_level = MPI_THREAD_MULTIPLE});
    check(provided >= MPI_THREAD_MULTIPLE, "a level that MPI does not provide is refused");
  } catch (const ConfigError& error) {
    const std::string what = error.what();
    check(what.find("MPI_THREAD_MULTIPLE") != std::string::npos, "names the level asked for");
    check(what.find("engine's MPI_Init") != std::string::npos, "names who chose");
  }
  {
    MpiSession session({.thread_level = provided});
    session.world().barrier();
  }
  MPI_Finalize();
  ok("thread_level", rank);
  return 0;
}

// The last rank comes later than the others wait: they name it, and the job ends.
int late(int argc, char** argv) {
  MpiSession session(argc, argv, {.limit = 500ms});
  auto& world = session.world();
  const int last = world.size() - 1;
  if (world.rank() == last) {
    std::this_thread::sleep_for(30s);
    std::puts("the job went on for 30 s");
    return 0;
  }
  try {
    world.barrier();
    std::puts("the barrier returned without a rank");
  } catch (const TimeoutError& error) {
    check(error.missing() == std::vector{last}, "who is missing");
    check(!session.close(), "the session knows");
    ok("late", world.rank());
  }
  std::this_thread::sleep_for(200ms);  // so that every rank's line is out before the first abort
  return 0;                            // leaves by MPI_Abort all the same
}

// The last rank came later than the others waited, over the control plane and in shared memory. All
// have gone on since, so the session ends in order, whatever was under way.
int recovered(int argc, char** argv) {
  int rank = -1;
  {
    MpiSession session(argc, argv, {.limit = 500ms});
    auto& world = session.world();
    rank = world.rank();
    const int last = world.size() - 1;
    std::vector<int> all(static_cast<std::size_t>(world.size()));
    std::iota(all.begin(), all.end(), 0);
    const auto attempt = [&](auto&& call) {
      const auto start = Clock::now();
      if (rank == last) {
        std::this_thread::sleep_for(900ms);
      }
      try {
        call();
        check(false, "the call returned without a rank");
      } catch (const TimeoutError& error) {
        check(error.missing() == std::vector{last}, "who is missing");
      }
      std::this_thread::sleep_until(start + 1200ms);
    };
    const auto over_control = world.subgroup(all, 1, "over control");
    attempt([&] {
      if (rank == 0) {  // nobody asks for it
        over_control->exchange({{last, Bytes(std::size_t{1} << 20)}}, {});
      }
      over_control->barrier();
    });
    const auto of_state = world.subgroup(all, 2, "of the state");
    {
      auto state = ParallelState::create(
          *of_state, {.layout = {.tp = world.size()}, .backend = host_backend()});
      attempt([&] { state.tp().barrier(); });
    }
    world.subgroup(all, 3, "anew")->barrier();
  }
  check(finalized(), "the session finalises MPI");
  ok("recovered", rank);
  return 0;
}

// An exception leaves the session: its handler outside still reports it, then the job ends.
int unwinding(int argc, char** argv) {
  try {
    MpiSession session(argc, argv);
    session.world().barrier();
    if (session.world().rank() == 0) {
      throw std::runtime_error("the engine's own exception");
    }
    session.world().barrier();  // would wait for a minute
    std::puts("the barrier returned without a rank");
  } catch (const std::runtime_error& error) {
    std::printf("session unwinding: handler saw: %s\n", error.what());
    return 0;
  }
  return 0;
}

// A rank ends early and silently: the others' goodbye names it within the limit.
int goodbye(int argc, char** argv) {
  auto session = std::make_unique<MpiSession>(argc, argv, MpiSessionOptions{.limit = 500ms});
  const int rank = session->world().rank();
  const int last = session->world().size() - 1;
  if (rank == last) {
    std::this_thread::sleep_for(30s);
    std::puts("the job went on for 30 s");
  } else {
    set_log_sink([](LogLevel, std::string_view text) {
      std::printf("session goodbye: %.*s\n", static_cast<int>(text.size()), text.data());
    });
  }
  session.reset();
  std::this_thread::sleep_for(200ms);  // so that every rank's line is out before the first abort
  return 0;
}

std::optional<MpiSession> of_the_program;  // its destructor runs at the exit of every child as well

// Children that exit end neither MPI nor wait for the other ranks.
int forked(int argc, char** argv) {
  auto& session = of_the_program.emplace(argc, argv);
  auto& world = session.world();
  const int rank = world.rank();
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    try {
      world.barrier();
    } catch (const UsageError&) {
      std::exit(3);
    }
    std::exit(4);
  }
  int status = 0;
  waitpid(child, &status, 0);
  check(WIFEXITED(status) && WEXITSTATUS(status) == 3, "the child's call is refused, and it exits");
  world.barrier();
  ok("forked", rank);
  return 0;
}

// The environment of a process that the mpirun of another MPI started as one of three: for this
// MPI, it is alone.
int become_stranger() {
  const int rank = std::atoi(std::getenv("OMPI_COMM_WORLD_RANK"));
  std::vector<std::string> names;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    if (text.starts_with("PMIX_") || text.starts_with("OMPI_") || text.starts_with("ORTE_")) {
      names.emplace_back(text.substr(0, text.find('=')));
    }
  }
  for (const auto& name : names) {
    unsetenv(name.c_str());
  }
  setenv("PMI_RANK", std::to_string(rank).c_str(), 1);
  setenv("PMI_SIZE", "3", 1);
  setenv("PMI_FD", "99", 1);
  setenv("OMPI_MCA_plm_rsh_agent", "", 1);  // a lone process need not be able to start others
  return rank;
}

bool names_both_sizes(const ConfigError& error) {
  return std::string_view(error.what())
             .find("the launcher started 3 ranks (PMI_SIZE), MPI has 1") != std::string_view::npos;
}

int strangers(int argc, char** argv) {
  const int rank = become_stranger();
  try {
    MpiSession session(argc, argv);
    std::puts("a lone rank took itself for the world");
    return 1;
  } catch (const ConfigError& error) {
    check(names_both_sizes(error), error.what());
  }
  check(finalized(), "the session that was refused finalises MPI");
  ok("strangers", rank);
  return 0;
}

// The engine has initialised MPI; and it may say that each process is to be alone.
int alone(int argc, char** argv) {
  const int rank = become_stranger();
  int provided = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &provided);
  try {
    MpiSession session;
    std::puts("a lone rank took itself for the world");
    return 1;
  } catch (const ConfigError& error) {
    check(names_both_sizes(error), error.what());
  }
  {
    MpiSession session({.ranks = MPI_COMM_SELF});
    check(session.world().size() == 1, "alone");
    session.world().barrier();
  }
  MPI_Finalize();
  ok("alone", rank);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view mode = argc > 1 ? argv[1] : "";
  if (mode == "own") {
    return own(argc, argv);
  }
  if (mode == "engine") {
    return engine(argc, argv);
  }
  if (mode == "thread_level") {
    return thread_level(argc, argv);
  }
  if (mode == "late") {
    return late(argc, argv);
  }
  if (mode == "recovered") {
    return recovered(argc, argv);
  }
  if (mode == "unwinding") {
    return unwinding(argc, argv);
  }
  if (mode == "goodbye") {
    return goodbye(argc, argv);
  }
  if (mode == "forked") {
    return forked(argc, argv);
  }
  if (mode == "strangers") {
    return strangers(argc, argv);
  }
  if (mode == "alone") {
    return alone(argc, argv);
  }
  std::puts(
      "usage: mpi_session "
      "own|engine|thread_level|late|recovered|unwinding|goodbye|forked|strangers|alone");
  return 2;
}
