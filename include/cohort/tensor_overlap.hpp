// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>

#include "cohort/dtype.hpp"
#include "cohort/tensor.hpp"

/// \file
/// Whether views share memory, with each other or among their own elements. Pure.

namespace cohort {
namespace detail {

/// From where to where a view that has elements reaches.
struct ByteRange {
  /// Of the view's bytes.
  template <class Void>
  explicit ByteRange(const BasicTensorView<Void>& view) noexcept
      : begin(reinterpret_cast<std::intptr_t>(view.data())),
        extent(static_cast<std::int64_t>(size_of(view.dtype()))) {
    const std::int64_t element = extent;
    for (int i = 0; i < view.ndim(); ++i) {
      std::int64_t reach = 0;
      if (view.shape()[i] < 2) {
        continue;
      }
      if (__builtin_mul_overflow(view.strides()[i], element, &reach) ||
          __builtin_mul_overflow(reach, view.shape()[i] - 1, &reach) || reach < -kMost ||
          reach > kMost || (extent += reach < 0 ? -reach : reach) > kMost) {
        is_immense = true;
        return;
      }
      begin += std::min<std::int64_t>(reach, 0);
    }
  }

  // Such that sums of a few do not overflow.
  static constexpr std::int64_t kMost = std::int64_t{1} << 59;

  std::intptr_t begin;      ///< The first byte.
  std::int64_t extent;      ///< Bytes from the first to the last.
  bool is_immense = false;  ///< It reaches further than memory does; nothing else is then known.
};

/// The bytes of a view that has elements: runs without gaps, repeated along dimensions of falling
/// stride.
class Footprint {
 public:
  struct Dimension {
    std::int64_t stride = 0;  ///< Bytes, positive.
    std::int64_t count = 0;   ///< At least 2.
  };

  /// Of a view whose range, `within`, is not immense.
  template <class Void>
  Footprint(const BasicTensorView<Void>& view, const ByteRange& within) noexcept
      : begin_(within.begin), inner_(static_cast<std::int64_t>(size_of(view.dtype()))) {
    const std::int64_t element = inner_;
    for (int i = 0; i < view.ndim(); ++i) {
      const std::int64_t count = view.shape()[i];
      if (count < 2) {
        continue;
      }
      const std::int64_t stride = view.strides()[i] * element;
      if (stride != 0) {
        dims_[size_++] = {stride < 0 ? -stride : stride, count};
      }
      repeats_ = repeats_ || stride == 0;
    }
    std::sort(dims_.begin(), dims_.begin() + static_cast<std::ptrdiff_t>(size_),
              [](const Dimension& a, const Dimension& b) { return a.stride > b.stride; });
    while (size_ > 0 && dims_[size_ - 1].stride <= inner_) {  // no gaps: one run
      repeats_ = repeats_ || dims_[size_ - 1].stride < inner_;
      inner_ += dims_[size_ - 1].stride * (dims_[size_ - 1].count - 1);
      --size_;
    }
  }

  [[nodiscard]] std::intptr_t begin() const noexcept { return begin_; }
  /// Bytes of a run.
  [[nodiscard]] std::int64_t inner() const noexcept { return inner_; }
  [[nodiscard]] std::span<const Dimension> dims() const noexcept { return {dims_.data(), size_}; }
  /// Whether several elements lie in one place within a run, or because a stride is 0.
  [[nodiscard]] bool repeats() const noexcept { return repeats_; }

 private:
  std::intptr_t begin_;
  std::int64_t inner_;
  std::array<Dimension, kMaxDims> dims_{};
  std::size_t size_ = 0;
  bool repeats_ = false;
};

/// Sums of strides, each taken a number of times within bounds.
class StrideSums {
 public:
  /// Adds a stride > 0 and how often it may be taken; what equal strides may be adds up.
  void add(std::int64_t stride, std::int64_t least, std::int64_t most) noexcept {
    for (auto& term : std::span(terms_.data(), size_)) {
      if (term.stride == stride) {
        term.least += least;
        term.most += most;
        return;
      }
    }
    terms_[size_++] = {stride, least, most};
  }

  /// Whether a sum lies in [low, high]; also true where that takes more than `kSteps` to tell.
  /// Strides that nest, each beyond what the smaller ones reach, take a few steps each.
  [[nodiscard]] bool meet(std::int64_t low, std::int64_t high) noexcept {
    std::sort(terms_.begin(), terms_.begin() + static_cast<std::ptrdiff_t>(size_),
              [](const Term& a, const Term& b) { return a.stride > b.stride; });
    for (std::size_t i = size_; i-- > 0;) {
      Term& term = terms_[i];
      const Term& next = terms_[i + 1];  // all 0 behind the last
      term.low = next.low + term.least * term.stride;
      term.high = next.high + term.most * term.stride;
      term.divisor = std::gcd(next.divisor, term.stride);
    }
    steps_ = kSteps;
    return meet_from(0, low, high);
  }

 private:
  static constexpr int kSteps = 1 << 15;

  struct Term {
    std::int64_t stride = 0;
    std::int64_t least = 0;
    std::int64_t most = 0;
    // Of the sums of this term and those behind it.
    std::int64_t low = 0;
    std::int64_t high = 0;
    std::int64_t divisor = 0;
  };

  [[nodiscard]] static std::int64_t floor_of(std::int64_t a, std::int64_t b) noexcept {
    return a / b - (a % b < 0 ? 1 : 0);
  }

  [[nodiscard]] bool meet_from(std::size_t i, std::int64_t low, std::int64_t high) noexcept {
    if (--steps_ < 0) {
      return true;
    }
    const Term& term = terms_[i];
    if (term.high < low || term.low > high) {
      return false;
    }
    if (i == size_) {
      return true;
    }
    if (floor_of(high, term.divisor) * term.divisor < low) {
      return false;
    }
    const Term& rest = terms_[i + 1];
    const std::int64_t first = std::max(term.least, -floor_of(rest.high - low, term.stride));
    const std::int64_t last = std::min(term.most, floor_of(high - rest.low, term.stride));
    for (std::int64_t times = first; times <= last; ++times) {
      if (meet_from(i + 1, low - times * term.stride, high - times * term.stride)) {
        return true;
      }
    }
    return false;
  }

  std::array<Term, 2 * kMaxDims + 1> terms_{};
  std::size_t size_ = 0;
  int steps_ = 0;
};

/// Whether some byte belongs to an element of both views, which have some.
template <class A, class B>
[[nodiscard, gnu::noinline]] bool footprints_meet(const BasicTensorView<A>& a,
                                                  const BasicTensorView<B>& b) noexcept {
  const ByteRange of_a(a);
  const ByteRange of_b(b);
  if (of_a.is_immense || of_b.is_immense) {
    return true;
  }
  const Footprint x(a, of_a);
  const Footprint y(b, of_b);
  // Runs at x + i and y + j meet where y - x < i - j + inner of x, and i - j < y - x + inner of y.
  StrideSums sums;
  for (const auto& dim : x.dims()) {
    sums.add(dim.stride, 0, dim.count - 1);
  }
  for (const auto& dim : y.dims()) {
    sums.add(dim.stride, 1 - dim.count, 0);
  }
  const std::int64_t apart = y.begin() - x.begin();
  return sums.meet(apart - x.inner() + 1, apart + y.inner() - 1);
}

}  // namespace detail

namespace detail {

/// `is_apart` of views with gaps.
template <class A, class B>
[[nodiscard, gnu::noinline]] bool ranges_apart(const BasicTensorView<A>& a,
                                               const BasicTensorView<B>& b) noexcept {
  if (a.numel() == 0 || b.numel() == 0) {
    return true;
  }
  const ByteRange x(a);
  const ByteRange y(b);
  return !x.is_immense && !y.is_immense &&
         (x.begin + x.extent <= y.begin || y.begin + y.extent <= x.begin);
}

}  // namespace detail

/// Whether one view ends before the other begins, or has no elements: all that most views need.
template <class A, class B>
[[nodiscard, gnu::always_inline]] inline bool is_apart(const BasicTensorView<A>& a,
                                                       const BasicTensorView<B>& b) noexcept {
  if (a.is_contiguous() && b.is_contiguous()) [[likely]] {
    const auto first = reinterpret_cast<std::uintptr_t>(a.data());
    const auto second = reinterpret_cast<std::uintptr_t>(b.data());
    const bool apart = first < second ? a.bytes() <= second - first : b.bytes() <= first - second;
    return apart || a.numel() == 0 || b.numel() == 0;
  }
  return detail::ranges_apart(a, b);
}

/// Whether some byte belongs to an element of both views. Exact, but for strides that neither nest
/// nor are alike in both views and so need a long search: true where none of some ten thousand
/// steps could tell, or where strides reach beyond memory.
template <class A, class B>
[[nodiscard]] bool overlap(const BasicTensorView<A>& a, const BasicTensorView<B>& b) noexcept {
  return !is_apart(a, b) && detail::footprints_meet(a, b);
}

namespace detail {

/// Whether each dimension reaches beyond all that are inside of it, from the last to the first:
/// elements then lie apart. What is contiguous, or has rows with gaps, is of that kind.
template <class Void>
[[nodiscard]] bool is_nested(const BasicTensorView<Void>& view) noexcept {
  std::int64_t reach = 1;  // elements
  for (int i = view.ndim() - 1; i >= 0; --i) {
    if (view.shape()[i] > 1) {
      std::int64_t further = 0;
      if (view.strides()[i] < reach ||
          __builtin_mul_overflow(view.strides()[i], view.shape()[i] - 1, &further) ||
          __builtin_add_overflow(reach, further, &reach)) {
        return false;
      }
    }
  }
  return true;
}

/// Whether some byte of a view belongs to several elements.
template <class Void>
[[nodiscard, gnu::noinline]] bool repeats(const BasicTensorView<Void>& view) noexcept {
  const ByteRange within(view);
  if (within.is_immense) {
    return true;
  }
  const Footprint all(view, within);
  if (all.repeats()) {
    return true;
  }
  // Two elements that differ do so first in some dimension, and there either way round.
  for (std::size_t first = 0; first < all.dims().size(); ++first) {
    StrideSums sums;
    sums.add(all.dims()[first].stride, 1, all.dims()[first].count - 1);
    for (const auto& dim : all.dims().subspan(first + 1)) {
      sums.add(dim.stride, 1 - dim.count, dim.count - 1);
    }
    if (sums.meet(1 - all.inner(), all.inner() - 1)) {
      return true;
    }
  }
  return false;
}

}  // namespace detail

/// Whether several elements of a view share memory, so that what is written depends on the order.
/// A comparison for each dimension where strides fall from the first to the last; otherwise a
/// search that is exact unless it would be long, as that of `overlap`.
template <class Void>
[[nodiscard]] bool overlaps_itself(const BasicTensorView<Void>& view) noexcept {
  return !view.is_contiguous() && !detail::is_nested(view) && view.numel() != 0 &&
         detail::repeats(view);
}

/// Whether both views are the same elements in the same places.
template <class A, class B>
[[nodiscard]] bool identical(const BasicTensorView<A>& a, const BasicTensorView<B>& b) noexcept {
  if (a.data() != b.data() || a.dtype() != b.dtype() || a.shape() != b.shape()) {
    return false;
  }
  for (int i = 0; i < a.ndim(); ++i) {
    if (a.shape()[i] > 1 && a.strides()[i] != b.strides()[i]) {
      return false;
    }
  }
  return true;
}

}  // namespace cohort
