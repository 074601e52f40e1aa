// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cohort/tensor.hpp"

/// \file
/// Walking tensors of any strides in row-major order, in runs that are as long as the strides
/// allow. What the host transport copies or reduces, it walks with a `Cursor`.

namespace cohort::host {

/// A shape with its strides, in which dimensions that follow each other without a gap are one and
/// extents of 1 are gone. A tensor without gaps has at most one dimension.
struct Layout {
  std::array<std::int64_t, kMaxDims> shape;
  std::array<std::int64_t, kMaxDims> strides;  ///< In elements.
  int ndim = 0;
  std::int64_t numel = 1;

  [[nodiscard]] bool contiguous() const noexcept {
    return numel <= 1 || (ndim == 1 && strides[0] == 1);
  }
};

/// Layout of a shape whose extent along `dim` (none if negative) is `extent` instead.
[[nodiscard]] inline Layout collapse(const Dims& shape, const Dims& strides, int dim = -1,
                                     std::int64_t extent = 0) noexcept {
  Layout layout;
  for (int d = 0; d < shape.size(); ++d) {
    const std::int64_t size = d == dim ? extent : shape[d];
    layout.numel *= size;
    if (size == 1) {
      continue;
    }
    const auto last = static_cast<std::size_t>(layout.ndim - 1);
    if (layout.ndim > 0 && layout.strides[last] == size * strides[d]) {
      layout.shape[last] *= size;
      layout.strides[last] = strides[d];
    } else {
      layout.shape[last + 1] = size;
      layout.strides[last + 1] = strides[d];
      ++layout.ndim;
    }
  }
  if (layout.ndim == 0 || layout.numel == 0) {
    layout.ndim = 1;
    layout.shape[0] = layout.numel;
    layout.strides[0] = 1;
  }
  return layout;
}

/// Layout of `numel` elements without gaps.
[[nodiscard]] inline Layout dense_layout(std::int64_t numel) noexcept {
  Layout layout;
  layout.ndim = 1;
  layout.shape[0] = numel;
  layout.strides[0] = 1;
  layout.numel = numel;
  return layout;
}

/// A position in a layout that advances in row-major order.
template <class Byte>
class Cursor {
 public:
  Cursor() = default;
  Cursor(Byte* base, const Layout& layout, std::size_t element_bytes, std::int64_t first = 0)
      : at_(base), layout_(layout), element_(static_cast<std::int64_t>(element_bytes)) {
    for (int d = 0; d < layout_.ndim; ++d) {
      index_[u(d)] = 0;
    }
    if (first > 0 && first < layout_.numel) {
      seek(first);
    }
  }

  [[nodiscard]] Byte* at() const noexcept { return at_; }
  /// Distance of neighbours in the run, in elements.
  [[nodiscard]] std::int64_t stride() const noexcept { return layout_.strides[u(last())]; }
  /// Elements from here to the end of the run.
  [[nodiscard]] std::int64_t run() const noexcept {
    return layout_.shape[u(last())] - index_[u(last())];
  }
  [[nodiscard]] std::size_t element_bytes() const noexcept {
    return static_cast<std::size_t>(element_);
  }

  /// Moves on by `count` <= run() elements.
  void advance(std::int64_t count) noexcept {
    int d = last();
    at_ += count * layout_.strides[u(d)] * element_;
    index_[u(d)] += count;
    while (d > 0 && index_[u(d)] == layout_.shape[u(d)]) {
      at_ += (layout_.strides[u(d - 1)] - layout_.shape[u(d)] * layout_.strides[u(d)]) * element_;
      index_[u(d)] = 0;
      --d;
      ++index_[u(d)];
    }
  }

 private:
  static std::size_t u(int d) noexcept { return static_cast<std::size_t>(d); }
  [[nodiscard]] int last() const noexcept { return layout_.ndim - 1; }

  void seek(std::int64_t flat) noexcept {
    for (int d = last(); d >= 0; --d) {
      const std::int64_t extent = layout_.shape[u(d)];
      index_[u(d)] = d == 0 ? flat : flat % extent;
      flat = d == 0 ? 0 : flat / extent;
      at_ += index_[u(d)] * layout_.strides[u(d)] * element_;
    }
  }

  Byte* at_ = nullptr;
  Layout layout_ = dense_layout(0);
  std::array<std::int64_t, kMaxDims> index_{};
  std::int64_t element_ = 1;
};

using ReadCursor = Cursor<const std::byte>;
using WriteCursor = Cursor<std::byte>;

namespace detail {

template <class T>
inline void copy_elements(std::byte* to, std::int64_t to_stride, const std::byte* from,
                          std::int64_t from_stride, std::int64_t count) noexcept {
  for (std::int64_t i = 0; i < count; ++i) {
    // memcpy of one element: views of bytes may be aligned to less than the element's size
    std::memcpy(to + i * to_stride * static_cast<std::int64_t>(sizeof(T)),
                from + i * from_stride * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
  }
}

inline void copy_run(std::byte* to, std::int64_t to_stride, const std::byte* from,
                     std::int64_t from_stride, std::int64_t count,
                     std::size_t element_bytes) noexcept {
  // An in-place collective finds its own part where it belongs; peers may be reading it.
  if (count <= 0 || (to == from && (to_stride == from_stride || count == 1))) {
    return;
  }
  if ((to_stride == 1 && from_stride == 1) || count == 1) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * element_bytes);
    return;
  }
  switch (element_bytes) {
    case 1:
      return copy_elements<std::uint8_t>(to, to_stride, from, from_stride, count);
    case 2:
      return copy_elements<std::uint16_t>(to, to_stride, from, from_stride, count);
    case 4:
      return copy_elements<std::uint32_t>(to, to_stride, from, from_stride, count);
    default:
      return copy_elements<std::uint64_t>(to, to_stride, from, from_stride, count);
  }
}

}  // namespace detail

/// Copies the next `count` elements and advances both cursors. The elements' sizes are equal.
inline void copy(WriteCursor& to, ReadCursor& from, std::int64_t count) noexcept {
  while (count > 0) {
    const std::int64_t step = std::min({count, to.run(), from.run()});
    detail::copy_run(to.at(), to.stride(), from.at(), from.stride(), step, to.element_bytes());
    to.advance(step);
    from.advance(step);
    count -= step;
  }
}

/// Copies the first `count` elements between layouts.
inline void copy(std::byte* to, const Layout& to_layout, const std::byte* from,
                 const Layout& from_layout, std::size_t element_bytes,
                 std::int64_t count) noexcept {
  if (to_layout.contiguous() && from_layout.contiguous()) {
    detail::copy_run(to, 1, from, 1, count, element_bytes);
    return;
  }
  WriteCursor writer(to, to_layout, element_bytes);
  ReadCursor reader(from, from_layout, element_bytes);
  copy(writer, reader, count);
}

/// Copies all elements between layouts of equal element counts.
inline void copy(std::byte* to, const Layout& to_layout, const std::byte* from,
                 const Layout& from_layout, std::size_t element_bytes) noexcept {
  copy(to, to_layout, from, from_layout, element_bytes, to_layout.numel);
}

/// The bytes that a view touches, as distances from its data pointer.
struct Extent {
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

template <class Void>
[[nodiscard]] Extent extent_of(const BasicTensorView<Void>& view) noexcept {
  if (view.numel() == 0) {
    return {};
  }
  std::int64_t low = 0;
  std::int64_t high = 0;
  for (int d = 0; d < view.ndim(); ++d) {
    const std::int64_t reach = (view.shape()[d] - 1) * view.strides()[d];
    (reach < 0 ? low : high) += reach;
  }
  const auto element = static_cast<std::int64_t>(size_of(view.dtype()));
  return {low * element, (high + 1) * element};
}

}  // namespace cohort::host
