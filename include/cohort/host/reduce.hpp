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

/// Elements of an inner loop: a constant trip count lets compilers vectorise at -O2.
inline constexpr std::int64_t kReduceBlock = 64;
/// Elements that are accumulated before the next: few enough for the nearest cache, and so many
/// that what chooses the loop costs nothing.
inline constexpr std::int64_t kReduceBatch = 8 * kReduceBlock;

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

/// `body(i)` for every i in [0, count).
template <class Body>
[[gnu::always_inline]] inline void for_each_element(std::int64_t count, const Body& body) noexcept {
  const std::int64_t whole = count / kReduceBlock * kReduceBlock;
  for (std::int64_t i = 0; i < whole; i += kReduceBlock) {
    for (std::int64_t j = 0; j < kReduceBlock; ++j) {
      body(i + j);
    }
  }
  for (std::int64_t i = whole; i < count; ++i) {
    body(i);
  }
}

/// sums = a op b, overlapping neither.
template <class T, class Op>
struct CombineTwo {
  [[gnu::always_inline]] static void run(Accumulator<T>* __restrict sums, const T* __restrict a,
                                         const T* __restrict b, std::int64_t count) noexcept {
    for_each_element(
        count, [&](std::int64_t i) __attribute__((always_inline)) {
          sums[i] = Op::apply(static_cast<Accumulator<T>>(a[i]), static_cast<Accumulator<T>>(b[i]));
        });
  }
};

/// sums = sums op from.
template <class T, class Op>
struct CombineNext {
  [[gnu::always_inline]] static void run(Accumulator<T>* __restrict sums, const T* __restrict from,
                                         std::int64_t count) noexcept {
    for_each_element(
        count, [&](std::int64_t i) __attribute__((always_inline)) {
          sums[i] = Op::apply(sums[i], static_cast<Accumulator<T>>(from[i]));
        });
  }
};

/// out = sums, rounded.
template <class T>
struct StoreSums {
  [[gnu::always_inline]] static void run(T* __restrict out, const Accumulator<T>* __restrict sums,
                                         std::int64_t count) noexcept {
    for_each_element(
        count, [&](std::int64_t i)
                   __attribute__((always_inline)) { out[i] = static_cast<T>(sums[i]); });
  }
};

template <class T>
[[nodiscard]] T* as(std::byte* memory) noexcept {
  return reinterpret_cast<T*>(memory);
}
template <class T>
[[nodiscard]] const T* as(const std::byte* memory) noexcept {
  return reinterpret_cast<const T*>(memory);
}

/// The loops of one type and operation. Only they know the type: what walks tensors is compiled
/// once.
struct ReduceLoops {
  using Two = void (*)(std::byte* to, const std::byte* a, const std::byte* b, std::int64_t count);
  using One = void (*)(std::byte* to, const std::byte* from, std::int64_t count);

  Two first;            ///< Accumulators = a op b.
  One next;             ///< Accumulators op= operand.
  One store;            ///< Accumulators to the type; none where they are of the type.
  std::size_t element;  ///< Bytes of the type; those of an accumulator are at most 8.
};

template <class T, class Op>
void combine_two(std::byte* sums, const std::byte* a, const std::byte* b, std::int64_t count) {
  cohort::detail::vectorised_widest<CombineTwo<T, Op>>(as<Accumulator<T>>(sums), as<T>(a), as<T>(b),
                                                       count);
}
template <class T, class Op>
void combine_next(std::byte* sums, const std::byte* from, std::int64_t count) {
  cohort::detail::vectorised_widest<CombineNext<T, Op>>(as<Accumulator<T>>(sums), as<T>(from),
                                                        count);
}
template <class T>
void store_sums(std::byte* out, const std::byte* sums, std::int64_t count) {
  cohort::detail::vectorised_widest<StoreSums<T>>(as<T>(out), as<Accumulator<T>>(sums), count);
}

template <class T, class Op>
[[nodiscard]] ReduceLoops reduce_loops() noexcept {
  ReduceLoops loops{.first = &combine_two<T, Op>,
                    .next = &combine_next<T, Op>,
                    .store = nullptr,
                    .element = sizeof(T)};
  if constexpr (!std::is_same_v<T, Accumulator<T>>) {
    loops.store = &store_sums<T>;
  }
  return loops;
}

/// Sums and products of signed integers have the bits of the unsigned ones.
template <class T>
[[nodiscard]] ReduceLoops reduce_loops(ReduceOp op) noexcept {
  using Modular = decltype(modular(T{}));
  switch (op) {
    case ReduceOp::sum:
      return reduce_loops<Modular, Sum>();
    case ReduceOp::prod:
      return reduce_loops<Modular, Product>();
    case ReduceOp::min:
      return reduce_loops<T, Minimum>();
    case ReduceOp::max:
      break;
  }
  return reduce_loops<T, Maximum>();
}

/// Throws `UsageError` for a type without arithmetic.
[[nodiscard]] inline ReduceLoops reduce_loops(DType dtype, ReduceOp op) {
  switch (dtype) {
    case DType::f64:
      return reduce_loops<double>(op);
    case DType::f32:
      return reduce_loops<float>(op);
    case DType::f16:
      return reduce_loops<Half>(op);
    case DType::bf16:
      return reduce_loops<BFloat16>(op);
    case DType::i8:
      return reduce_loops<std::int8_t>(op);
    case DType::u8:
      return reduce_loops<std::uint8_t>(op);
    case DType::i32:
      return reduce_loops<std::int32_t>(op);
    case DType::i64:
      return reduce_loops<std::int64_t>(op);
    case DType::f8_e4m3:
    case DType::f8_e5m2:
    case DType::b8:
    case DType::i16:
    case DType::u16:
      break;
  }
  throw UsageError("dtype: expected one with arithmetic, got " + std::string(to_string(dtype)));
}

/// Room for a batch of any type.
struct alignas(64) ReduceBatch {
  std::byte bytes[static_cast<std::size_t>(kReduceBatch) * sizeof(std::uint64_t)];
};

[[nodiscard]] inline bool overlap(const std::byte* a, const std::byte* b,
                                  std::size_t bytes) noexcept {
  return a < b + bytes && b < a + bytes;
}

inline void store(const ReduceLoops& loops, std::byte* out, const std::byte* sums,
                  std::int64_t count) noexcept {
  if (loops.store != nullptr) {
    loops.store(out, sums, count);
  } else {
    std::memcpy(out, sums, static_cast<std::size_t>(count) * loops.element);
  }
}

/// `count` elements that lie without gaps in every operand; `source(r)` is where those of r begin.
template <class Source>
void reduce_dense(const ReduceLoops& loops, std::byte* out, std::size_t n, const Source& source,
                  std::int64_t count) {
  const std::size_t bytes = static_cast<std::size_t>(count) * loops.element;
  if (n == 1) {
    std::memmove(out, source(0), bytes);
    return;
  }
  if (n == 2 && loops.store == nullptr && !overlap(out, source(0), bytes) &&
      !overlap(out, source(1), bytes)) {
    return loops.first(out, source(0), source(1), count);
  }
  ReduceBatch sums;
  for (std::int64_t i = 0; i < count; i += kReduceBatch) {
    const std::int64_t length = std::min(kReduceBatch, count - i);
    const std::size_t at = static_cast<std::size_t>(i) * loops.element;
    loops.first(sums.bytes, source(0) + at, source(1) + at, length);
    for (std::size_t r = 2; r < n; ++r) {
      loops.next(sums.bytes, source(r) + at, length);
    }
    store(loops, out + at, sums.bytes, length);
  }
}

/// `count` <= kReduceBatch elements with gaps somewhere.
inline void reduce_gapped(const ReduceLoops& loops, WriteCursor& out, std::span<ReadCursor> sources,
                          std::int64_t count) {
  const Layout dense = dense_layout(count);
  const auto gather = [&](ReduceBatch& batch, ReadCursor& source) {
    WriteCursor writer(batch.bytes, dense, loops.element);
    copy(writer, source, count);
  };
  ReduceBatch result;
  ReduceBatch operand;
  gather(result, sources[0]);
  if (sources.size() > 1) {
    ReduceBatch sums;
    gather(operand, sources[1]);
    loops.first(sums.bytes, result.bytes, operand.bytes, count);
    for (ReadCursor& source : sources.subspan(2)) {
      gather(operand, source);
      loops.next(sums.bytes, operand.bytes, count);
    }
    store(loops, result.bytes, sums.bytes, count);
  }
  ReadCursor reader(result.bytes, dense, loops.element);
  copy(out, reader, count);
}

}  // namespace detail

/// The next `count` elements of `out` become sources[0] op sources[1] op ... in that order; all
/// cursors advance. `out` may be one of the sources element for element, and overlaps none
/// otherwise. Throws `UsageError` for a type without arithmetic.
inline void reduce(DType dtype, ReduceOp op, WriteCursor& out, std::span<ReadCursor> sources,
                   std::int64_t count) {
  const DefaultFloatMode mode;
  const detail::ReduceLoops loops = detail::reduce_loops(dtype, op);
  while (count > 0) {
    std::int64_t run = out.stride() == 1 ? std::min(count, out.run()) : 0;
    for (const auto& source : sources) {
      run = source.stride() == 1 ? std::min(run, source.run()) : 0;
    }
    if (run >= detail::kReduceBlock / 4 || run == count) {
      detail::reduce_dense(
          loops, out.at(), sources.size(), [&](std::size_t r) { return sources[r].at(); }, run);
      out.advance(run);
      for (auto& source : sources) {
        source.advance(run);
      }
    } else {  // runs this short, or none: gather a batch first
      run = std::min(count, detail::kReduceBatch);
      detail::reduce_gapped(loops, out, sources, run);
    }
    count -= run;
  }
}

/// The same for operands without gaps; same bits.
inline void reduce(DType dtype, ReduceOp op, std::byte* out,
                   std::span<const std::byte* const> sources, std::int64_t count) {
  const DefaultFloatMode mode;
  detail::reduce_dense(
      detail::reduce_loops(dtype, op), out, sources.size(),
      [&](std::size_t r) { return sources[r]; }, count);
}

}  // namespace cohort::host
