// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cohort/cohort.hpp>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "support/decode_cases.hpp"
#include "support/group_tensors.hpp"
#include "support/skip.hpp"

/// \file
/// The DCP step, as bodies that every rank runs: its merges, what places its tokens, and its room.
/// That of queries is in query_checks.hpp.

namespace cohort::test {

/// Every plan, type, base, layout and memory. Odd counts of heads for each rank, and no queries.
inline void check_merges(ControlPlane& world) {
  const int n = world.size();
  std::vector<DecodeCase> cases;
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const LseBase base : {LseBase::e, LseBase::two}) {
      for (const bool heads_first : {false, true}) {
        for (const Memory memory : {Memory::arena, Memory::ordinary, Memory::mixed}) {
          cases.push_back({.batch = 3,
                           .heads = 3 * n,
                           .dim = 40,
                           .dtype = dtype,
                           .base = base,
                           .heads_first = heads_first,
                           .memory = memory});
        }
        cases.push_back({.batch = 5,
                         .heads = n,
                         .dim = 512,
                         .dtype = dtype,
                         .base = base,
                         .heads_first = heads_first});
        cases.push_back({.batch = 2,
                         .heads = n,
                         .dim = 7,
                         .dtype = dtype,
                         .base = base,
                         .heads_first = heads_first,
                         .all_empty = true});
        cases.push_back({.batch = 0,
                         .heads = n,
                         .dim = 8,
                         .dtype = dtype,
                         .base = base,
                         .heads_first = heads_first});
      }
    }
  }
  cases.push_back({.batch = 16, .heads = 16 * n, .dim = 128, .dtype = DType::bf16});  // by window

  auto packed = decode_state(world, {.plan = MergePlan::packed});
  auto one_kernel = decode_state(world, {.plan = MergePlan::one_kernel});
  auto automatic = decode_state(world, {});
  auto staged = decode_state(world, {.plan = MergePlan::staged});
  auto staged_narrow = decode_state(
      world, {.plan = MergePlan::staged, .staged_precision = StagedPrecision::partial});
  auto far = decode_state(world, {.plan = MergePlan::packed}, {.map_peers = false});
  auto small_slots = decode_state(world, {.plan = MergePlan::one_kernel}, {.slot_bytes = 4096});
  auto ordinary = decode_state(world, {.plan = MergePlan::one_kernel}, {}, false);
  for (std::size_t i = 0; i < cases.size(); ++i) {
    const auto& c = cases[i];
    const auto name = [&](const char* plan) { return fmt::format("{}, case {}", plan, i); };
    const auto bits = merge_once(packed, c, name("packed"));
    check(merge_once(one_kernel, c, name("one_kernel")) == bits, name("one_kernel is packed"));
    check(merge_once(automatic, c, name("automatic")) == bits, name("automatic is packed"));
    check(merge_once(far, c, name("packed, far")) == bits, name("far is packed"));
    check(merge_once(ordinary, c, name("ordinary")) == bits, name("ordinary is packed"));
    if (c.dim * static_cast<std::int64_t>(size_of(c.dtype)) * n < 3500) {
      check(merge_once(small_slots, c, name("slots")) == bits, name("small slots are packed"));
    }
    (void)merge_once(staged, c, name("staged"));
    (void)merge_once(staged_narrow, c, name("staged, narrow"), true);
  }
  if (n > 1) {
    check(one_kernel.dcp().last_merge_choice().plan == MergePlan::one_kernel, "forced plan");
    check(automatic.dcp().last_merge_choice().plan == MergePlan::one_kernel, "automatic plan");
    check(staged.dcp().last_merge_choice().plan == MergePlan::staged, "staged plan");
  }
}

/// Equal LSEs over a power of two of ranks weigh exactly 1/n; the only rank with tokens counts
/// alone. Both answers are exact.
inline void check_exact_merges(ControlPlane& world) {
  const int n = world.size();
  for (const MergePlan plan : {MergePlan::staged, MergePlan::packed, MergePlan::one_kernel}) {
    auto state = decode_state(world, {.plan = plan});
    auto& dcp = state.dcp();
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      Site site(dcp, Memory::ordinary);
      const auto out = site.tensor({2, n, 24}, dtype);
      const auto lse = site.tensor({2, n}, DType::f32);
      fill_with(out, [&](std::int64_t flat) { return n * value_at(dcp.rank(), flat); });
      fill_with(lse, [](std::int64_t) { return 3; });
      const auto at = [&](std::int64_t flat) {  // in [2, n, 24]
        return (flat / 24 * n + dcp.rank()) * 24 + flat % 24;
      };
      if ((n & (n - 1)) == 0) {
        const auto merged = dcp.merge_attention(out, lse);
        check_values(merged, "mean", [&](std::int64_t flat) {
          std::int64_t sum = 0;
          for (int r = 0; r < n; ++r) {
            sum += value_at(r, at(flat));
          }
          return sum;
        });
      }
      const int only = n / 2;
      walk(lse, [&](std::int64_t, const std::byte* address) {
        store_float(DType::f32, address,
                    dcp.rank() == only ? 1e4 : -std::numeric_limits<double>::infinity());
      });
      const auto merged = dcp.merge_attention(out, lse, LseBase::two);
      check_values(merged, "the only rank",
                   [&](std::int64_t flat) { return n * value_at(only, at(flat)); });
    }
  }
}

/// A step's counts and slots, eagerly and in a graph that finds other lengths at each replay: those
/// of all ranks make up the sequences.
inline void check_placed_steps(ControlPlane& world) {
  const int n = world.size();
  auto state = decode_state(world, {});
  auto& dcp = state.dcp();
  constexpr std::int64_t kBatch = 17;
  for (const std::int64_t q : {1, 2, 5}) {
    for (const std::int64_t interleave : {1, 3}) {
      const dcp::KvShard shard(n, interleave);
      HostStream stream;
      Site site(dcp, Memory::ordinary, stream);
      const auto lengths = site.tensor({kBatch}, DType::i32);
      const auto counts = site.tensor({kBatch, q}, DType::i32, Form::transposed);
      const auto whole = site.tensor({kBatch}, DType::i32);
      const auto slots = site.tensor({kBatch, q}, DType::i64, Form::sliced);
      const auto fresh = site.tensor({kBatch}, DType::i32);
      const auto ragged = site.tensor({kBatch, q}, DType::i32);
      const auto ragged_slots = site.tensor({kBatch, q}, DType::i64);
      const auto place = [&] {
        dcp.place_step(
            shard,
            {.lengths = lengths, .new_tokens = fresh, .counts = ragged, .slots = ragged_slots},
            stream);
        dcp.place_step(shard, {.lengths = lengths, .counts = counts, .slots = slots}, stream);
        dcp.place_step(shard, {.lengths = lengths, .counts = whole}, stream);
      };
      const auto check_all = [&](int round) {
        const auto length = [&](std::int64_t b) { return (b * 7 + round) % 23; };
        const auto visible = [&](std::int64_t flat) {
          return std::max<std::int64_t>(length(flat / q) - (q - 1 - flat % q), 0);
        };
        check_values(whole, "whole",
                     [&](std::int64_t b) { return shard.local_count(length(b), dcp.rank()); });
        check_values(counts, "counts", [&](std::int64_t flat) {
          return shard.local_count(visible(flat), dcp.rank());
        });
        check_values(slots, "slots", [&](std::int64_t flat) {
          const std::int64_t token = visible(flat) - 1;
          return token >= 0 && shard.owner(token) == dcp.rank() ? shard.local_index(token) : -1;
        });
        const auto visible_ragged = [&](std::int64_t flat) {
          const std::int64_t k = (flat / q + round) % (q + 1);
          const std::int64_t to = length(flat / q) - (k - 1 - flat % q);
          return flat % q < k ? std::max<std::int64_t>(to, 0) : 0;
        };
        check_values(ragged, "ragged counts", [&](std::int64_t flat) {
          return shard.local_count(visible_ragged(flat), dcp.rank());
        });
        check_values(ragged_slots, "ragged slots", [&](std::int64_t flat) {
          const std::int64_t token = visible_ragged(flat) - 1;
          return token >= 0 && shard.owner(token) == dcp.rank() ? shard.local_index(token) : -1;
        });
        Tensor sum = dcp.backend().allocate({kBatch, q}, DType::i32, stream);
        dcp.all_reduce_into(sum, counts, stream);
        check_values(sum, "all ranks' counts", visible);
      };
      const auto set = [&](int round) {
        fill_with(lengths, [&](std::int64_t b) { return (b * 7 + round) % 23; });
        fill_with(fresh, [&](std::int64_t b) { return (b + round) % (q + 1); });
      };
      set(0);
      place();
      check_all(0);
      auto graph = state.capture(stream, place);
      for (int round = 1; round < 4; ++round) {
        set(round);
        graph.launch(stream);
        check_all(round);
      }
      check_throws<UsageError>(
          [&] {
            dcp.place_step(dcp::KvShard(n + 1), {.lengths = lengths, .counts = counts}, stream);
          },
          "place_step shard", fmt::format("{} ranks, got {}", n, n + 1));
    }
  }
  state.shutdown();
  check_throws<UsageError>([&] { dcp.place_step(dcp::KvShard(n), {}); }, "after shutdown");
}

/// Steps of random shapes up to what was reserved, eager and captured, in a frozen arena.
inline void check_reserved_steps(ControlPlane& world) {
  const int n = world.size();
  for (unsigned seed = 1; seed <= 40; ++seed) {
    std::mt19937 random(seed);
    const auto up_to = [&](std::int64_t most) {
      return static_cast<std::int64_t>(random() % static_cast<unsigned>(most + 1));
    };
    ParallelOptions options;
    options.merge.plan =
        std::array{MergePlan::staged, MergePlan::packed, MergePlan::automatic}[random() % 3];
    options.merge.staged_precision =
        random() % 2 == 0 ? StagedPrecision::f32 : StagedPrecision::partial;
    options.arena.growth_bytes = 4096;
    options.backend = host_backend({.slot_bytes = 65536, .map_peers = random() % 3 != 0});
    auto state = make_state(world, {.tp = n, .dcp = n}, std::move(options));
    auto& dcp = state.dcp();
    const DecodeShape most{.batch = 1 + up_to(15),
                           .heads = n * (1 + up_to(3)),
                           .latent = up_to(2) * 128,
                           .rope = up_to(1) * 64,
                           .value = 1 + up_to(1023),
                           .dtype = random() % 2 == 0 ? DType::bf16 : DType::f32,
                           .query_dtype = random() % 2 == 0 ? DType::f8_e4m3 : DType::f16,
                           .rope_dtype = random() % 2 == 0 ? DType::f32 : DType::f16};
    dcp.reserve_for(most);
    dcp.freeze();
    const auto segments = dcp.arena()->statistics().segments;
    const Tensor memory = state.backend().allocate({16 * 4 * n * 1024 * 4}, DType::u8, {});
    std::memset(memory.data(), 0, memory.bytes());
    const auto view = [&](const Dims& shape, DType dtype) {
      return TensorView(memory.data(), dtype, shape);
    };
    HostStream stream;
    // What a step returned lives on, at times, until the next of its kind.
    std::vector<Tensor> eager;
    std::vector<Tensor> captured;
    const auto step = [&](const DecodeShape& s, std::vector<Tensor>& alive) {
      alive.clear();
      Tensor q = dcp.gather_query(view({s.batch, s.heads / n, s.latent}, *s.query_dtype),
                                  view({s.batch, s.heads / n, s.rope}, *s.rope_dtype), stream);
      if (random() % 2 == 0) {
        q.reset();
      }
      Tensor merged = dcp.merge_attention(view({s.batch, s.heads, s.value}, s.dtype),
                                          view({s.batch, s.heads}, DType::f32), LseBase::e, stream);
      if (random() % 2 == 0) {
        alive.push_back(std::move(q));
      }
      if (random() % 2 == 0) {
        alive.push_back(std::move(merged));
      }
    };
    GraphPool pool;
    std::vector<CapturedGraph> graphs;
    const auto capture = [&](const DecodeShape& s) {
      graphs.push_back(state.capture(
          stream, [&] { step(s, captured); }, &pool));
    };
    step(most, eager);
    capture(most);
    for (int i = 0; i < 6; ++i) {
      const DecodeShape s{.batch = up_to(most.batch),
                          .heads = n * up_to(most.heads / n),
                          .latent = up_to(most.latent),
                          .rope = up_to(most.rope),
                          .value = up_to(most.value),
                          .dtype = most.dtype,
                          .query_dtype = most.query_dtype,
                          .rope_dtype = most.rope_dtype};
      step(s, eager);
      capture(i % 2 == 0 ? s : most);
      if (i % 3 != 0) {
        step(most, eager);
      }
    }
    check_equal(dcp.arena()->statistics().segments, segments, "segments");
  }
}

/// reserve_for, then freeze: every plan is exact at any step up to the size.
inline void check_reserved_decode(ControlPlane& world) {
  const int n = world.size();
  for (const MergePlan plan : kMergePlans) {
    for (const StagedPrecision precision : {StagedPrecision::f32, StagedPrecision::partial}) {
      for (const DType dtype : {DType::bf16, DType::f32}) {
        auto state = decode_state(world, {.plan = plan, .staged_precision = precision});
        auto& dcp = state.dcp();
        dcp.reserve_for(
            {.batch = 9, .heads = 3 * n, .latent = 64, .rope = 16, .value = 40, .dtype = dtype});
        const auto segments = dcp.arena()->statistics().segments;
        dcp.freeze();
        for (const std::int64_t batch : {9, 1, 4, 9, 0, 9}) {
          const DecodeCase c{.batch = batch, .heads = 3 * n, .dim = 40, .dtype = dtype};
          std::vector<std::byte> memory(u(9 * 3 * n * 80 * 4 + 64) * 4);
          std::byte* next = memory.data();
          const auto take = [&](const Dims& shape, DType type) {
            const TensorView view(next, type, shape);
            next += (view.bytes() + 63) / 64 * 64;
            return view;
          };
          const auto nope = take({batch, 3, 64}, dtype);
          const auto pe = take({batch, 3, 16}, dtype);
          const auto out = take({batch, 3 * n, 40}, dtype);
          const auto lse = take({batch, 3 * n}, DType::f32);
          walk(lse, [&](std::int64_t row, const std::byte* address) {
            store_float(DType::f32, address, lse_at(c, dcp.rank(), n, row));
          });
          walk(out, [&](std::int64_t flat, const std::byte* address) {
            store_float(dtype, address, out_at(dcp.rank(), flat));
          });
          const auto q = dcp.gather_query(nope, pe);
          const auto merged = dcp.merge_attention(out, lse);
          const bool narrow = plan == MergePlan::staged && precision == StagedPrecision::partial;
          check_merged(dcp, c, merged, nullptr, narrow, "reserved");
        }
        check_equal(dcp.arena()->statistics().segments, segments, "segments");
      }
    }
  }
}

}  // namespace cohort::test
