// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cohort/cohort.hpp>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "support/group_tensors.hpp"
#include "support/skip.hpp"

/// \file
/// The DCP step against a reference in fp64, as bodies that every rank runs. Every rank can compute
/// every other's partial attention, so the reference needs no message.

namespace cohort::test {

struct DecodeCase {
  std::int64_t batch = 2;
  std::int64_t heads = 8;  ///< Of all ranks.
  std::int64_t dim = 16;
  DType dtype = DType::f32;
  LseBase base = LseBase::e;
  bool heads_first = false;  ///< Partials lie as [H, B, D], LSEs as [H, B].
  bool all_empty = false;
  Memory memory = Memory::arena;
};

/// A multiple of 1/32 in [-2, 2): exact in every attention type.
[[nodiscard]] inline double out_at(int rank, std::int64_t flat) {
  return static_cast<double>((flat * 37 + rank * 101) % 128 - 64) / 32;
}
/// Some ranks are empty in some rows, in row 0 all but one; the others differ by up to 9.
[[nodiscard]] inline double lse_at(const DecodeCase& c, int rank, int n, std::int64_t row) {
  const bool empty = row == 0 ? rank != n - 1 : (row * 5 + rank * 3) % 4 == 1;
  if (c.all_empty || empty) {
    return -std::numeric_limits<double>::infinity();
  }
  return static_cast<double>((row * 11 + rank * 29) % 37) / 4 - 3;
}

inline void store_float(DType dtype, const std::byte* address, double value) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, Half> ||
                  std::is_same_v<T, BFloat16>) {
      const T x(static_cast<float>(value));
      std::memcpy(const_cast<std::byte*>(address), &x, sizeof(x));
    }
  });
}
[[nodiscard]] inline double load_float(DType dtype, const std::byte* address) {
  return with_type(dtype, [&](auto type) -> double {
    using T = decltype(type);
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, Half> ||
                  std::is_same_v<T, BFloat16>) {
      std::memcpy(&type, address, sizeof(type));
      return static_cast<double>(static_cast<float>(type));
    }
    return 0;
  });
}

/// One unit in the last place of 1.
[[nodiscard]] inline double epsilon_of(DType dtype) {
  return dtype == DType::f32 ? 0x1p-23 : dtype == DType::f16 ? 0x1p-10 : 0x1p-7;
}

/// One rank's partial attention and what it is merged into.
struct Partial {
  TensorView out, lse, merged, merged_lse;

  Partial(GroupCoordinator& group, Site& site, const DecodeCase& c) {
    const std::int64_t own = c.heads / group.size();
    const auto tensor = [&](std::int64_t heads, std::int64_t dim, DType dtype) {
      if (c.heads_first) {
        return site.tensor({heads, c.batch, dim}, dtype, Form::contiguous).transpose(0, 1);
      }
      return site.tensor({c.batch, heads, dim}, dtype, Form::contiguous);
    };
    const auto rows = [](const TensorView& view) {
      return TensorView(view.data(), DType::f32, {view.size(0), view.size(1)},
                        {view.strides()[0], view.strides()[1]}, view.device());
    };
    out = tensor(c.heads, c.dim, c.dtype);
    lse = rows(tensor(c.heads, 1, DType::f32));
    merged = tensor(own, c.dim, c.dtype);
    merged_lse = rows(tensor(own, 1, DType::f32));
    const int rank = group.rank();
    write_elements(lse, [&](std::int64_t row, std::byte* address) {
      store_float(DType::f32, address, lse_at(c, rank, group.size(), row));
    });
    write_elements(out, [&](std::int64_t flat, std::byte* address) {
      // An empty rank's output must never be read into the result.
      const bool empty = std::isinf(lse_at(c, rank, group.size(), flat / c.dim));
      store_float(c.dtype, address,
                  empty ? std::numeric_limits<double>::quiet_NaN() : out_at(rank, flat));
    });
  }
};

struct MergedRow {
  std::vector<double> weights;
  double lse = 0;
};

/// Shares of the ranks in a row, [B, H] of all heads, and the merged LSE.
[[nodiscard]] inline MergedRow reference_row(const DecodeCase& c, int n, std::int64_t row) {
  const auto exp = [&](double x) { return c.base == LseBase::e ? std::exp(x) : std::exp2(x); };
  const auto log = [&](double x) { return c.base == LseBase::e ? std::log(x) : std::log2(x); };
  double sum = 0;
  MergedRow result;
  for (int r = 0; r < n; ++r) {
    result.weights.push_back(exp(lse_at(c, r, n, row)));
    sum += result.weights.back();
  }
  for (auto& weight : result.weights) {
    weight = sum == 0 ? 0 : weight / sum;
  }
  result.lse = log(sum);
  return result;
}

/// Compares a result with the reference. `narrow`: terms were rounded to the type before the sum.
inline void check_merged(GroupCoordinator& group, const DecodeCase& c, const TensorView& merged,
                         const TensorView* merged_lse, bool narrow, const std::string& what) {
  const int n = group.size();
  const std::int64_t own = c.heads / n;
  const auto row_of = [&](std::int64_t b, std::int64_t h) {
    return b * c.heads + group.rank() * own + h;
  };
  const auto near = [&](double got, double expected, double bound) {
    if (!(std::abs(got - expected) <= bound) && !(got == expected)) {
      throw std::runtime_error(
          fmt::format("{}: {} instead of {}, off by more than {}", what, got, expected, bound));
    }
  };
  std::int64_t last_row = -1;
  MergedRow row;
  read_elements(merged, [&](std::int64_t flat, const std::byte* address) {
    const std::int64_t b = flat / c.dim / own;
    const std::int64_t global = row_of(b, flat / c.dim % own);
    if (global != last_row) {
      row = reference_row(c, n, global);
      last_row = global;
    }
    double expected = 0;
    for (int r = 0; r < n; ++r) {
      const double weight = row.weights[u(r)];
      expected += weight == 0 ? 0 : weight * out_at(r, global * c.dim + flat % c.dim);
    }
    // fp32 arithmetic on values below 2 and one rounding to the type; or terms that together weigh
    // 1, each rounded as well.
    const double rounding = 0.51 * epsilon_of(c.dtype) * std::max(std::abs(expected), 0x1p-14);
    near(load_float(c.dtype, address), expected,
         (narrow ? 2.1 * epsilon_of(c.dtype) : rounding) + 2e-6);
  });
  if (merged_lse != nullptr) {
    read_elements(*merged_lse, [&](std::int64_t flat, const std::byte* address) {
      const double expected = reference_row(c, n, row_of(flat / own, flat % own)).lse;
      near(load_float(DType::f32, address), expected, 2e-6 * std::max(1.0, std::abs(expected)));
    });
  }
}

[[nodiscard]] inline std::vector<std::byte> bits_of(const TensorView& view) {
  std::vector<std::byte> bits;
  read_elements(view, [&](std::int64_t, const std::byte* address) {
    bits.insert(bits.end(), address, address + size_of(view.dtype()));
  });
  return bits;
}

[[nodiscard]] inline ParallelState decode_state(ControlPlane& world, const MergeOptions& merge,
                                                HostOptions host = {}, bool symmetric = true) {
  ParallelOptions options{.backend = host_backend(std::move(host)), .merge = merge};
  options.layout = {.tp = world.size(), .pp = 1, .dcp = world.size()};
  options.symmetric = {.enabled = symmetric};
  options.arena.growth_bytes = std::size_t{1} << 18;
  return ParallelState::create(world, std::move(options));
}

/// Merges one case with one plan and compares it; returns the bits.
inline std::vector<std::byte> merge_once(ParallelState& state, const DecodeCase& c,
                                         const std::string& what, bool narrow = false,
                                         StreamRef stream = {}) {
  auto& dcp = state.dcp();
  Site site(dcp, c.memory, stream);
  const Partial partial(dcp, site, c);
  dcp.merge_attention_into({partial.merged, partial.merged_lse}, {partial.out, partial.lse, c.base},
                           stream);
  check_merged(dcp, c, partial.merged, &partial.merged_lse, narrow, what);
  const Tensor owned = dcp.merge_attention(partial.out, partial.lse, c.base, stream);
  auto bits = bits_of(partial.merged);
  check(bits == bits_of(owned), what + ": the two forms give the same bits");
  const auto lse_bits = bits_of(partial.merged_lse);
  bits.insert(bits.end(), lse_bits.begin(), lse_bits.end());
  return bits;
}

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

/// Queries of every type and layout, with windows and without.
inline void check_gather_query(ControlPlane& world) {
  const int n = world.size();
  auto near = decode_state(world, {});
  auto far = decode_state(world, {}, {.map_peers = false});
  auto small = decode_state(world, {}, {.slot_bytes = 4096});
  for (ParallelState* state : {&near, &far, &small}) {
    auto& dcp = state->dcp();
    for (const Memory memory : {Memory::arena, Memory::ordinary, Memory::mixed}) {
      for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
        for (const auto& [batch, own, latent, rope] : std::vector<std::array<std::int64_t, 4>>{
                 {3, 3, 5, 2}, {16, 4, 512, 64}, {0, 2, 8, 4}, {1, 1, 16, 0}}) {
          if (batch == 16 && n > 3 && dtype != DType::f16 && !full_run()) {
            continue;  // large for the sake of windows, where types are bytes
          }
          for (const Form form : {Form::contiguous, Form::sliced}) {
            Site site(dcp, memory);
            const auto nope = site.filled({batch, own, latent}, dtype, form);
            const auto pe = site.tensor({own, batch, rope}, dtype).transpose(0, 1);
            fill(pe, dcp.rank() + 50);
            const std::int64_t dim = latent + rope;
            const auto expected = [&, own = own, latent = latent, rope = rope](std::int64_t flat) {
              const std::int64_t d = flat % dim;
              const std::int64_t h = flat / dim % (own * n);
              const std::int64_t b = flat / dim / (own * n);
              const std::int64_t row = b * own + h % own;
              const auto r = static_cast<int>(h / own);
              return d < latent ? value_at(r, row * latent + d)
                                : value_at(r + 50, row * rope + d - latent);
            };
            const auto q = dcp.gather_query(nope, pe);
            check(q.shape() == Dims{batch, own * n, dim}, "shape of the query");
            check_values(q, "gather_query", expected);
            const auto into = site.tensor({batch, own * n, dim}, dtype, form);
            dcp.gather_query_into(into, nope, pe);
            check_values(into, "gather_query_into", expected);
            const auto heads_first = site.tensor({own * n, batch, dim}, dtype, form);
            dcp.gather_query_into(heads_first.transpose(0, 1), nope, pe);
            check_values(heads_first.transpose(0, 1), "heads first", expected);
            // The ranks need not agree on it.
            const auto mixed = dcp.rank() % 2 == 0 ? into : heads_first.transpose(0, 1);
            fill(mixed, -1);
            dcp.gather_query_into(mixed, nope, pe);
            check_values(mixed, "heads first on odd ranks", expected);
          }
        }
      }
    }
  }
}

/// 8-bit floats and their scales, in rows of bytes, eagerly and in a graph; the room is that which
/// was reserved for them.
inline void check_gather_quantised(ControlPlane& world) {
  const int n = world.size();
  constexpr std::int64_t kOwn = 3;
  constexpr std::int64_t kBatch = 5;
  constexpr std::int64_t kWidth = 576;
  constexpr std::int64_t kScales = 4;
  constexpr std::int64_t kRow = kWidth + 4 * kScales;
  for (const bool map_peers : {true, false}) {
    auto state = decode_state(world, {}, {.map_peers = map_peers});
    auto& dcp = state.dcp();
    HostStream stream;
    Site site(dcp, Memory::mixed, stream);
    const auto nope = site.filled({kBatch, kOwn, kWidth}, DType::f8_e4m3, Form::sliced);
    const auto scales = site.tensor({kOwn, kBatch, kScales}, DType::f32).transpose(0, 1);
    fill(scales, dcp.rank() + 50);
    const auto into = site.tensor({kBatch, kOwn * n, kRow}, DType::u8, Form::sliced);
    dcp.reserve_for({.batch = kBatch,
                     .heads = kOwn * n,
                     .latent = kWidth,
                     .rope = kScales,
                     .query_dtype = DType::f8_e4m3,
                     .rope_dtype = DType::f32});
    const auto segments = dcp.arena()->statistics().segments;
    dcp.freeze();
    const auto part = [&](int first, std::int64_t extent) {
      return [=](std::int64_t flat) {
        const std::int64_t h = flat / extent % (kOwn * n);
        const std::int64_t row = flat / extent / (kOwn * n) * kOwn + h % kOwn;
        return value_at(static_cast<int>(h / kOwn) + first, row * extent + flat % extent);
      };
    };
    const auto check_rows = [&](const TensorView& q, int replay, const std::string& what) {
      check(q.dtype() == DType::u8 && q.shape() == Dims{kBatch, kOwn * n, kRow}, what);
      check_values(q.slice(2, 0, kWidth).reinterpret(DType::f8_e4m3), what, part(replay, kWidth));
      std::vector<std::byte> packed;
      read_elements(q.slice(2, kWidth, 4 * kScales),
                    [&](std::int64_t, const std::byte* byte) { packed.push_back(*byte); });
      check_values(TensorView(packed.data(), DType::f32, {kBatch, kOwn * n, kScales}), what,
                   part(50, kScales));
    };
    const Tensor q = dcp.gather_query(nope, scales, stream);
    check_rows(q, 0, "rows of bytes");
    check_values(q.view().slice(2, kWidth, 4 * kScales).reinterpret(DType::f32), "scales",
                 part(50, kScales));
    dcp.gather_query_into(into, nope, scales, stream);
    check_rows(into, 0, "rows of bytes into");
    Tensor kept;
    auto graph = state.capture(stream, [&] {
      kept = dcp.gather_query(nope, scales, stream);
      dcp.gather_query_into(into, nope, scales, stream);
    });
    for (int replay = 1; replay < 3; ++replay) {
      fill(nope, dcp.rank() + replay);
      graph.launch(stream);
      check_rows(kept, replay, "captured");
      check_rows(into, replay, "captured into");
    }
    check_equal(dcp.arena()->statistics().segments, segments, "segments");

    check_throws<UsageError>(
        [&] { dcp.gather_query_into(into.reinterpret(DType::f8_e4m3), nope, scales, stream); },
        "gather_query q:", "expected u8", "got f8_e4m3");
    check_throws<UsageError>([&] { (void)dcp.gather_query(nope, scales.slice(0, 0, 4), stream); },
                             "gather_query q_pe");
    check_throws<UsageError>(
        [&] { (void)dcp.gather_query(nope, TensorView(scales.data(), DType::f32, {60}), stream); },
        "gather_query q_pe", "[B, H/n, Dr]");
  }
  // Room for rows of so many bytes, whatever they hold.
  const auto room = [&](const DecodeShape& shape) {
    auto state = decode_state(world, {});
    state.dcp().reserve_for(shape);
    return state.dcp().arena()->statistics().reserved;
  };
  DecodeShape shape{.batch = 64, .heads = 8 * n, .latent = 288, .value = 8};
  const auto bytes = room(shape);
  shape.query_dtype = DType::f8_e5m2;
  check(room(shape) < bytes, "half the bytes take less room");
  shape.latent = 576;
  check_equal(room(shape), bytes, "twice as many elements of half the size");
  shape.latent = 512;
  shape.rope = 16;
  shape.rope_dtype = DType::f32;
  check_equal(room(shape), bytes, "scales");
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
