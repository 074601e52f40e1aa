// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <cohort/cohort.hpp>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "support/collective_checks.hpp"
#include "support/group_tensors.hpp"

/// \file
/// One rank that does something else: every other rank gets an error that names it and the place.
/// Bodies for two ranks or more; the last rank is the one that differs.

namespace cohort::test {

/// Throws unless `call` throws a `SymmetryError` that blames exactly `rank` and says every part.
template <class Call, class... Parts>
void check_blames(int rank, const Call& call, Parts&&... parts) {
  try {
    call();
  } catch (const SymmetryError& error) {
    const std::string what = error.what();
    check(error.ranks() == std::vector{rank}, "blames the rank that differs: " + what);
    for (const std::string_view part : {std::string_view(parts)...}) {
      check(what.find(part) != std::string::npos, what + " contains " + std::string(part));
    }
    return;
  }
  throw std::runtime_error("check failed: no SymmetryError was thrown");
}

inline void check_works_on(GroupCoordinator& group) {
  Site site(group, Memory::arena);
  check_all_reduce(group, site, {16, 33}, DType::f32, Form::contiguous);
  check_all_gather(group, site, {4, 5}, 1, std::vector<std::int64_t>(u(group.size()), 5),
                   DType::bf16, Form::contiguous);
}

inline void check_other_size(ControlPlane& world) {
  const int last = world.size() - 1;
  auto state = make_state(world, {.tp = world.size(), .dcp = world.size()});
  auto& arena = *state.dcp().arena();
  const std::int64_t bytes = world.rank() == last ? 3 << 20 : 2 << 20;
  check_blames(
      last, [&] { (void)arena.empty({bytes}, DType::u8, {}); }, "growth of arena dcp[0]", "2097152",
      "3145728");
  check_blames(
      last, [&] { state.dcp().reserve(static_cast<std::size_t>(bytes)); },
      "reservation in arena dcp[0]");
  check_works_on(state.dcp());
}

/// Offsets would differ although nothing failed so far: the next growth notices, where that
/// matters.
inline void check_other_order(ControlPlane& world) {
  const int last = world.size() - 1;
  for (const bool matters : {true, false}) {
    auto state = make_state(world, {.tp = world.size(), .dcp = world.size()},
                            {.backend = host_backend({.needs_equal_offsets = matters})});
    auto& arena = *state.dcp().arena();
    state.dcp().reserve(1 << 20);
    const bool other = world.rank() == last;
    {
      const Tensor a = arena.empty({other ? 5000 : 1000}, DType::u8, {});
      const Tensor b = arena.empty({other ? 1000 : 5000}, DType::u8, {});
      const auto grow = [&] { (void)arena.empty({4 << 20}, DType::u8, {}); };
      if (matters) {
        check_blames(last, grow, "growth of arena dcp[0]", "history");
      } else {
        grow();
      }
      check_works_on(state.tp());
    }
    (void)arena.empty({8 << 20}, DType::u8, {});  // nothing lives that lay elsewhere
    check_works_on(state.dcp());
  }
}

/// A language that collects its garbage releases when it likes. What counts is what lives.
inline void check_other_releases(ControlPlane& world) {
  auto state = make_state(world, {.tp = world.size(), .dcp = world.size()},
                          {.backend = host_backend({.needs_equal_offsets = true})});
  auto& arena = *state.dcp().arena();
  std::mt19937 alike(5);
  std::mt19937 own(static_cast<unsigned>(world.rank()));
  std::vector<Tensor> live;
  for (int round = 0; round < 200; ++round) {
    for (int i = 0; i < 12; ++i) {
      live.push_back(arena.empty({static_cast<std::int64_t>(alike() % 20'000)}, DType::u8, {}));
    }
    std::vector<Tensor> garbage;
    for (int i = 0; i < 10; ++i) {
      const auto index = alike() % live.size();
      garbage.push_back(std::move(live[index]));
      live.erase(live.begin() + static_cast<std::ptrdiff_t>(index));
    }
    std::shuffle(garbage.begin(), garbage.end(), own);
    while (!garbage.empty()) {
      garbage.pop_back();
    }
    state.dcp().reserve(static_cast<std::size_t>(round) * 50'000);  // compares histories
  }
  for (const Tensor& tensor : live) {
    const auto offset = *arena.offset_of(tensor.data());
    for (const auto& bytes :
         state.dcp().control().all_gather(std::as_bytes(std::span(&offset, 1)))) {
      check(std::memcmp(bytes.data(), &offset, sizeof(offset)) == 0, "offsets are equal");
    }
  }
}

/// Calls with arguments that differ and captures that fail on one rank spoil nothing for good.
inline void check_recovery(ControlPlane& world) {
  auto state = make_state(world, {.tp = world.size(), .dcp = world.size()},
                          {.backend = host_backend({.needs_equal_offsets = true})});
  auto& dcp = state.dcp();
  auto& arena = *dcp.arena();
  dcp.reserve(8 << 20);
  const Tensor lives = arena.empty({1000}, DType::u8, {});
  Site site(dcp, Memory::ordinary);
  const auto x = site.filled({4096}, DType::f32);
  const bool other = world.rank() == world.size() - 1;
  check_throws<SymmetryError>([&] { (void)dcp.all_gather(x.slice(0, 0, other ? 32 : 64), 0); },
                              "all_gather");
  dcp.reserve(12 << 20);

  HostStream stream;
  for (int attempt = 0; attempt < (other ? 3 : 0); ++attempt) {
    check_throws<std::logic_error>(
        [&] {
          (void)state.capture(stream, [&] {
            const Tensor taken = arena.empty({attempt * 100'000}, DType::u8, stream);
            throw std::logic_error("the engine's own");
          });
        },
        "the engine's own");
  }
  const auto used = arena.statistics().used;
  for (int round = 0; round < 2; ++round) {
    {
      auto graph = state.capture(stream, [&] { (void)dcp.all_gather(x, 0, stream); });
      graph.launch(stream);
    }
    state.reclaim_graphs();
    check_equal(arena.statistics().used, used, "the graph's memory is back");
  }
  dcp.reserve(16 << 20);
}

/// One rank has no memory left. It throws that, the others quote it, and what fits works on.
inline void check_failed_allocation(ControlPlane& world) {
  const int last = world.size() - 1;
  const std::size_t limit = world.rank() == last ? 8 << 20 : 64 << 20;
  auto state = make_state(world, {.tp = world.size(), .dcp = world.size()},
                          {.backend = host_backend({.segment_limit = limit})});
  auto& arena = *state.dcp().arena();
  const Tensor first = arena.empty({4 << 20}, DType::u8, {});
  const auto grow = [&] { (void)arena.empty({16 << 20}, DType::u8, {}); };
  if (world.rank() == last) {
    check_throws<TransportError>(grow, "code 12", "segment limit of 8388608");
  } else {
    check_blames(last, grow, "allocation of a segment of arena dcp[0]",
                 fmt::format("rank {} failed", last), "code 12", "segment limit of 8388608");
  }
  check_works_on(state.dcp());
  check_equal(arena.statistics().live_blocks, std::uint64_t{1}, "blocks");
}

/// The same in an audience of two groups, which agree over the larger one.
inline void check_failed_audience(ControlPlane& world) {
  const int last = world.size() - 1;
  const std::size_t limit = world.rank() == last ? 8 << 20 : 64 << 20;
  auto state = make_state(world, {.tp = world.size(), .pp = 1, .dcp = world.size() / 2},
                          {.backend = host_backend({.segment_limit = limit})});
  const SymmetricScope scope(state.audience({&state.dcp(), &state.tp()}));
  const auto grow = [] { (void)empty({16 << 20}, DType::u8); };
  if (world.rank() == last) {
    check_throws<TransportError>(grow, "segment limit of 8388608");
  } else {
    check_blames(last, grow, "arena tp", "group tp[0]", "segment limit of 8388608");
  }
  const Tensor x = empty({100}, DType::f32);
  fill(x, world.rank());
  state.tp().all_reduce(x);
  check_works_on(state.dcp());
}

inline void check_other_options(ControlPlane& world) {
  const int last = world.size() - 1;
  const auto create = [&](const ParallelLayout& layout, bool debug) {
    (void)ParallelState::create(
        world, {.layout = layout, .backend = host_backend(), .debug_checks = debug});
  };
  const int n = world.size();
  check_blames(
      last, [&] { create({.tp = n, .dcp = world.rank() == last ? 1 : n}, false); },
      "creation of a ParallelState", fmt::format("tp={} pp=1 dcp=1", n));
  check_blames(
      last, [&] { create({.tp = n}, world.rank() == last); }, "debug checks");
  create({.tp = n, .dcp = n}, false);
}

/// Calls that differ. With debug checks before anything moves; without, as the host notices.
inline void check_other_call(ControlPlane& world, bool debug) {
  const int last = world.size() - 1;
  const bool other = world.rank() == last;
  auto state =
      make_state(world, {.tp = world.size(), .dcp = world.size()}, {.debug_checks = debug});
  auto& dcp = state.dcp();
  const int n = dcp.size();
  Site site(dcp, Memory::arena);
  const auto x = site.filled({4 * n, 6}, DType::f32);
  const auto y = site.tensor({4 * n, 6 * n}, DType::f32);
  const auto halves = site.filled({8 * n, 6}, DType::f16);
  const auto blamed = [&](const std::function<void()>& most, const std::function<void()>& one,
                          std::string_view part) {
    check_blames(last, other ? one : most, part);
    check_works_on(dcp);
  };
  blamed([&] { dcp.all_reduce(x); }, [&] { dcp.all_reduce(x.slice(0, 0, 2)); }, "all_reduce");
  blamed([&] { dcp.all_reduce(x); }, [&] { dcp.all_reduce(x, {}, ReduceOp::max); }, "all_reduce");
  blamed([&] { dcp.all_reduce(x); }, [&] { dcp.all_reduce(halves.slice(0, 0, 4 * n)); }, "f16");
  blamed([&] { dcp.broadcast(x, 0); }, [&] { dcp.broadcast(x, 1); }, "broadcast");
  blamed([&] { dcp.all_gather_into(y, x, 1); }, [&] { dcp.all_reduce(x); }, "all_gather");
  if (debug) {
    // Where a rank's own tensors lie is its own affair, also where they are parts of one another.
    dcp.all_gather_into(x, x.slice(0, 4 * dcp.rank(), 4), 0);
    check_works_on(dcp);
    blamed([&] { dcp.barrier(); }, [&] { dcp.all_reduce(x); }, "barrier");
    const auto out = site.filled({2, 2 * n, 8}, DType::f32);
    const auto lse = site.filled({2, 2 * n}, DType::f32);
    const auto merged = site.filled({2, 2, 8}, DType::f32);
    blamed([&] { dcp.merge_attention_into(merged, out, lse); },
           [&] { dcp.merge_attention_into(merged, out, lse, LseBase::two); }, "merge_attention");
  }
}

/// Query gathers whose bytes would meet though they mean others: parts of other types, or shared
/// out otherwise. On every way that queries go.
inline void check_other_query(ControlPlane& world) {
  const int last = world.size() - 1;
  const bool other = world.rank() == last;
  enum class Way : std::uint8_t { kernels, slots, exchange };
  const auto differ = [&](Way way, bool debug, const Dims& nope, DType nope_type, const Dims& pe,
                          DType pe_type) {
    auto state = ParallelState::create(
        world, {.layout = {.tp = world.size(), .dcp = world.size()},
                .backend = host_backend({.map_peers = way != Way::exchange}),
                .symmetric = {.enabled = way == Way::kernels, .selection = Selection::all()},
                .debug_checks = debug});
    auto& dcp = state.dcp();
    Site site(dcp, Memory::ordinary);
    const auto rest = site.filled({1, 2, 16}, DType::u8);
    const auto scales = site.filled({1, 2, 4}, DType::f32);
    const auto other_rest = site.filled(nope, nope_type);
    const auto other_scales = site.filled(pe, pe_type);
    (void)dcp.gather_query(rest, scales);
    const auto gather = [&] {
      (void)dcp.gather_query(other ? other_rest : rest, other ? other_scales : scales);
    };
    if (way == Way::exchange && !debug) {  // each compares what came to it
      check_throws<SymmetryError>(gather, "calls all_gather");
      world.barrier();  // before the state's end is what the others hear of
    } else {
      check_blames(last, gather, debug ? "gather_query of u8" : "different calls");
    }
  };
  for (const bool debug : {false, true}) {
    for (const Way way : {Way::kernels, Way::slots, Way::exchange}) {
      differ(way, debug, {1, 2, 16}, DType::u8, {1, 2, 8}, DType::bf16);
      differ(way, debug, {1, 2, 16}, DType::f8_e4m3, {1, 2, 4}, DType::f32);
      differ(way, debug, {1, 2, 20}, DType::u8, {1, 2, 3}, DType::f32);
    }
  }
}

/// Merges that differ in base or type are found in every plan, though the bytes of some would meet.
inline void check_other_merge(ControlPlane& world) {
  const int last = world.size() - 1;
  const bool other = world.rank() == last;
  for (const MergePlan plan : {MergePlan::one_kernel, MergePlan::packed, MergePlan::staged}) {
    auto state = make_state(world, {.tp = world.size(), .dcp = world.size()},
                            {.merge = {.plan = plan}, .debug_checks = true});
    auto& dcp = state.dcp();
    Site site(dcp, Memory::ordinary);
    const std::int64_t heads = 2 * dcp.size();
    const auto bf16 = site.filled({2, heads, 8}, DType::bf16);
    const auto f16 = site.filled({2, heads, 8}, DType::f16);
    const auto lse = site.filled({2, heads}, DType::f32);
    const auto peak = dcp.arena()->statistics().peak;
    const auto blamed = [&](const TensorView& out, LseBase base) {
      check_blames(
          last, [&] { (void)dcp.merge_attention(out, lse, base); }, "merge_attention");
    };
    blamed(bf16, other ? LseBase::two : LseBase::e);
    blamed(other ? f16 : bf16, LseBase::e);
    check_equal(dcp.arena()->statistics().peak, peak, "found before it allocates");
    (void)dcp.merge_attention(bf16, lse);
  }
}

/// Without windows graphs end when they like, and debug checks have nothing to say about it.
inline void check_graphs_without_windows(ControlPlane& world) {
  auto state = ParallelState::create(world, {.layout = {.tp = world.size(), .dcp = world.size()},
                                             .backend = host_backend(),
                                             .debug_checks = true,
                                             .arena = {.growth_bytes = 1 << 20}});
  auto& dcp = state.dcp();
  dcp.reserve(1 << 20);
  HostStream stream;
  Site site(dcp, Memory::ordinary);
  const auto x = site.filled({4096}, DType::f32);
  auto graph = std::make_unique<CapturedGraph>(
      state.capture(stream, [&] { (void)dcp.all_gather(x, 0, stream); }));
  if (world.rank() == 0) {
    graph.reset();
  }
  dcp.reserve(2 << 20);
  dcp.all_reduce(x, stream);
  dcp.all_reduce(x, stream);
}

/// The last rank stays away from the call: the others time out, naming it, within the limit.
inline void check_absent(ControlPlane& world, const std::function<void(ParallelState&)>& call,
                         std::string_view place) {
  const int last = world.size() - 1;
  auto state = make_state(world, {.tp = world.size(), .dcp = world.size()});
  world.barrier();
  if (world.rank() == last) {
    std::this_thread::sleep_for(3 * world.limit());
    return;
  }
  const auto start = Clock::now();
  try {
    call(state);
  } catch (const TimeoutError& error) {
    const std::string what = error.what();
    check(error.missing() == std::vector{last}, "names the absent rank: " + what);
    check(what.find(place) != std::string::npos, what + " names the place");
    check(Clock::now() - start < 2 * world.limit(), "ends within the limit");
    // Held until the absent rank is back: destroying a transport is an end of its own.
    std::this_thread::sleep_for(2 * world.limit());
    return;
  }
  throw std::runtime_error("check failed: no TimeoutError was thrown");
}

inline void check_absent_from_growth(ControlPlane& world) {
  check_absent(
      world, [](ParallelState& s) { (void)s.dcp().arena()->empty({9}, DType::u8, {}); },
      "growth of arena dcp[0]");
}
inline void check_absent_from_collective(ControlPlane& world) {
  check_absent(
      world,
      [](ParallelState& s) {
        std::array<float, 4> x{};
        s.dcp().all_reduce(TensorView(x.data(), DType::f32, {4}));
      },
      "dcp[0]");
}
inline void check_absent_from_shutdown(ControlPlane& world) {
  check_absent(
      world, [](ParallelState& s) { s.shutdown(); }, "barrier");
}

}  // namespace cohort::test
