// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cohort/cohort.hpp>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "support/decode_checks.hpp"
#include "support/skip.hpp"

/// \file
/// Merges of splits, with sinks and ranks without tokens, into every result, against a reference in
/// fp64, as bodies that every rank runs.

namespace cohort::test {

/// One merge; equal on all ranks.
struct PartialsCase {
  std::int64_t splits = 1;
  std::int64_t batch = 2;
  std::int64_t own_heads = 1;   ///< H/n
  std::int64_t more_heads = 0;  ///< By token: heads that the ranks do not divide.
  std::int64_t dim = 16;
  DType dtype = DType::f32;
  LseBase base = LseBase::e;
  MergeResult result = MergeResult::by_head;
  bool sink = false;
  bool local_tokens = false;
  bool lse = true;
  bool without_dimension = false;  ///< One split, as [B, H, D].
  bool all_empty = false;
  bool strided = false;  ///< The heads come first in memory, rows have gaps, small tensors strides.
  Memory memory = Memory::arena;
  std::vector<std::int64_t> counts = {};
};

[[nodiscard]] inline std::string to_string(const PartialsCase& c) {
  return fmt::format(
      "S {} B {} H/n {} + {} D {} {} base {} {} sink {} tokens {} lse {} strided {} empty {} [{}]",
      c.splits, c.batch, c.own_heads, c.more_heads, c.dim, to_string(c.dtype),
      c.base == LseBase::e ? "e" : "2", to_string(c.result), c.sink, c.local_tokens, c.lse,
      c.strided, c.all_empty, fmt::join(c.counts, ","));
}

/// What the ranks have, by place: every rank can tell for every other.
struct PartialsValues {
  const PartialsCase& c;
  std::int64_t heads;

  [[nodiscard]] static std::uint64_t hash(std::int64_t a, std::int64_t b, std::int64_t d) {
    std::uint64_t x = static_cast<std::uint64_t>(a) * 0x9e3779b97f4a7c15U +
                      static_cast<std::uint64_t>(b) * 0xff51afd7ed558ccdU +
                      static_cast<std::uint64_t>(d) * 0xc4ceb9fe1a85ec53U;
    x ^= x >> 31;
    x *= 0x94d049bb133111ebU;
    return x ^ x >> 29;
  }
  [[nodiscard]] std::int32_t tokens(int rank, std::int64_t b) const {
    return !c.local_tokens              ? 1
           : hash(rank, b, 77) % 3 == 0 ? (b % 2 == 0 ? 0 : -1)
                                        : static_cast<std::int32_t>(b + 1);
  }
  /// In memory: where the numbers of tokens say that a row is empty, a finite LSE like any other,
  /// or what stands in for minus infinity.
  [[nodiscard]] float lse(int rank, std::int64_t s, std::int64_t b, std::int64_t h) const {
    constexpr float kEmpty[] = {
        -std::numeric_limits<float>::infinity(), std::numeric_limits<float>::infinity(),
        std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()};
    const std::uint64_t bits = hash(rank * 64 + s, b * heads + h, -1);
    if (tokens(rank, b) <= 0) {
      return bits % 2 == 0 ? -1e30F : 2.5F;
    }
    if (c.all_empty || bits % 4 == 0) {
      return kEmpty[bits >> 8 & 3];
    }
    return static_cast<float>(static_cast<std::int64_t>(bits >> 16 & 63) - 30) / 4;
  }
  [[nodiscard]] bool counts(int rank, std::int64_t s, std::int64_t b, std::int64_t h) const {
    return tokens(rank, b) > 0 && std::isfinite(lse(rank, s, b, h));
  }
  [[nodiscard]] double out(int rank, std::int64_t s, std::int64_t b, std::int64_t h,
                           std::int64_t d) const {
    if (!counts(rank, s, b, h)) {
      return std::numeric_limits<double>::quiet_NaN();  // never to be read into anything
    }
    return static_cast<double>(hash(rank * 64 + s, b * heads + h, d) % 128) / 32 - 2;
  }
  [[nodiscard]] float sink(std::int64_t h) const {
    return h % 5 == 3 ? -std::numeric_limits<float>::infinity()
                      : static_cast<float>(hash(h, 5, 9) % 16) / 4 - 2;
  }
};

/// Weights of all ranks' splits in a row, and its LSE.
struct PartialsRow {
  std::vector<double> weights;  ///< [n, S]
  double lse = -std::numeric_limits<double>::infinity();

  PartialsRow(const PartialsValues& values, int n, std::int64_t b, std::int64_t h) {
    const PartialsCase& c = values.c;
    const bool sinks = c.sink && std::isfinite(values.sink(h));
    double max = sinks ? values.sink(h) : lse;
    for (int r = 0; r < n; ++r) {
      for (std::int64_t s = 0; s < c.splits; ++s) {
        weights.push_back(values.counts(r, s, b, h) ? values.lse(r, s, b, h) : lse);
        max = std::max(max, weights.back());
      }
    }
    const auto exp = [&](double x) { return c.base == LseBase::e ? std::exp(x) : std::exp2(x); };
    double sum = sinks ? exp(values.sink(h) - max) : 0;
    for (double& weight : weights) {
      weight = std::isinf(weight) ? 0 : exp(weight - max);
      sum += weight;
    }
    if (sum > 0) {
      std::for_each(weights.begin(), weights.end(), [&](double& weight) { weight /= sum; });
      lse = max + (c.base == LseBase::e ? std::log(sum) : std::log2(sum));
    }
  }
};

/// One rank's tensors of a case.
class PartialsSite {
 public:
  PartialsSite(GroupCoordinator& group, Site& site, const PartialsCase& given)
      : c(given), values{given, given.own_heads * group.size() + given.more_heads} {
    const std::int64_t heads = values.heads;
    partials.base = c.base;
    const TensorView out = tensor(site, {c.splits, c.batch, heads, c.dim}, c.dtype);
    const TensorView lses = tensor(site, {c.splits, c.batch, heads}, DType::f32);
    write_elements(out, [&](std::int64_t flat, std::byte* address) {
      const std::int64_t row = flat / c.dim;
      store_float(c.dtype, address,
                  values.out(group.rank(), row / heads / c.batch, row / heads % c.batch,
                             row % heads, flat % c.dim));
    });
    write_elements(lses, [&](std::int64_t row, std::byte* address) {
      const float x =
          values.lse(group.rank(), row / heads / c.batch, row / heads % c.batch, row % heads);
      std::memcpy(address, &x, sizeof(x));
    });
    partials.out = out;
    partials.lse = lses;
    if (c.without_dimension) {
      const auto& o = out.strides();
      const auto& l = lses.strides();
      partials.out = TensorView(out.data(), c.dtype, {c.batch, heads, c.dim}, {o[1], o[2], o[3]},
                                out.device());
      partials.lse =
          TensorView(lses.data(), DType::f32, {c.batch, heads}, {l[1], l[2]}, lses.device());
    }
    const Form form = c.strided ? Form::sliced : Form::contiguous;
    const TensorView sinks = tensor_of_column(site, heads, DType::f32);
    const TensorView tokens = tensor_of_column(site, c.batch, DType::i32);
    write_elements(sinks, [&](std::int64_t h, std::byte* address) {
      const float x = values.sink(h);
      std::memcpy(address, &x, sizeof(x));
    });
    write_elements(tokens, [&](std::int64_t b, std::byte* address) {
      const std::int32_t x = values.tokens(group.rank(), b);
      std::memcpy(address, &x, sizeof(x));
    });
    if (c.sink) {
      partials.sink = sinks;
    }
    if (c.local_tokens) {
      partials.local_tokens = tokens;
    }
    const bool by_token = c.result == MergeResult::by_token;
    std::int64_t own_tokens = c.batch;
    if (by_token) {
      own_tokens = c.counts[u(group.rank())];
      first_token =
          std::accumulate(c.counts.begin(), c.counts.begin() + group.rank(), std::int64_t{0});
    }
    const std::int64_t own = c.result == MergeResult::by_head ? c.own_heads : heads;
    first_head = c.result == MergeResult::by_head ? group.rank() * own : 0;
    into = {.merged = site.tensor({own_tokens, own, c.dim}, {c.batch, own, c.dim}, c.dtype, form),
            .result = c.result,
            .counts = c.counts};
    const TensorView lse =
        site.tensor({own_tokens, own}, {c.batch, own}, DType::f32, Form::contiguous);
    if (c.lse) {
      into.lse = lse;
    }
  }

  /// Compares with the reference. `narrow`: terms were rounded to the type before the sum.
  void check_merged(int n, const ConstTensorView& merged, const std::optional<TensorView>& lse,
                    bool narrow, const std::string& what) const {
    const std::int64_t own = merged.shape()[1];
    std::int64_t last = -1;
    std::optional<PartialsRow> row;
    const auto near = [&](double got, double expected, double bound) {
      if (!(std::abs(got - expected) <= bound) && !(got == expected)) {
        throw std::runtime_error(
            fmt::format("{}: {} instead of {}, off by more than {}", what, got, expected, bound));
      }
    };
    const auto row_at = [&](std::int64_t at) -> const PartialsRow& {
      if (at != last) {
        row.emplace(values, n, first_token + at / own, first_head + at % own);
        last = at;
      }
      return *row;
    };
    const double epsilon = epsilon_of(c.dtype);
    read_elements(merged, [&](std::int64_t flat, const std::byte* address) {
      const std::int64_t at = flat / c.dim;
      const PartialsRow& weights = row_at(at);
      double expected = 0;
      for (int r = 0; r < n; ++r) {
        for (std::int64_t s = 0; s < c.splits; ++s) {
          const double weight = weights.weights[u(r * c.splits + s)];
          expected += weight == 0 ? 0
                                  : weight * values.out(r, s, first_token + at / own,
                                                        first_head + at % own, flat % c.dim);
        }
      }
      // As in decode_checks.hpp; and each rank's splits below 2, rounded once.
      const double rounding = 0.51 * epsilon * std::max(std::abs(expected), 0x1p-14);
      near(load_float(c.dtype, address), expected,
           (narrow ? 2.1 * epsilon : rounding) + (c.splits > 1 ? 1.02 * epsilon : 0) + 3e-6);
    });
    if (lse) {
      read_elements(*lse, [&](std::int64_t at, const std::byte* address) {
        const double expected = row_at(at).lse;
        near(load_float(DType::f32, address), expected, 3e-6 * std::max(1.0, std::abs(expected)));
      });
    }
  }

  PartialsCase c;
  PartialsValues values;
  Partials partials;
  MergeInto into;
  std::int64_t first_token = 0;
  std::int64_t first_head = 0;

 private:
  /// [S, B, H, ...], as it is or with heads before tokens in memory.
  [[nodiscard]] TensorView tensor(Site& site, Dims shape, DType dtype) const {
    if (!c.strided) {
      return site.tensor(shape, dtype, Form::contiguous);
    }
    std::swap(shape[1], shape[2]);
    return site.tensor(shape, dtype, Form::sliced).transpose(1, 2);
  }
  [[nodiscard]] TensorView tensor_of_column(Site& site, std::int64_t extent, DType dtype) const {
    const TensorView rows = site.tensor({extent, c.strided ? 3 : 1}, dtype, Form::contiguous);
    return {rows.data(), dtype, {extent}, {rows.strides()[0]}, rows.device()};
  }
};

/// Merges one case with one plan, in both forms, and compares; returns the bits.
inline std::vector<std::byte> merge_partials_once(DecodeContextParallelGroup& dcp,
                                                  const PartialsCase& c, const std::string& what,
                                                  bool narrow = false, StreamRef stream = {}) {
  Site site(dcp, c.memory, stream);
  const PartialsSite it(dcp, site, c);
  dcp.merge_attention_into(it.into, it.partials, stream);
  it.check_merged(dcp.size(), it.into.merged, it.into.lse, narrow, what);
  auto bits = bits_of(it.into.merged);
  const Merged owned = dcp.merge_attention(it.partials, c.result, stream, c.counts);
  check(bits == bits_of(owned.out), what + ": the two forms give the same bits");
  if (it.into.lse) {
    const auto lse_bits = bits_of(*it.into.lse);
    check(lse_bits == bits_of(owned.lse), what + ": the two forms give the same LSEs");
    bits.insert(bits.end(), lse_bits.begin(), lse_bits.end());
  }
  return bits;
}

/// Tokens of the ranks: shares that differ, some of them nothing.
[[nodiscard]] inline std::vector<std::int64_t> draw_counts(std::mt19937& random, std::int64_t batch,
                                                           int n) {
  std::vector<std::int64_t> counts(u(n), 0);
  for (std::int64_t b = 0; b < batch; ++b) {
    ++counts[u(random() % 3 == 0 ? n - 1 : static_cast<int>(random() % static_cast<unsigned>(n)))];
  }
  return counts;
}

/// Every allowed combination in turn, each with sizes and layout drawn and one of the types, which
/// is another with the next seed. `any_size`: of rows and splits, as the host takes them.
[[nodiscard]] inline std::vector<PartialsCase> partials_cases(int n, unsigned seed,
                                                              bool any_size = false) {
  std::mt19937 random(seed);
  const auto pick = [&]<class T>(std::initializer_list<T> values) {
    return values.begin()[random() % values.size()];
  };
  std::vector<PartialsCase> cases;
  for (const std::int64_t most : {1, 2, 3, 4}) {
    const std::int64_t splits = any_size && most == 4 ? pick({4, 5, 19}) : most;
    for (const MergeResult result :
         {MergeResult::by_head, MergeResult::by_token, MergeResult::replicated}) {
      for (unsigned flags = 0; flags < 16; ++flags) {
        PartialsCase c{
            .splits = splits,
            .batch = pick({1, 2, 3, 5, 9}),
            .own_heads = pick({1, 2, 3}),
            .dim = any_size ? pick({1, 7, 33, 63, 64, 65, 129}) : pick({8, 16, 40, 64, 104}),
            .dtype = std::array{DType::f32, DType::f16, DType::bf16}[(cases.size() + seed) % 3],
            .base = (flags & 8) != 0 ? LseBase::e : LseBase::two,
            .result = result,
            .sink = (flags & 1) != 0,
            .local_tokens = (flags & 2) != 0,
            .lse = (flags & 4) != 0,
            .without_dimension = splits == 1 && random() % 2 == 0,
            .all_empty = random() % 12 == 0,
            .strided = random() % 2 == 0,
            .memory = pick({Memory::arena, Memory::ordinary, Memory::mixed})};
        if (random() % 24 == 0) {
          c.batch = 0;
        }
        if (result == MergeResult::by_token) {
          c.counts = draw_counts(random, c.batch, n);
          c.more_heads = static_cast<std::int64_t>(random() % static_cast<unsigned>(n));
        }
        cases.push_back(c);
      }
    }
  }
  return cases;
}

/// A plan and what its group was made with.
struct PartialsPlan {
  const char* name;
  MergeOptions merge;
  HostOptions host = {};
  bool narrow = false;      ///< Terms are rounded to the type before they are added.
  bool like_packed = true;  ///< Bit by bit.
};

/// All plans on the host: through windows, slots of any size, and beyond reach.
[[nodiscard]] inline std::vector<PartialsPlan> partials_plans() {
  return {{"packed", {.plan = MergePlan::packed}},
          {"one_kernel", {.plan = MergePlan::one_kernel}},
          {"small slots", {.plan = MergePlan::one_kernel}, {.slot_bytes = 4096 * 8}},
          {"automatic", {}},
          {"far", {}, {.map_peers = false}},
          {"staged", {.plan = MergePlan::staged}, {}, false, false},
          {"staged, narrow",
           {.plan = MergePlan::staged, .staged_precision = StagedPrecision::partial},
           {},
           true,
           false}};
}

/// Every combination by every plan; in the short run by one rank in every type, by two in two of
/// them, and by more ranks some of them, others by each number.
inline void check_partials(ControlPlane& world) {
  const int n = world.size();
  const std::size_t step = full_run() || n <= 2 ? 1 : n == 3 ? 5 : 23;
  for (int round = 0; round < (full_run() ? 6 : n < 3 ? 4 - n : 1); ++round) {
    const auto cases =
        partials_cases(n, static_cast<unsigned>(100 * n + round), n <= 2 || round % 2 == 0);
    std::vector<std::vector<std::byte>> packed(cases.size());
    for (const auto& plan : partials_plans()) {
      auto state = decode_state(world, plan.merge, plan.host);
      for (std::size_t i = (u(n) * 4 + u(round)) % step; i < cases.size(); i += step) {
        const std::string what = fmt::format("{}: {}", plan.name, to_string(cases[i]));
        auto bits = merge_partials_once(state.dcp(), cases[i], what, plan.narrow);
        if (packed[i].empty()) {
          packed[i] = std::move(bits);
        } else if (plan.like_packed) {
          check(bits == packed[i], what + ": as packed");
        }
      }
    }
  }
}

/// Equal masses, of which the sink has half: exact in every type, as is a sink alone.
inline void check_exact_partials(DecodeContextParallelGroup& dcp, StreamRef stream = {}) {
  const int n = dcp.size();
  if ((n & (n - 1)) != 0) {
    return;
  }
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const std::int64_t splits : {1, 2, 4}) {
      for (const bool empty : {false, true}) {
        Site site(dcp, Memory::ordinary, stream);
        const auto unit = static_cast<std::int64_t>(n) * splits * 2;
        const Dims shape{splits, 3, n, 24};
        const auto out = site.tensor(shape, dtype);
        const auto lse = site.tensor({splits, 3, n}, DType::f32);
        const auto tokens = site.tensor({3}, DType::i32);
        const auto sink = site.tensor({n}, DType::f32);
        const auto value = [&](int rank, std::int64_t flat) {
          return (flat * 7 + rank * 5 + flat / 24) % 4 * unit;
        };
        const int masses = std::countr_zero(static_cast<unsigned>(unit / 2));
        fill_with(out, [&](std::int64_t flat) { return value(dcp.rank(), flat); });
        fill_with(lse, [](std::int64_t) { return 3; });
        fill_with(tokens, [&](std::int64_t b) { return empty || b == 1 ? 0 : 5; });
        fill_with(sink, [&](std::int64_t) { return 3 + masses; });
        const Partials partials{out, lse, LseBase::two, sink, tokens};
        const Merged merged = dcp.merge_attention(partials, MergeResult::replicated, stream);
        check_values(merged.out, "half the mean", [&](std::int64_t flat) -> std::int64_t {
          if (empty || flat / (n * 24) == 1) {
            return 0;
          }
          std::int64_t sum = 0;
          for (int r = 0; r < n; ++r) {
            for (std::int64_t s = 0; s < splits; ++s) {
              sum += value(r, s * 3 * n * 24 + flat);
            }
          }
          return sum / unit;
        });
        check_values(merged.lse, "the sink counts once", [&](std::int64_t row) {
          return 3 + masses + (empty || row / n == 1 ? 0 : 1);
        });
      }
    }
  }
}

/// The three results have the same rows, bit by bit, whatever merges them.
inline void check_results_agree(ControlPlane& world) {
  const int n = world.size();
  for (const auto& plan : partials_plans()) {
    auto state = decode_state(world, plan.merge, plan.host);
    auto& dcp = state.dcp();
    for (const std::int64_t dim : {8, 640}) {  // merged by all, and by head and gathered
      const std::int64_t batch = 7;
      Site site(dcp, Memory::mixed);
      const PartialsCase c{.splits = 2,
                           .batch = batch,
                           .own_heads = 2,
                           .dim = dim,
                           .dtype = DType::bf16,
                           .sink = true,
                           .local_tokens = true};
      const PartialsSite it(dcp, site, c);
      const Merged all = dcp.merge_attention(it.partials, MergeResult::replicated);
      const Merged heads = dcp.merge_attention(it.partials, MergeResult::by_head);
      const Merged tokens = dcp.merge_attention(it.partials, MergeResult::by_token);
      std::int64_t first = 0;
      for (int r = 0; r < dcp.rank(); ++r) {
        first += dcp::MergeRows::even_count(batch, n, r);
      }
      if (plan.like_packed) {  // a reduction adds by pieces whose bounds depend on the result
        const std::int64_t head = 2 * dcp.rank();
        check(bits_of(all.out.view().slice(1, head, 2)) == bits_of(heads.out), "by head");
        check(bits_of(all.out.view().slice(0, first, tokens.out.size(0))) == bits_of(tokens.out),
              "by token");
      }
      check(bits_of(all.lse.view().slice(1, 2 * dcp.rank(), 2)) == bits_of(heads.lse),
            "LSEs by head");
      check(bits_of(all.lse.view().slice(0, first, tokens.out.size(0))) == bits_of(tokens.lse),
            "LSEs by token");
    }
  }
}

/// Captured and replayed on other inputs, with counts that their caller forgets; what was reserved
/// suffices in a frozen arena, eagerly as well.
inline void check_reserved_partials(ControlPlane& world) {
  const int n = world.size();
  for (const auto& plan : partials_plans()) {
    for (const MergeResult result :
         {MergeResult::by_head, MergeResult::by_token, MergeResult::replicated}) {
      for (const std::int64_t dim : {16, 512}) {
        auto state = decode_state(world, plan.merge, plan.host);
        auto& dcp = state.dcp();
        HostStream stream;
        std::mt19937 random(static_cast<unsigned>(7 * n + dim));
        Site site(dcp, Memory::ordinary, stream);
        std::vector<PartialsCase> cases;
        std::int64_t tokens = 0;
        for (const std::int64_t batch : {9, 1, 0, 5, 9}) {
          PartialsCase c{.splits = 1 + batch % 3,
                         .batch = batch,
                         .own_heads = 2,
                         .dim = dim,
                         .dtype = DType::bf16,
                         .result = result,
                         .sink = batch % 2 == 0,
                         .local_tokens = batch % 3 == 0};
          if (result == MergeResult::by_token) {
            c.counts = draw_counts(random, batch, n);
            tokens = std::max(tokens, dcp::MergeRows::widest_count(c.counts));
          }
          cases.push_back(c);
        }
        if (result == MergeResult::replicated) {
          tokens = 9;  // all of them on one rank
        }
        std::vector<PartialsSite> sites;
        for (const auto& c : cases) {
          sites.emplace_back(dcp, site, c);
        }
        // There is room for the results before it as well.
        std::vector<PartialsCase> lesser;
        for (const MergeResult before : {MergeResult::by_head, MergeResult::by_token}) {
          if (before < result) {
            lesser.push_back(cases.front());
            lesser.back().result = before;
            lesser.back().counts.clear();
            if (before == MergeResult::by_token) {
              lesser.back().counts.assign(u(n), 0);
              lesser.back().counts.back() = lesser.back().batch;
            }
          }
        }
        std::vector<PartialsSite> lesser_sites;
        for (const auto& c : lesser) {
          lesser_sites.emplace_back(dcp, site, c);
        }
        dcp.reserve_for({.batch = 9,
                         .heads = 2 * n,
                         .latent = 16,
                         .rope = 16,
                         .value = dim,
                         .dtype = DType::bf16,
                         .result = result,
                         .tokens = tokens});
        dcp.freeze();
        const auto segments = dcp.arena()->statistics().segments;
        GraphPool pool;
        std::vector<Merged> captured(cases.size());
        std::vector<CapturedGraph> graphs;
        for (std::size_t i = 0; i < cases.size(); ++i) {
          graphs.push_back(state.capture(
              stream,
              [&] {
                captured[i > 0 ? i - 1 : 0] = {};
                auto counts = cases[i].counts;
                captured[i] = dcp.merge_attention(sites[i].partials, result, stream, counts);
                std::fill(counts.begin(), counts.end(), 1000);
              },
              &pool));
          const Merged eager =
              dcp.merge_attention(sites[i].partials, result, stream, cases[i].counts);
          graphs[i].launch(stream);
          const std::string what = fmt::format("{}: {}", plan.name, to_string(cases[i]));
          sites[i].check_merged(n, captured[i].out, captured[i].lse.view(), plan.narrow, what);
          check(bits_of(eager.out) == bits_of(captured[i].out), what + ": eager and captured");
        }
        for (const PartialsSite& it : lesser_sites) {
          const std::string what = fmt::format("{}: {}, with room for {}", plan.name,
                                               to_string(it.c), to_string(result));
          const Merged merged = dcp.merge_attention(it.partials, it.c.result, stream, it.c.counts);
          it.check_merged(n, merged.out, merged.lse.view(), plan.narrow, what);
        }
        check_equal(dcp.arena()->statistics().segments, segments, "segments");
      }
    }
  }
}

/// What is wrong is named before anything is enqueued, on every backend, and the group works on.
inline void check_wrong_partials(DecodeContextParallelGroup& dcp, StreamRef stream = {}) {
  const int n = dcp.size();
  Site site(dcp, Memory::ordinary, stream);
  const auto f32 = [&](const Dims& shape) { return site.tensor(shape, DType::f32); };
  const Partials p{f32({2, 3, 2 * n, 8}), f32({2, 3, 2 * n}), LseBase::e, f32({2 * n}),
                   site.tensor({3}, DType::i32)};
  const TensorView merged = f32({3, 2, 8});
  const TensorView lse = f32({3, 2});
  const auto refused = [&](const MergeInto& into, const Partials& partials, const auto&... words) {
    check_throws<UsageError>([&] { dcp.merge_attention_into(into, partials, stream); }, words...);
  };
  const auto with = [&](const auto& change) {
    Partials other = p;
    change(other);
    return other;
  };
  refused({merged}, with([&](Partials& x) { x.out = f32({0, 3, 2 * n, 8}); }), "out", "S >= 1");
  refused({merged}, with([&](Partials& x) { x.out = f32({2, 3, 2 * n, 0}); }), "out", "D >= 1");
  refused({merged}, with([&](Partials& x) { x.lse = f32({3, 2 * n}); }), "lse", "expected f32");
  refused({merged}, with([&](Partials& x) { x.lse = f32({1, 3, 2 * n}); }), "lse", "expected f32");
  refused({merged}, with([&](Partials& x) { x.sink = f32({n}); }), "sink", "expected f32");
  refused({merged}, with([&](Partials& x) { x.local_tokens = f32({3}); }), "local_tokens", "i32");
  refused({merged}, with([&](Partials& x) { x.local_tokens = site.tensor({2}, DType::i32); }),
          "local_tokens");
  const std::vector<std::int64_t> four(u(n), 4);
  const std::vector<std::int64_t> many(u(n) + 1, 0);
  refused({merged, {}, MergeResult::by_head, four}, p, "counts", "by_head");
  refused({merged, {}, MergeResult::replicated, four}, p, "counts", "replicated");
  refused({merged, {}, MergeResult::by_token, four}, p, "counts", "3 tokens");
  refused({merged, {}, MergeResult::by_token, many}, p, "counts", "sizes");
  refused({f32({3, 3, 8}), {}, MergeResult::replicated}, p, "merged", "expected f32");
  // Nothing may be written over what is read, or over the other result.
  const auto floats = [&](const ConstTensorView& of, const Dims& shape) {
    return TensorView(const_cast<void*>(of.data()), DType::f32, shape, of.device());
  };
  refused({floats(p.out, {3, 2, 8})}, p, "merge_attention merged", "the input");
  refused({floats(p.lse, {3, 2, 8}).slice(0, 0, 3)}, p, "merge_attention merged");
  refused({merged, floats(p.lse, {3, 2})}, p, "merge_attention merged_lse", "the input");
  refused({merged, floats(p.out, {3, 2})}, p, "merge_attention merged_lse", "the input");
  refused({merged, floats(merged, {3, 2})}, p, "merge_attention merged_lse");
  if (n >= 3) {
    refused({merged, floats(*p.sink, {3, 2})}, p, "merge_attention merged_lse", "the input");
  }
  fill_with(floats(p.out, {2, 3, 2 * n, 8}), [](std::int64_t) { return 2; });
  fill_with(floats(p.lse, {2, 3, 2 * n}), [](std::int64_t) { return 0; });
  dcp.merge_attention_into({merged, lse}, {p.out, p.lse}, stream);
  check_values(merged, "afterwards", [](std::int64_t) { return 2; });
}

/// A rank that asks for something else is found, whatever merges and carries its bytes.
inline void check_other_partials(ControlPlane& world, MergePlan plan, bool map_peers, bool debug) {
  const int last = world.size() - 1;
  const bool other = world.rank() == last;
  const int n = world.size();
  for (int kind = 0; kind < 7; ++kind) {
    auto state = make_state(world, {.tp = n, .dcp = n},
                            {.backend = host_backend({.map_peers = map_peers}),
                             .merge = {.plan = plan},
                             .debug_checks = debug});
    auto& dcp = state.dcp();
    Site site(dcp, Memory::ordinary);
    const auto out = site.filled({2, 2 * n, 2 * n, 8}, DType::f32);
    const auto lse = site.filled({2, 2 * n, 2 * n}, DType::f32);
    const auto sink = site.filled({2 * n}, DType::f32);
    Partials p{out, lse};
    MergeResult result = MergeResult::by_head;
    std::vector<std::int64_t> counts;
    switch (kind) {
      case 0:
        p.base = other ? LseBase::two : LseBase::e;
        break;
      case 1:
        result = other ? MergeResult::by_token : MergeResult::by_head;
        break;
      case 2:
        result = other ? MergeResult::replicated : MergeResult::by_token;
        break;
      case 3:
        if (other) {
          p.sink = sink;
        }
        break;
      case 4:
        if (other) {
          p.out = out.slice(0, 0, 1);
          p.lse = lse.slice(0, 0, 1);
        }
        break;
      case 5:
        result = MergeResult::by_token;
        counts.assign(u(n), 2);
        if (other) {
          --counts[0];
          ++counts[u(n - 1)];
        }
        break;
      default:
        result = MergeResult::replicated;
    }
    const auto call = [&] {
      if (kind < 6) {
        (void)dcp.merge_attention(p, result, {}, counts);
        return;
      }
      MergeInto into{site.tensor({2 * n, 2 * n, 8}, DType::f32), {}, result};
      if (other) {
        into.lse = site.tensor({2 * n, 2 * n}, DType::f32);
      }
      dcp.merge_attention_into(into, p);
    };
    if (plan == MergePlan::one_kernel) {
      check_throws<SymmetryError>(call, "merge_attention");
    } else {
      check_throws<SymmetryError>(call);
    }
    if (map_peers) {  // over the control plane a group ends with its first error
      (void)dcp.merge_attention({out, lse, LseBase::e, sink}, MergeResult::by_token);
    }
  }
}

}  // namespace cohort::test
