// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cohort/cohort.hpp>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "support/decode_cases.hpp"
#include "support/group_tensors.hpp"

/// \file
/// Partial attentions in splits, with sinks and ranks without tokens, and what their merge is, in
/// fp64: every rank can tell what every other has.

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

}  // namespace cohort::test
