// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

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
    std::int64_t count = 0;
    std::int64_t inner = 0;  ///< Bytes from the first to the last of one repetition.
  };

  template <class Void>
  explicit Footprint(const BasicTensorView<Void>& view) noexcept
      : begin_(reinterpret_cast<std::intptr_t>(view.data())),
        inner_(static_cast<std::int64_t>(size_of(view.dtype()))) {
    for (int i = 0; i < view.ndim(); ++i) {
      std::int64_t stride = view.strides()[i] * static_cast<std::int64_t>(size_of(view.dtype()));
      const std::int64_t count = view.shape()[i];
      if (stride < 0) {
        begin_ += stride * (count - 1);
        stride = -stride;
      }
      if (count > 1 && stride != 0) {
        dims_[size_++] = {stride, count, 0};
      }
      repeats_ = repeats_ || (count > 1 && stride == 0);
    }
    std::sort(dims_.begin(), dims_.begin() + static_cast<std::ptrdiff_t>(size_),
              [](const Dimension& a, const Dimension& b) { return a.stride > b.stride; });
    while (size_ > 0 && dims_[size_ - 1].stride <= inner_) {  // no gaps: one run
      repeats_ = repeats_ || dims_[size_ - 1].stride < inner_;
      inner_ += dims_[size_ - 1].stride * (dims_[size_ - 1].count - 1);
      --size_;
    }
    extent_ = inner_;
    for (std::size_t i = size_; i-- > 0;) {
      dims_[i].inner = extent_;
      extent_ += dims_[i].stride * (dims_[i].count - 1);
    }
  }

  [[nodiscard]] std::intptr_t begin() const noexcept { return begin_; }
  [[nodiscard]] std::int64_t extent() const noexcept { return extent_; }
  [[nodiscard]] std::span<const Dimension> dims() const noexcept { return {dims_.data(), size_}; }
  /// Whether several elements lie in one place within a run, or because a stride is 0.
  [[nodiscard]] bool repeats() const noexcept { return repeats_; }

 private:
  std::intptr_t begin_;
  std::int64_t inner_;
  std::int64_t extent_ = 0;
  std::array<Dimension, kMaxDims> dims_{};
  std::size_t size_ = 0;
  bool repeats_ = false;
};

/// One repetition of a footprint.
struct Piece {
  std::intptr_t begin = 0;
  std::int64_t extent = 0;
  std::span<const Footprint::Dimension> dims;
};

/// Descends only into repetitions that the other piece reaches.
[[nodiscard]] inline bool meet(const Piece& a, const Piece& b) noexcept {
  if (a.begin + a.extent <= b.begin || b.begin + b.extent <= a.begin) {
    return false;
  }
  if (a.dims.empty() && b.dims.empty()) {
    return true;
  }
  if (a.dims.empty() || (!b.dims.empty() && b.extent > a.extent)) {
    return meet(b, a);
  }
  const auto& dim = a.dims.front();
  const std::int64_t reach = b.begin - a.begin - dim.inner;  // the last byte before b
  const std::int64_t first = reach < 0 ? 0 : reach / dim.stride + 1;
  const std::int64_t end =
      std::min(dim.count, (b.begin + b.extent - a.begin + dim.stride - 1) / dim.stride);
  for (std::int64_t i = first; i < end; ++i) {
    if (meet({a.begin + i * dim.stride, dim.inner, a.dims.subspan(1)}, b)) {
      return true;
    }
  }
  return false;
}

}  // namespace detail

/// Whether some byte belongs to an element of both views. Exact for all strides; quick where the
/// views lie apart.
template <class A, class B>
[[nodiscard]] bool overlap(const BasicTensorView<A>& a, const BasicTensorView<B>& b) noexcept {
  if (a.numel() == 0 || b.numel() == 0) {
    return false;
  }
  const detail::Footprint x(a);
  const detail::Footprint y(b);
  return detail::meet({x.begin(), x.extent(), x.dims()}, {y.begin(), y.extent(), y.dims()});
}

namespace detail {

/// Whether each dimension reaches beyond all that are inside of it, from the last to the first:
/// elements then lie apart. What is contiguous, or has rows with gaps, is of that kind.
template <class Void>
[[nodiscard]] bool is_nested(const BasicTensorView<Void>& view) noexcept {
  std::int64_t reach = 1;  // elements
  for (int i = view.ndim() - 1; i >= 0; --i) {
    if (view.shape()[i] > 1) {
      if (view.strides()[i] < reach) {
        return false;
      }
      reach += view.strides()[i] * (view.shape()[i] - 1);
    }
  }
  return true;
}

/// Whether some byte of a view belongs to several elements.
template <class Void>
[[nodiscard, gnu::noinline]] bool repeats(const BasicTensorView<Void>& view) noexcept {
  const Footprint all(view);
  if (all.repeats()) {
    return true;
  }
  for (std::size_t i = 0; i < all.dims().size(); ++i) {
    const auto& dim = all.dims()[i];
    const auto inner = all.dims().subspan(i + 1);
    // Repetitions are alike, so that the first stands for all.
    for (std::int64_t at = dim.stride; at < dim.inner && at / dim.stride < dim.count;
         at += dim.stride) {
      if (meet({0, dim.inner, inner}, {at, dim.inner, inner})) {
        return true;
      }
    }
  }
  return false;
}

}  // namespace detail

/// Whether several elements of a view share memory, so that what is written depends on the order.
/// Exact for all strides; a comparison for each dimension where they fall from the first to the
/// last.
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
