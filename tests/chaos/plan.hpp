// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

/// \file
/// What happens in one round of chaos: a value that follows from its seed alone, so that every rank
/// computes it and any round can be repeated.

namespace cohort::chaos {

/// What goes wrong on the victim.
enum class Fault : std::uint8_t {
  kill,         ///< SIGKILL, at a random moment.
  stop,         ///< SIGSTOP for longer than the time limit, at a random moment.
  hesitate,     ///< Comes late, but within the limit.
  late,         ///< Comes when the limit is over.
  throws,       ///< The engine throws and unwinds; the process leaves in order.
  arguments,    ///< Passes other arguments than its peers.
  memory,       ///< May not allocate any more.
  descriptors,  ///< May not open any more descriptors.
  signals,      ///< Every rank gets a signal each 200 us.
  allocation,   ///< An allocation of the engine or the library fails, and perhaps all behind it.
};
inline constexpr int kFaults = 10;

/// What the victim makes of a call when it passes other arguments.
enum class Other : std::uint8_t { extent, dtype, call, nothing };

enum class Phase : std::uint8_t { forming, reserving, calling, capturing, replaying, leaving };
inline constexpr int kPhases = 6;

[[nodiscard]] constexpr std::string_view to_string(Fault fault) noexcept {
  constexpr std::array<std::string_view, kFaults> kNames{
      "kill",      "stop",   "hesitate",    "late",    "throws",
      "arguments", "memory", "descriptors", "signals", "allocation"};
  return kNames[static_cast<std::size_t>(fault)];
}

[[nodiscard]] constexpr std::string_view to_string(Phase phase) noexcept {
  constexpr std::array<std::string_view, kPhases> kNames{"forming",   "reserving", "calling",
                                                         "capturing", "replaying", "leaving"};
  return kNames[static_cast<std::size_t>(phase)];
}

/// Random numbers that are the same on every machine: splitmix64 (Steele, Lea, Flood: "Fast
/// splittable pseudorandom number generators", 2014).
class Random {
 public:
  explicit constexpr Random(std::uint64_t seed) noexcept : state_(seed) {}

  constexpr std::uint64_t next() noexcept {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15ULL;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
  }
  /// In [0, bound).
  constexpr int below(int bound) noexcept {
    return static_cast<int>(next() % static_cast<std::uint64_t>(bound));
  }
  constexpr bool one_in(int n) noexcept { return below(n) == 0; }

 private:
  std::uint64_t state_;
};

/// How many steps a rank makes in each phase, but for forming and leaving.
inline constexpr int kSteps = 8;

struct Plan {
  std::uint64_t seed = 0;
  int ranks = 2;
  int tp = 2;
  int pp = 1;
  int dcp = 1;
  bool symmetric = true;
  bool map_peers = true;
  bool small_slots = false;
  bool debug_checks = false;
  bool mixed_memory = true;  ///< A call's tensors lie in the arena on some ranks only.
  int merge_plan = 0;        ///< Of automatic, staged and packed.
  Fault fault = Fault::kill;
  Phase phase = Phase::calling;
  int victim = 0;
  int step = 0;              ///< Of the phase, at which the fault comes.
  int delay_us = 0;          ///< From that step's start, for faults at a random moment.
  bool keeps_state = false;  ///< Survivors form the next state while they still hold the old one.
  Other other = Other::extent;
  int allocations = 0;           ///< Until the one that fails.
  bool allocates_again = false;  ///< Behind the one that failed.
  bool shuts_down = true;        ///< Or each rank destroys its state when it likes.
};

[[nodiscard]] constexpr Plan plan_of(std::uint64_t seed, int most_ranks) noexcept {
  Random random(seed * 0x2545f4914f6cdd1dULL + 1);
  Plan plan;
  plan.seed = seed;
  plan.ranks = 2 + random.below(most_ranks - 1);
  plan.tp = plan.ranks;
  if (plan.ranks % 2 == 0 && random.one_in(3)) {
    plan.tp = plan.ranks / 2;
    plan.pp = 2;
  }
  do {
    plan.dcp = 1 + random.below(plan.tp);
  } while (plan.tp % plan.dcp != 0);
  plan.symmetric = !random.one_in(4);
  plan.map_peers = !random.one_in(4);
  plan.small_slots = random.one_in(3);
  plan.debug_checks = random.one_in(4);
  plan.mixed_memory = !plan.debug_checks;  // they compare where the ranks' tensors lie
  plan.merge_plan = random.below(3);
  plan.fault = static_cast<Fault>(random.below(kFaults - 1));
  plan.phase = static_cast<Phase>(random.below(kPhases));
  plan.victim = random.below(plan.ranks);
  const bool one_step = plan.phase == Phase::forming || plan.phase == Phase::leaving;
  plan.step = one_step ? 0 : random.below(kSteps);
  plan.delay_us = random.below(3) * random.below(1000);
  plan.keeps_state = random.one_in(3);
  // Apart from the above, which seeds that are kept depend on.
  Random more(seed * 0xda942042e4dd58b5ULL + 1);
  plan.other = static_cast<Other>(more.below(4));
  plan.allocations = more.below(more.one_in(2) ? 12 : 200);
  plan.allocates_again = more.one_in(2);
  plan.shuts_down = !more.one_in(4);
  if (plan.fault == Fault::memory && more.one_in(2)) {
    plan.fault = Fault::allocation;
  }
  return plan;
}

}  // namespace cohort::chaos
