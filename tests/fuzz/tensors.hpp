// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cohort/tensor.hpp>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "random.hpp"
#include "support/group_tensors.hpp"

/// \file
/// Tensors with random strides inside memory whose every byte is known.

namespace cohort::fuzz {

/// Where the elements of a tensor lie in its memory.
struct Layout {
  Dims strides;
  std::int64_t first = 0;  ///< Elements before the element at index 0.
  std::int64_t span = 0;   ///< Elements of the whole memory.
};

[[nodiscard]] inline std::string to_string(const Layout& layout) {
  return fmt::format("strides {} from {} in {}", cohort::to_string(layout.strides), layout.first,
                     layout.span);
}

/// Dimensions in any order in memory, with gaps, some of them backwards. The last `dense` ones are
/// without gaps, in order, and innermost.
[[nodiscard]] inline Layout draw_layout(Random& random, const Dims& shape, int dense = 0) {
  Layout layout;
  layout.strides = shape;
  const bool plain = random.one_in(3);
  layout.first = plain && random.one_in(2) ? 0 : random.between(0, 3);
  std::vector<int> order;
  for (int d = 0; d < shape.size(); ++d) {
    order.push_back(d);
  }
  for (int d = shape.size() - dense - 1; d > 0 && !plain; --d) {
    std::swap(order[static_cast<std::size_t>(d)],
              order[static_cast<std::size_t>(random.between(0, d))]);
  }
  std::int64_t step = 1;
  for (int i = shape.size() - 1; i >= 0; --i) {
    const int d = order[static_cast<std::size_t>(i)];
    const std::int64_t extent = std::max<std::int64_t>(1, shape[d]);
    const bool free = !plain && i < shape.size() - dense;
    if (free && random.one_in(3)) {
      step += random.between(1, 3);
    }
    layout.strides[d] = step;
    if (free && random.one_in(4)) {
      layout.strides[d] = -step;
      layout.first += (extent - 1) * step;
    }
    step *= extent;
    if (free && extent == 1 && random.one_in(3)) {
      layout.strides[d] = random.pick({0, 1, -7, 1 << 20});  // nobody is to follow it
    }
  }
  std::int64_t last = layout.first;
  for (int d = 0; d < shape.size(); ++d) {
    if (layout.strides[d] > 0 && shape[d] > 1) {
      last += (shape[d] - 1) * layout.strides[d];
    }
  }
  layout.span = last + 1 + random.between(0, 3);
  return layout;
}

/// A tensor in its memory, and what the memory should hold.
class Cell {
 public:
  /// `memory` has at least the layout's span.
  Cell(std::byte* memory, DType dtype, const Dims& shape, const Layout& layout)
      : memory_(memory),
        bytes_(static_cast<std::size_t>(layout.span) * size_of(dtype)),
        first_(static_cast<std::size_t>(layout.first) * size_of(dtype)),
        view_(memory + first_, dtype, shape, layout.strides) {
    image_.resize(bytes_);
    reset();
  }

  [[nodiscard]] const TensorView& view() const noexcept { return view_; }
  /// The same elements in the image of what the memory should hold.
  [[nodiscard]] TensorView expected() noexcept {
    return {image_.data() + first_, view_.dtype(), view_.shape(), view_.strides()};
  }

  /// Fills memory and image with a pattern.
  void reset() {
    for (std::size_t i = 0; i < bytes_; ++i) {
      image_[i] = static_cast<std::byte>(0xa5 + 3 * i);
    }
    std::memcpy(memory_, image_.data(), bytes_);
  }
  /// Writes the same values to memory and image.
  template <class Value>
  void fill(const Value& value) {
    test::fill_with(expected(), value);
    std::memcpy(memory_, image_.data(), bytes_);
  }
  template <class Value>
  void expect(const Value& value) {
    test::fill_with(expected(), value);
  }

  /// What the memory holds now is what it should hold.
  void take_over() { std::memcpy(image_.data(), memory_, bytes_); }
  /// The elements are as they should be; the bytes around them remain to be checked.
  void accept() {
    const auto element = size_of(view_.dtype());
    test::walk(view_, [&](std::int64_t, const std::byte* got) {
      std::memcpy(image_.data() + (got - memory_), got, element);
    });
  }

  /// Throws unless every byte is as it should be, gaps and margins included.
  void check(std::string_view what) {
    if (std::memcmp(memory_, image_.data(), bytes_) == 0) {
      return;
    }
    test::walk(expected(), [&](std::int64_t flat, const std::byte* wanted) {
      const std::byte* got = memory_ + (wanted - image_.data());
      if (std::memcmp(got, wanted, size_of(view_.dtype())) != 0) {
        throw std::runtime_error(
            fmt::format("{}: element {} of {} is wrong", what, flat, cohort::to_string(view_)));
      }
    });
    throw std::runtime_error(fmt::format("{}: a byte beside the elements of {} was changed", what,
                                         cohort::to_string(view_)));
  }

 private:
  std::byte* memory_;
  std::size_t bytes_;
  std::size_t first_;
  TensorView view_;
  std::vector<std::byte> image_;
};

/// Memory of one rank for one tensor: in the group's windows or not, as each rank likes.
class Place {
 public:
  /// Every rank allocates `bytes` in the arena, so that all arenas stay alike.
  Place(SymmetricArena& arena, std::size_t bytes, bool in_window, StreamRef stream = {})
      : window_(arena.empty({static_cast<std::int64_t>(bytes)}, DType::u8, stream)) {
    if (in_window) {
      memory_ = static_cast<std::byte*>(window_.data());
    } else {
      ordinary_.resize(bytes / sizeof(std::uint64_t) + 1);
      memory_ = reinterpret_cast<std::byte*>(ordinary_.data());
    }
  }
  [[nodiscard]] std::byte* memory() const noexcept { return memory_; }

 private:
  Tensor window_;
  std::vector<std::uint64_t> ordinary_;
  std::byte* memory_ = nullptr;
};

}  // namespace cohort::fuzz
