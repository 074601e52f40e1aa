// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <type_traits>

#include "cohort/dtype.hpp"
#include "cohort/error.hpp"
#include "cohort/float_mode.hpp"
#include "cohort/host/strided.hpp"
#include "cohort/transport.hpp"
#include "cohort/vectorised.hpp"

/// \file
/// Reduction of one tensor from each rank, element by element in rank order, so results are bitwise
/// repeatable and do not depend on which rank computes them. f16 and bf16 are accumulated in fp32
/// and rounded once. Integers wrap around (two's complement). A NaN in any operand gives NaN, for
/// min and max too.

namespace cohort::host {
namespace detail {

/// Elements at once: a constant trip count lets compilers vectorise at -O2.
inline constexpr std::int64_t kReduceBlock = 64;

template <class T>
using Accumulator =
    std::conditional_t<std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>, float, T>;

template <class T>
[[nodiscard]] constexpr auto modular(T value) noexcept {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<std::make_unsigned_t<T>>(value);  // signed overflow is undefined
  } else {
    return value;
  }
}

template <class T>
[[nodiscard]] constexpr bool is_nan(T value) noexcept {
  // By bits: -ffast-math of a consumer makes comparisons with NaN mean anything.
  if constexpr (std::is_same_v<T, float>) {
    return (std::bit_cast<std::uint32_t>(value) & 0x7fffffffU) > 0x7f800000U;
  } else if constexpr (std::is_same_v<T, double>) {
    return (std::bit_cast<std::uint64_t>(value) & 0x7fffffffffffffffU) > 0x7ff0000000000000U;
  } else {
    return false;
  }
}

struct Sum {
  template <class T>
  [[nodiscard]] static constexpr T apply(T a, T b) noexcept {
    return static_cast<T>(modular(a) + modular(b));
  }
};
struct Product {
  template <class T>
  [[nodiscard]] static constexpr T apply(T a, T b) noexcept {
    return static_cast<T>(modular(a) * modular(b));
  }
};
struct Minimum {
  template <class T>
  [[nodiscard]] static constexpr T apply(T a, T b) noexcept {
    return ((int{b < a} & int{!is_nan(a)}) | int{is_nan(b)}) != 0 ? b : a;
  }
};
struct Maximum {
  template <class T>
  [[nodiscard]] static constexpr T apply(T a, T b) noexcept {
    return ((int{b > a} & int{!is_nan(a)}) | int{is_nan(b)}) != 0 ? b : a;
  }
};

/// out = a op b. `out` overlaps neither.
template <class T, class Op>
struct CombineTwo {
  [[gnu::always_inline]] static T combine(T a, T b) noexcept {
    return static_cast<T>(
        Op::apply(static_cast<Accumulator<T>>(a), static_cast<Accumulator<T>>(b)));
  }
  [[gnu::always_inline]] static void run(T* __restrict out, const T* __restrict a,
                                         const T* __restrict b, std::int64_t count) noexcept {
    const std::int64_t whole = count / kReduceBlock * kReduceBlock;
    for (std::int64_t i = 0; i < whole; i += kReduceBlock) {
      for (std::int64_t j = 0; j < kReduceBlock; ++j) {
        out[i + j] = combine(a[i + j], b[i + j]);
      }
    }
    for (std::int64_t i = whole; i < count; ++i) {
      out[i] = combine(a[i], b[i]);
    }
  }
};

/// The first operand of a block.
template <class T>
[[gnu::always_inline]] inline void load_block(Accumulator<T>* __restrict sums,
                                              const T* __restrict from,
                                              std::int64_t count) noexcept {
  if (count == kReduceBlock) {
    for (std::int64_t j = 0; j < kReduceBlock; ++j) {
      sums[j] = static_cast<Accumulator<T>>(from[j]);
    }
  } else {
    for (std::int64_t j = 0; j < count; ++j) {
      sums[j] = static_cast<Accumulator<T>>(from[j]);
    }
  }
}

template <class T, class Op>
[[gnu::always_inline]] inline void combine_block(Accumulator<T>* __restrict sums,
                                                 const T* __restrict from,
                                                 std::int64_t count) noexcept {
  if (count == kReduceBlock) {
    for (std::int64_t j = 0; j < kReduceBlock; ++j) {
      sums[j] = Op::apply(sums[j], static_cast<Accumulator<T>>(from[j]));
    }
  } else {
    for (std::int64_t j = 0; j < count; ++j) {
      sums[j] = Op::apply(sums[j], static_cast<Accumulator<T>>(from[j]));
    }
  }
}

template <class T>
[[gnu::always_inline]] inline void store_block(T* __restrict out,
                                               const Accumulator<T>* __restrict sums,
                                               std::int64_t count) noexcept {
  if (count == kReduceBlock) {
    for (std::int64_t j = 0; j < kReduceBlock; ++j) {
      out[j] = static_cast<T>(sums[j]);
    }
  } else {
    for (std::int64_t j = 0; j < count; ++j) {
      out[j] = static_cast<T>(sums[j]);
    }
  }
}

template <class T>
[[nodiscard]] T* as(std::byte* memory) noexcept {
  return reinterpret_cast<T*>(memory);
}
template <class T>
[[nodiscard]] const T* as(const std::byte* memory) noexcept {
  return reinterpret_cast<const T*>(memory);
}

[[nodiscard]] inline bool overlap(const std::byte* a, const std::byte* b,
                                  std::size_t bytes) noexcept {
  return a < b + bytes && b < a + bytes;
}

/// Operands without gaps; `source(r)` is where those of r begin. `out` may be one of them.
template <class T, class Source>
struct DenseOperands {
  T* out;
  std::size_t n;
  Source source;
};

/// out = source(0) op source(1) op ..., a block at a time.
template <class T, class Op, class Source>
struct ReduceBlocks {
  [[gnu::always_inline]] static void run(DenseOperands<T, Source> operands,
                                         std::int64_t count) noexcept {
    const auto& [out, n, source] = operands;
    for (std::int64_t i = 0; i < count; i += kReduceBlock) {
      const std::int64_t length = std::min(kReduceBlock, count - i);
      Accumulator<T> sums[kReduceBlock];
      load_block<T>(sums, as<T>(source(0)) + i, length);
      for (std::size_t r = 1; r < n; ++r) {
        combine_block<T, Op>(sums, as<T>(source(r)) + i, length);
      }
      store_block<T>(out + i, sums, length);
    }
  }
};

/// `count` elements that lie without gaps in every operand; `source(r)` is where those of r begin.
template <class T, class Op, class Source>
void reduce_dense(std::byte* out, std::size_t n, const Source& source, std::int64_t count) {
  const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
  if (n == 2 && !overlap(out, source(0), bytes) && !overlap(out, source(1), bytes)) {
    cohort::detail::vectorised<CombineTwo<T, Op>>(as<T>(out), as<T>(source(0)), as<T>(source(1)),
                                                  count);
  } else {
    cohort::detail::vectorised<ReduceBlocks<T, Op, Source>>(
        DenseOperands<T, Source>{as<T>(out), n, source}, count);
  }
}

/// `count` <= kReduceBlock elements with gaps somewhere.
template <class T, class Op>
void reduce_gapped(WriteCursor& out, std::span<ReadCursor> sources, std::int64_t count) {
  T gathered[kReduceBlock];
  Accumulator<T> sums[kReduceBlock];
  const Layout dense = dense_layout(count);
  for (std::size_t r = 0; r < sources.size(); ++r) {
    WriteCursor writer(reinterpret_cast<std::byte*>(gathered), dense, sizeof(T));
    copy(writer, sources[r], count);
    if (r == 0) {
      load_block<T>(sums, gathered, count);
    } else {
      combine_block<T, Op>(sums, gathered, count);
    }
  }
  store_block<T>(gathered, sums, count);
  ReadCursor reader(reinterpret_cast<const std::byte*>(gathered), dense, sizeof(T));
  copy(out, reader, count);
}

template <class T, class Op>
void reduce_typed(WriteCursor& out, std::span<ReadCursor> sources, std::int64_t count) {
  while (count > 0) {
    std::int64_t run = out.stride() == 1 ? std::min(count, out.run()) : 0;
    for (const auto& source : sources) {
      run = source.stride() == 1 ? std::min(run, source.run()) : 0;
    }
    if (run >= kReduceBlock / 4 || run == count) {
      reduce_dense<T, Op>(
          out.at(), sources.size(), [&](std::size_t r) { return sources[r].at(); }, run);
      out.advance(run);
      for (auto& source : sources) {
        source.advance(run);
      }
    } else {  // runs this short, or none: gather a block first
      run = std::min(count, kReduceBlock);
      reduce_gapped<T, Op>(out, sources, run);
    }
    count -= run;
  }
}

/// Calls `body(T{}, Op{})` with the C++ type and the operation. Throws `UsageError` for a type
/// without arithmetic.
template <class T, class Body>
void with_operation(ReduceOp op, const Body& body) {
  switch (op) {
    case ReduceOp::sum:
      return body(T{}, Sum{});
    case ReduceOp::prod:
      return body(T{}, Product{});
    case ReduceOp::min:
      return body(T{}, Minimum{});
    case ReduceOp::max:
      return body(T{}, Maximum{});
  }
}

template <class Body>
void with_arithmetic(DType dtype, ReduceOp op, const Body& body) {
  switch (dtype) {
    case DType::f64:
      return with_operation<double>(op, body);
    case DType::f32:
      return with_operation<float>(op, body);
    case DType::f16:
      return with_operation<Half>(op, body);
    case DType::bf16:
      return with_operation<BFloat16>(op, body);
    case DType::i8:
      return with_operation<std::int8_t>(op, body);
    case DType::u8:
      return with_operation<std::uint8_t>(op, body);
    case DType::i32:
      return with_operation<std::int32_t>(op, body);
    case DType::i64:
      return with_operation<std::int64_t>(op, body);
    case DType::f8_e4m3:
    case DType::f8_e5m2:
      throw UsageError("dtype: expected one with arithmetic, got " + std::string(to_string(dtype)));
  }
}

}  // namespace detail

/// The next `count` elements of `out` become sources[0] op sources[1] op ... in that order; all
/// cursors advance. `out` may be one of the sources element for element, and overlaps none
/// otherwise. Throws `UsageError` for a type without arithmetic.
inline void reduce(DType dtype, ReduceOp op, WriteCursor& out, std::span<ReadCursor> sources,
                   std::int64_t count) {
  const DefaultFloatMode mode;
  detail::with_arithmetic(dtype, op, [&]<class T, class Op>(T, Op) {
    detail::reduce_typed<T, Op>(out, sources, count);
  });
}

/// The same for operands without gaps; same bits.
inline void reduce(DType dtype, ReduceOp op, std::byte* out,
                   std::span<const std::byte* const> sources, std::int64_t count) {
  const DefaultFloatMode mode;
  detail::with_arithmetic(dtype, op, [&]<class T, class Op>(T, Op) {
    detail::reduce_dense<T, Op>(
        out, sources.size(), [&](std::size_t r) { return sources[r]; }, count);
  });
}

}  // namespace cohort::host
