// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <map>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "stand_in/life.hpp"
#include "stand_in/machine.hpp"
#include "stand_in/stand_in.hpp"
#include "support/catch.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::test;
using namespace cohort::test::stand_in;

namespace {

/// No life takes as long unless something hangs, on a busy machine either.
constexpr double kSecondsOfALife = 10;

/// A function that gives something back: where it is refused, one such thing stays.
struct GivesBack {
  std::string function;
  std::string kind;
  std::set<std::string> holds = {};  ///< Kinds of things that stay with it.
};

const std::vector<GivesBack> kGiveBack = {
    {"cuMemAddressFree", "reservation"},
    {"cuMemRelease", "allocation"},
    {"cuMemUnmap", "mapping", {"allocation"}},
    {"cudaEventDestroy", "event"},
    {"cudaFree", "cudaMalloc"},
    {"cudaFreeAsync", "pool block"},
    {"cudaFreeHost", "cudaHostAlloc"},
    {"cudaGraphDestroy", "graph", {"user object", "ncclMemAlloc"}},
    {"cudaGraphExecDestroy", "executable graph", {"user object", "ncclMemAlloc"}},
    {"cudaMemPoolDestroy", "pool"},
    {"cudaStreamDestroy", "stream"},
    {"cudaUserObjectRelease", "user object", {"ncclMemAlloc"}},
    {"ncclCommDestroy", "communicator"},
    {"ncclCommWindowDeregister", "window"},
    {"ncclMemFree", "ncclMemAlloc"},
};

/// Whether nothing is left, or what the refused function was to give back.
bool only_refused_is_alive(const Report& report, const std::optional<Refusal>& refusal) {
  const auto known = std::find_if(kGiveBack.begin(), kGiveBack.end(), [&](const GivesBack& entry) {
    return refusal && entry.function == refusal->function;
  });
  return std::all_of(report.alive.begin(), report.alive.end(), [&](const auto& alive) {
    const auto& [kind, number] = alive;
    return known != kGiveBack.end() &&
           ((kind == known->kind && number == 1) || known->holds.contains(kind));
  });
}

/// Until what the library gives back by threads of its own is gone.
constexpr std::chrono::milliseconds kGivesBack{2'000};

struct Outcome {
  std::vector<End> ends;
  Report report;
  double seconds = 0;
  bool gave_back = false;  ///< All but what was refused.
};

Outcome run(const LifeOptions& options = {}, const std::optional<Refusal>& refusal = {}) {
  ::setenv("NCCL_HOSTID", "stand-in", 0);
  begin(refusal);
  const auto start = Clock::now();
  Outcome outcome;
  outcome.ends = live(options);
  outcome.seconds = seconds_since(start);
  outcome.gave_back = wait_until(kGivesBack, [&] {  // threads of the library's own may have to
    outcome.report = report();
    return only_refused_is_alive(outcome.report, refusal);
  });
  return outcome;
}

void check_ended_well(const Outcome& outcome) {
  for (const End& end : outcome.ends) {
    CHECK(end.text.empty());
    CHECK(end.stage == Stage::shutdown);
  }
  CHECK(outcome.report.misuses == std::vector<std::string>{});
  CHECK(outcome.report.alive == std::map<std::string, long>{});
  CHECK(outcome.seconds < kSecondsOfALife);
}

}  // namespace

TEST_CASE("a life without a failure leaves nothing", "[stand_in]") {
  const int ranks = GENERATE(2, 3);
  const bool peer_mapping = GENERATE(true, false);
  CAPTURE(ranks, peer_mapping);
  check_ended_well(run({.ranks = ranks, .peer_mapping = peer_mapping}));
}

namespace {

/// A function that the sweep leaves out, and why.
struct LeftOut {
  std::string function;
  std::string reason;
};

const std::vector<LeftOut> kLeftOut = {
    {"ncclCommInitRankConfig",
     "the other ranks wait within NCCL, which cannot be ended: their threads stay behind"},
    {"ncclCommWindowRegister",
     "the other ranks wait within NCCL, which cannot be ended: their threads stay behind"},
};

bool left_out(const std::string& function) {
  return std::any_of(kLeftOut.begin(), kLeftOut.end(),
                     [&](const LeftOut& known) { return known.function == function; });
}

/// The first, a middle and the last call of each function whose name begins so, each on one device,
/// in turn the one and the other.
std::vector<Refusal> refusals(const CallCounts& calls, const std::string& prefix) {
  std::vector<Refusal> chosen;
  std::set<std::string> functions;
  for (const auto& [key, made] : calls) {
    if (key.first.starts_with(prefix)) {
      functions.insert(key.first);
    }
  }
  int turn = 0;
  for (const std::string& function : functions) {
    if (left_out(function)) {
      continue;
    }
    for (const double part : {0.0, 0.5, 1.0}) {
      const int device = calls.contains({function, turn % 2}) ? turn % 2 : 1 - turn % 2;
      const auto made = static_cast<double>(calls.at({function, device}));
      const long call = 1 + static_cast<long>(part * (made - 1));
      if (chosen.empty() || chosen.back().function != function || chosen.back().call != call) {
        chosen.push_back({function, device, call});
      }
      ++turn;
    }
  }
  return chosen;
}

/// One rank was refused a call: whoever ends does so by an error of the library, and by one cause.
void check_refused(const Outcome& outcome, const Refusal& refusal) {
  const End& here = outcome.ends[static_cast<std::size_t>(refusal.device)];
  const End& there = outcome.ends[static_cast<std::size_t>(1 - refusal.device)];
  CHECK(outcome.seconds < kSecondsOfALife);
  CHECK(outcome.report.misuses == std::vector<std::string>{});
  CHECK(here.typed == here.threw);
  CHECK(there.typed == there.threw);
  if (here.stage != Stage::prepare && here.stage != Stage::shutdown) {
    CHECK(here.threw == there.threw);
  }
  // A thread of the library's own may have been refused for the rank on the other device.
  const bool swapped = contains(there.text).match(here.text);
  const End& cause = swapped ? there : here;
  if (cause.threw && tells(cause.stage)) {
    CHECK_THAT((swapped ? here : there).text, contains(cause.text));
  }
  CAPTURE(outcome.report.alive);
  CHECK(outcome.gave_back);
}

/// A life for each refusal of a function whose name begins so; there are `least` at the least.
void sweep(const LifeOptions& options, const std::string& prefix, std::size_t least) {
  check_ended_well(run(options));  // asks what is asked once in a process
  const Outcome counted = run(options);
  check_ended_well(counted);
  const std::vector<Refusal> chosen = refusals(counted.report.calls, prefix);
  CHECK(chosen.size() >= least);
  for (const Refusal& refusal : chosen) {
    const Outcome outcome = run(options, refusal);
    const End& first = outcome.ends[0];
    const End& second = outcome.ends[1];
    CAPTURE(refusal.function, refusal.device, refusal.call, outcome.report.refused, outcome.seconds,
            first.text, second.text, static_cast<int>(first.stage), static_cast<int>(second.stage));
    CHECK((outcome.report.refused || refusal.call > 1));  // how often some ask depends on the time
    check_refused(outcome, refusal);
  }
}

}  // namespace

TEST_CASE("a call that is refused to one rank ends all by one cause", "[stand_in]") {
  SECTION("with the library's own kernels") { sweep({}, "", 100); }
  SECTION("by NCCL alone") { sweep({.peer_mapping = false}, "nccl", 25); }
}

TEST_CASE("an engine's own error on one rank ends the others by errors of the library",
          "[stand_in]") {
  const auto stage = GENERATE(Stage::create, Stage::reserve, Stage::collectives, Stage::messages,
                              Stage::synchronize, Stage::merge, Stage::capture, Stage::launch,
                              Stage::wait, Stage::grow, Stage::shutdown);
  const int thrower = static_cast<int>(stage) % 2;
  const Outcome outcome = run({.control_limit = std::chrono::milliseconds(800),
                               .wait_limit = std::chrono::milliseconds(400),
                               .before = [&](int rank, Stage begun) {
                                 if (rank == thrower && begun == stage) {
                                   throw std::runtime_error("the engine's own");
                                 }
                               }});
  const End& here = outcome.ends[static_cast<std::size_t>(thrower)];
  const End& there = outcome.ends[static_cast<std::size_t>(1 - thrower)];
  CAPTURE(static_cast<int>(stage), here.text, there.text, outcome.report.alive);
  CHECK(outcome.seconds < kSecondsOfALife);
  CHECK(outcome.report.misuses == std::vector<std::string>{});
  CHECK(here.text == "the engine's own");
  CHECK(there.threw);
  CHECK(there.typed);
  CHECK(outcome.gave_back);
}

TEST_CASE("a rank that is late within the limits disturbs nobody", "[stand_in]") {
  const auto stage = GENERATE(Stage::create, Stage::collectives, Stage::synchronize, Stage::capture,
                              Stage::launch, Stage::shutdown);
  CAPTURE(static_cast<int>(stage));
  check_ended_well(run({.before = [&](int rank, Stage begun) {
    if (rank == static_cast<int>(stage) % 2 && begun == stage) {
      std::this_thread::sleep_for(std::chrono::milliseconds(200));
    }
  }}));
}
