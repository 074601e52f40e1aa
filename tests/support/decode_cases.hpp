// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cohort/cohort.hpp>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "support/group_tensors.hpp"

/// \file
/// Partial attentions of one split and their merge against a reference in fp64. Every rank can
/// compute every other's partial attention, so the reference needs no message.

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

}  // namespace cohort::test
