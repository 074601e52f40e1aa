// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cohort/cohort.hpp>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "support/collective_checks.hpp"
#include "support/group_tensors.hpp"

/// \file
/// What arenas and scopes promise, as bodies that every rank runs.

namespace cohort::test {

/// Whether every rank of the group gives the same number.
inline void check_equal_on_ranks(GroupCoordinator& group, std::uint64_t value,
                                 std::string_view what) {
  for (const auto& bytes : group.control().all_gather(std::as_bytes(std::span(&value, 1)))) {
    std::uint64_t theirs = 0;
    std::memcpy(&theirs, bytes.data(), sizeof(theirs));
    check_equal(theirs, value, what);
  }
}

/// The half of the ranks of a TP group that is a DCP group: at 4 ranks, DCP groups of 2.
[[nodiscard]] inline ParallelLayout halved(int world) {
  return {.tp = world, .pp = 1, .dcp = world % 2 == 0 ? world / 2 : world};
}

/// Arenas of two groups and one of both at once, each registered with whom it should be.
inline void check_audiences(ControlPlane& world) {
  auto state = make_state(world, halved(world.size()));
  const auto both = state.audience({&state.tp(), &state.dcp()});
  check(state.audience({&state.dcp(), &state.tp()}).arena == both.arena, "one audience, one arena");
  check_throws<UsageError>([&] { (void)state.audience({nullptr}); }, "audience groups");
  check_throws<UsageError>(
      [&] {
        (void)state.audience({&state.tp(), &state.tp()});
      },
      "audience groups");
  if (world.size() == 1) {
    check(both.arena == nullptr, "no audience without windows");
    return;
  }
  std::vector<std::pair<ScopeTarget, std::vector<GroupCoordinator*>>> targets{
      {state.tp(), {&state.tp()}}, {both, {&state.tp(), &state.dcp()}}};
  if (state.dcp().size() > 1) {
    targets.push_back({state.dcp(), {&state.dcp()}});
  }
  // More than peers copy through slots, so that the path tells whether there is a window.
  constexpr std::int64_t kRows = 64;
  const std::int64_t columns = 1024 * state.tp().size();
  for (const auto& [target, groups] : targets) {
    const SymmetricScope scope(target);
    check(!scope.is_null(), "a scope with windows");
    const Tensor x = empty({kRows, columns}, DType::f32);
    for (GroupCoordinator* group : {static_cast<GroupCoordinator*>(&state.tp()),
                                    static_cast<GroupCoordinator*>(&state.dcp())}) {
      const bool registered = std::find(groups.begin(), groups.end(), group) != groups.end();
      if (group->size() == 1) {
        continue;
      }
      check(group->path(Collective::all_gather, x, x) == (registered ? "direct" : "slot"),
            "path of a tensor in arena " + target.arena->name());
      fill(x, group->rank());
      group->all_reduce(x);
      check_values(x, "all_reduce", [&](std::int64_t flat) {
        std::int64_t sum = 0;
        for (int r = 0; r < group->size(); ++r) {
          sum += value_at(r, flat);
        }
        return sum;
      });
    }
    check_equal_on_ranks(*groups[0], *target.arena->offset_of(x.data()), "offset");
    check_equal_on_ranks(*groups[0], target.arena->history(), "history");
  }
}

/// A tensor whose first and last bytes name it, so that another that overlaps it is found out.
struct Marked {
  Tensor tensor;
  std::uint32_t mark = 0;

  Marked(Tensor made, std::uint32_t number) : tensor(std::move(made)), mark(number) {
    std::memcpy(tensor.data(), &mark, sizeof(mark));
    std::memcpy(last(), &mark, sizeof(mark));
  }
  [[nodiscard]] bool intact() const {
    return std::memcmp(tensor.data(), &mark, sizeof(mark)) == 0 &&
           std::memcmp(last(), &mark, sizeof(mark)) == 0;
  }

 private:
  [[nodiscard]] std::byte* last() const {
    return static_cast<std::byte*>(tensor.data()) + tensor.view().bytes() - sizeof(mark);
  }
};

/// A million random allocations and releases, the same on every rank: aligned, apart, at equal
/// offsets, and one block a segment again at the end.
inline void check_equal_offsets(ControlPlane& world) {
  auto state = make_state(world, {.tp = world.size(), .dcp = world.size()});
  auto& group = state.dcp();
  auto& arena = *group.arena();
  std::mt19937 random(11);
  std::vector<Marked> live;
  std::uint64_t hash = 0;
  for (std::uint32_t i = 0; i < 1'000'000; ++i) {
    if (live.size() < 20 || (live.size() < 300 && random() % 2 == 0)) {
      const auto bytes = static_cast<std::int64_t>(2 * sizeof(i) + random() % 50'000);
      live.emplace_back(arena.empty({bytes}, DType::u8, {}), i);
      const auto offset = *arena.offset_of(live.back().tensor.data());
      check(offset % OffsetAllocator::kAlignment == 0, "aligned");
      hash = hash * 31 + offset;
    } else {
      const auto index = random() % live.size();
      check(live[index].intact(), "a block is its owner's alone");
      live[index] = std::move(live.back());
      live.pop_back();
    }
  }
  check_equal_on_ranks(group, hash, "all offsets");
  check_equal_on_ranks(group, arena.history(), "history");
  const auto grown = arena.statistics();
  check(grown.segments > 1, "the arena grew more than once");
  live.clear();
  check_equal(arena.statistics().used, std::uint64_t{0}, "all is free");
  // Each segment holds at least the growth of `make_state`, and is one block again.
  std::vector<Tensor> whole;
  for (std::size_t segment = 0; segment < grown.segments; ++segment) {
    whole.push_back(arena.empty({1 << 20}, DType::u8, {}));
  }
  check_equal(arena.statistics().segments, grown.segments, "blocks have coalesced");
}

inline void check_growth(ControlPlane& world) {
  auto state = make_state(world, {.tp = world.size(), .dcp = world.size()});
  auto& group = state.dcp();
  auto& arena = *group.arena();
  group.reserve(3 << 20);
  check_equal(arena.statistics().segments, std::size_t{1}, "segments");
  group.reserve(2 << 20);
  check_equal(arena.statistics().segments, std::size_t{1}, "segments");
  auto a = arena.empty({3 << 20}, DType::u8, {});
  auto b = arena.empty({100}, DType::u8, {});
  check_equal(arena.statistics().segments, std::size_t{2}, "segments after growth");
  group.freeze();
  check_throws<UsageError>([&] { (void)arena.empty({2 << 20}, DType::u8, {}); },
                           "frozen and exhausted", "2097152 bytes are needed",
                           "1048320 of 4194304 are free", "the peak so far is 3145984");
  check_throws<UsageError>([&] { group.reserve(8 << 20); }, "frozen");
  a.reset();
  auto again = arena.empty({2 << 20}, DType::u8, {});
  check_equal_on_ranks(group, *arena.offset_of(again.data()), "offset");
  Site site(group, Memory::ordinary);  // the group works on
  check_all_reduce(group, site, {8, 9}, DType::f32, Form::contiguous);
}

/// All-reduces, gathers and scatters over TP of what lies in DCP's arena.
inline void check_tensor_of_another_arena(ControlPlane& world) {
  auto state = make_state(world, halved(world.size()));
  for (const std::int64_t columns : {7, 4096}) {
    const SymmetricScope scope(state.dcp());
    const Tensor x = empty({8, columns}, DType::bf16);
    fill(x, state.tp().rank());
    state.tp().all_reduce(x);
    check_values(x, "TP all_reduce", [&](std::int64_t flat) {
      std::int64_t sum = 0;
      for (int r = 0; r < state.tp().size(); ++r) {
        sum += value_at(r, flat);
      }
      return sum;
    });
    fill(x, state.dcp().rank());
    state.dcp().all_reduce(x);
    check_values(x, "DCP all_reduce", [&](std::int64_t flat) {
      std::int64_t sum = 0;
      for (int r = 0; r < state.dcp().size(); ++r) {
        sum += value_at(r, flat);
      }
      return sum;
    });
  }
}

/// What a process holds of the system.
struct Holdings {
  std::size_t descriptors = 0;
  std::size_t mappings = 0;
  std::size_t files = 0;  ///< So named, where shared memory and temporary files are.

  [[nodiscard]] static Holdings now() {
    Holdings found;
    found.descriptors = count("/proc/self/fd", "");
    found.files = count("/dev/shm", "cohort.") +
                  count(std::filesystem::temp_directory_path().string(), "cohort.");
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) {
      found.mappings += line.find("cohort.") != std::string::npos ? 1U : 0U;
    }
    return found;
  }

 private:
  [[nodiscard]] static std::size_t count(const std::string& directory, std::string_view part) {
    std::error_code absent;
    std::size_t entries = 0;
    for (const auto& entry : std::filesystem::directory_iterator(directory, absent)) {
      entries += entry.path().filename().string().find(part) != std::string::npos ? 1U : 0U;
    }
    return entries;
  }
};

/// Creates and destroys states that are used in between. Nothing is compared here: ranks that are
/// threads share their process.
inline void create_and_destroy(ControlPlane& world, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    auto state = make_state(world, halved(world.size()));
    const SymmetricScope scope(state.audience({&state.tp(), &state.dcp()}));
    const Tensor x = empty({64}, DType::f32);
    fill(x, world.rank());
    state.tp().all_reduce(x);
    if (round % 2 == 0) {
      state.shutdown();
    }
  }
  world.barrier();
}

}  // namespace cohort::test
