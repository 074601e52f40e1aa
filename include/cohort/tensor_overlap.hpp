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

/// The bytes of a view that has elements: runs without gaps, repeated along dimensions of falling
/// stride.
class Footprint {
 public:
  struct Dimension {
    std::int64_t stride = 0;  ///< Bytes, positive.
    std::int64_t count = 0;   ///< At least 2.
  };

  template <class Void>
  explicit Footprint(const BasicTensorView<Void>& view) noexcept
      : begin_(reinterpret_cast<std::intptr_t>(view.data())),
        inner_(static_cast<std::int64_t>(size_of(view.dtype()))) {
    std::int64_t extent = inner_;
    for (int i = 0; i < view.ndim(); ++i) {
      std::int64_t stride = view.strides()[i];
      const std::int64_t count = view.shape()[i];
      if (count < 2) {
        continue;
      }
      std::int64_t reach = 0;
      if (__builtin_mul_overflow(stride, static_cast<std::int64_t>(size_of(view.dtype())),
                                 &stride) ||
          __builtin_mul_overflow(stride, count - 1, &reach) || reach < -kMost || reach > kMost ||
          (extent += reach < 0 ? -reach : reach) > kMost) {
        is_immense_ = true;
        size_ = 0;
        return;
      }
      if (stride < 0) {
        begin_ += reach;
        stride = -stride;
      }
      if (stride != 0) {
        dims_[size_++] = {stride, count};
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
    extent_ = extent;
  }

  [[nodiscard]] std::intptr_t begin() const noexcept { return begin_; }
  /// Bytes from the first to the last.
  [[nodiscard]] std::int64_t extent() const noexcept { return extent_; }
  /// Bytes of a run.
  [[nodiscard]] std::int64_t inner() const noexcept { return inner_; }
  [[nodiscard]] std::span<const Dimension> dims() const noexcept { return {dims_.data(), size_}; }
  /// Whether several elements lie in one place within a run, or because a stride is 0.
  [[nodiscard]] bool repeats() const noexcept { return repeats_; }
  /// Whether it reaches further than memory does; nothing else of it is then known.
  [[nodiscard]] bool is_immense() const noexcept { return is_immense_; }

 private:
  // Such that sums of a few do not overflow.
  static constexpr std::int64_t kMost = std::int64_t{1} << 59;

  std::intptr_t begin_;
  std::int64_t inner_;
  std::int64_t extent_ = 0;
  std::array<Dimension, kMaxDims> dims_{};
  std::size_t size_ = 0;
  bool repeats_ = false;
  bool is_immense_ = false;
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

}  // namespace detail

/// Whether some byte belongs to an element of both views. Exact, but for strides that neither nest
/// nor are alike in both views and so need a long search: true where none of some ten thousand
/// steps could tell, or where strides reach beyond memory.
template <class A, class B>
[[nodiscard]] bool overlap(const BasicTensorView<A>& a, const BasicTensorView<B>& b) noexcept {
  if (a.numel() == 0 || b.numel() == 0) {
    return false;
  }
  const detail::Footprint x(a);
  const detail::Footprint y(b);
  if (x.is_immense() || y.is_immense()) {
    return true;
  }
  if (x.begin() + x.extent() <= y.begin() || y.begin() + y.extent() <= x.begin()) {
    return false;
  }
  // Runs at x + i and y + j meet where y - x < i - j + inner of x, and i - j < y - x + inner of y.
  detail::StrideSums sums;
  for (const auto& dim : x.dims()) {
    sums.add(dim.stride, 0, dim.count - 1);
  }
  for (const auto& dim : y.dims()) {
    sums.add(dim.stride, 1 - dim.count, 0);
  }
  const std::int64_t apart = y.begin() - x.begin();
  return sums.meet(apart - x.inner() + 1, apart + y.inner() - 1);
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
  const Footprint all(view);
  if (all.repeats() || all.is_immense()) {
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
  return !detail::is_nested(view) && view.numel() != 0 && detail::repeats(view);
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
