// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <utility>

#include "cohort/dtype.hpp"
#include "cohort/error.hpp"
#include "cohort/joined.hpp"
#include "cohort/stream.hpp"

/// \file
/// Strided views of tensors, and the tensor that owns its memory. Strides count elements, not
/// bytes, as in PyTorch and DLPack.

namespace cohort {

/// The most dimensions of a tensor.
inline constexpr int kMaxDims = 8;

/// A short list of extents or strides, held in place.
class Dims {
 public:
  constexpr Dims() = default;
  /// Throws `UsageError` for more than `kMaxDims`.
  constexpr Dims(std::initializer_list<std::int64_t> values)
      : Dims(std::span<const std::int64_t>(values.begin(), values.size())) {}
  /// Throws `UsageError` for more than `kMaxDims`.
  constexpr explicit Dims(std::span<const std::int64_t> values) {
    if (values.size() > static_cast<std::size_t>(kMaxDims)) {
      throw UsageError(
          fmt::format("dims: expected at most {} dimensions, got {}", kMaxDims, values.size()));
    }
    for (const auto value : values) {
      values_[static_cast<std::size_t>(size_++)] = value;
    }
  }

  /// How many there are.
  [[nodiscard]] constexpr int size() const noexcept { return size_; }
  /// The i-th, 0 to `kMaxDims` - 1; 0 behind the last.
  [[nodiscard]] constexpr std::int64_t operator[](int i) const noexcept {
    return values_[static_cast<std::size_t>(i)];
  }
  /// The i-th, to be changed.
  [[nodiscard]] constexpr std::int64_t& operator[](int i) noexcept {
    return values_[static_cast<std::size_t>(i)];
  }
  /// The first.
  [[nodiscard]] constexpr const std::int64_t* begin() const noexcept { return values_.data(); }
  /// Behind the last.
  [[nodiscard]] constexpr const std::int64_t* end() const noexcept {
    return values_.data() + size_;
  }

  /// The list with one more in front. Throws `UsageError` where it has `kMaxDims` already.
  [[nodiscard]] constexpr Dims behind(std::int64_t value) const {
    if (size_ == kMaxDims) {
      throw UsageError(fmt::format("dims: expected fewer than {} to put another in front, got {}",
                                   kMaxDims, size_));
    }
    Dims longer;
    longer.values_[0] = value;
    for (int i = 0; i < size_; ++i) {
      longer[i + 1] = (*this)[i];
    }
    longer.size_ = size_ + 1;
    return longer;
  }

  friend constexpr bool operator==(const Dims& a, const Dims& b) noexcept {
    if (a.size_ != b.size_) {
      return false;
    }
    for (int i = 0; i < a.size_; ++i) {
      if (a[i] != b[i]) {
        return false;
      }
    }
    return true;
  }

 private:
  std::array<std::int64_t, kMaxDims> values_{};
  int size_ = 0;
};

/// Such as "(2,4,8)".
[[nodiscard]] inline std::string to_string(const Dims& dims) {
  return fmt::format("({})", detail::joined(dims, ","));
}

/// Throws `UsageError` naming `argument` for what is no element type.
constexpr void check_dtype(std::string_view argument, DType dtype) {
  if (!is_dtype(dtype)) {
    detail::refuse([=] {
      return fmt::format("{}: expected an element type, got number {}", argument,
                         static_cast<int>(dtype));
    });
  }
}

/// Product of the extents. Throws `UsageError` naming `argument` on a negative extent, and where
/// the product of those that are not 0 is 2^59 or more.
[[nodiscard]] constexpr std::int64_t numel(const Dims& shape, std::string_view argument = "shape") {
  std::int64_t product = 1;
  bool empty = false;
  for (const auto extent : shape) {
    if (extent < 0) {
      detail::refuse([&] {
        return fmt::format("{}: expected extents >= 0, got {}", argument, to_string(shape));
      });
    }
    if (extent == 0) {
      empty = true;
      continue;
    }
    // No division: every call of a group makes views.
    if (__builtin_mul_overflow(product, extent, &product) ||
        product > std::numeric_limits<std::int64_t>::max() / 16) {
      detail::refuse([&] {
        return fmt::format("{}: expected fewer than 2^59 elements, got {}", argument,
                           to_string(shape));
      });
    }
  }
  return empty ? 0 : product;
}

/// Bytes of a tensor without gaps. Throws as `numel`, and for what is no element type.
[[nodiscard]] constexpr std::size_t bytes_of(const Dims& shape, DType dtype) {
  check_dtype("dtype", dtype);
  return static_cast<std::size_t>(numel(shape)) * size_of(dtype);
}

/// Strides of a row-major tensor without gaps; of a shape that `numel` refuses any.
[[nodiscard]] constexpr Dims contiguous_strides(const Dims& shape) noexcept {
  Dims strides = shape;
  std::uint64_t step = 1;  // which may wrap
  for (int i = shape.size() - 1; i >= 0; --i) {
    strides[i] = static_cast<std::int64_t>(step);
    step *= static_cast<std::uint64_t>(shape[i] > 0 ? shape[i] : 1);
  }
  return strides;
}

/// Maps a dimension in [-ndim, ndim) to [0, ndim). Throws `UsageError` naming `argument`.
[[nodiscard]] inline int normalize_dim(int dim, int ndim, std::string_view argument) {
  if (dim < -ndim || dim >= ndim) {
    detail::refuse([=] {
      return fmt::format("{}: expected a dimension in [{}, {}), got {}", argument, -ndim, ndim,
                         dim);
    });
  }
  return dim < 0 ? dim + ndim : dim;
}

/// The number of a shape's elements, as `numel` says, where it is known. Not what a list of one
/// stride becomes.
enum class Counted : std::int64_t {};

/// A view of memory as a tensor. `Void` is `void` or `const void`. Owns nothing.
template <class Void>
class BasicTensorView {
  using Byte = std::conditional_t<std::is_const_v<Void>, const std::byte, std::byte>;

 public:
  BasicTensorView() = default;

  /// A row-major view without gaps. Throws `UsageError` where `data` is null although the tensor
  /// has elements.
  BasicTensorView(Void* data, DType dtype, const Dims& shape, Device device = {})
      : data_(data),
        shape_(shape),
        strides_(contiguous_strides(shape)),  // built here: see `Unsqueezed`
        numel_(cohort::numel(shape)),
        device_(device),
        dtype_(dtype) {
    check_data();
  }

  /// The same of memory for `numel` elements, which are those of the shape: for owners of memory,
  /// which have counted them.
  BasicTensorView(Void* data, DType dtype, const Dims& shape, Counted numel, Device device) noexcept
      : data_(data),
        shape_(shape),
        strides_(contiguous_strides(shape)),
        numel_(static_cast<std::int64_t>(numel)),
        device_(device),
        dtype_(dtype) {}

  /// Throws `UsageError` where shape and strides differ in length or `data` is null although the
  /// tensor has elements.
  BasicTensorView(Void* data, DType dtype, const Dims& shape, const Dims& strides,
                  Device device = {})
      : data_(data),
        shape_(shape),
        strides_(strides),
        numel_(cohort::numel(shape)),
        device_(device),
        dtype_(dtype),
        is_contiguous_(has_no_gaps(shape, strides, numel_)) {
    if (shape.size() != strides.size()) {
      throw UsageError(fmt::format("strides: expected {} values for the shape {}, got {}",
                                   shape.size(), to_string(shape), to_string(strides)));
    }
    check_data();
  }

  /// A view of mutable memory converts to a view of constant memory.
  template <class Other>
  requires(std::is_const_v<Void>&& std::is_same_v<Other, void>)
      [[gnu::hot]] BasicTensorView(  // NOLINT(google-explicit-constructor)
          const BasicTensorView<Other>& other) noexcept
      : data_(other.data()),
        shape_(other.shape()),
        strides_(other.strides()),
        numel_(other.numel()),
        device_(other.device()),
        dtype_(other.dtype()),
        is_contiguous_(other.is_contiguous()) {}

  /// The first element.
  [[nodiscard]] Void* data() const noexcept { return data_; }
  /// The elements as `T`. Throws `UsageError` where `T` is not the view's element type.
  template <class T>
  [[nodiscard]] auto* data_as() const {
    if (dtype_of<T> != dtype_) {
      throw UsageError(fmt::format("data_as: the tensor holds {}, not {}", to_string(dtype_),
                                   to_string(dtype_of<T>)));
    }
    return static_cast<std::conditional_t<std::is_const_v<Void>, const T, T>*>(data_);
  }
  /// Of the elements.
  [[nodiscard]] DType dtype() const noexcept { return dtype_; }
  /// Where they lie.
  [[nodiscard]] Device device() const noexcept { return device_; }
  /// Elements along each dimension.
  [[nodiscard]] const Dims& shape() const noexcept { return shape_; }
  /// In elements.
  [[nodiscard]] const Dims& strides() const noexcept { return strides_; }
  /// Dimensions.
  [[nodiscard]] int ndim() const noexcept { return shape_.size(); }
  /// Extent of a dimension; negative ones count from the end.
  [[nodiscard]] std::int64_t size(int dim) const {
    return shape_[normalize_dim(dim, ndim(), "size")];
  }
  /// Elements.
  [[nodiscard]] std::int64_t numel() const noexcept { return numel_; }
  /// Bytes of the elements, gaps not counted.
  [[nodiscard]] std::size_t bytes() const noexcept {
    return static_cast<std::size_t>(numel_) * size_of(dtype_);
  }

  /// Whether the elements lie side by side, the last dimension fastest.
  [[nodiscard]] bool is_contiguous() const noexcept { return is_contiguous_; }

  /// The elements [begin, begin + length) of a dimension.
  [[nodiscard]] BasicTensorView slice(int dim, std::int64_t begin, std::int64_t length) const {
    const int d = normalize_dim(dim, ndim(), "slice dim");
    if (begin < 0 || length < 0 || begin > shape_[d] - length) {
      throw UsageError(fmt::format("slice: [{}, {}+{}) lies outside the extent {} of dimension {}",
                                   begin, begin, length, shape_[d], d));
    }
    Dims shape = shape_;
    shape[d] = length;
    // One without elements begins where this one does: strides of what is not there say nothing.
    const bool none = length == 0 || numel_ == 0;
    return {offset(none ? 0 : begin * strides_[d]), dtype_, shape, strides_, device_};
  }

  /// The view with two dimensions exchanged.
  [[nodiscard]] BasicTensorView transpose(int a, int b) const {
    const int da = normalize_dim(a, ndim(), "transpose dim");
    const int db = normalize_dim(b, ndim(), "transpose dim");
    BasicTensorView view = *this;
    std::swap(view.shape_[da], view.shape_[db]);
    std::swap(view.strides_[da], view.strides_[db]);
    view.is_contiguous_ = has_no_gaps(view.shape_, view.strides_, numel_);
    return view;
  }

  /// The view with a dimension of one element in front, along which nothing is stepped over.
  [[nodiscard]] BasicTensorView unsqueeze() const { return {*this, Unsqueezed{}}; }

  /// The same elements in another shape. Needs a contiguous view and an equal element count.
  [[nodiscard]] BasicTensorView reshape(const Dims& shape) const {
    if (!is_contiguous() || cohort::numel(shape) != numel_) {
      throw UsageError(fmt::format("reshape: cannot view {} with strides {} as {}",
                                   to_string(shape_), to_string(strides_), to_string(shape)));
    }
    return {data_, dtype_, shape, device_};
  }

  /// The same bytes as elements of another type, like torch's `view(dtype)`: the last dimension
  /// counts the new elements. Throws `UsageError` for what is no type, and where it has gaps, or
  /// the memory, a row or a step between rows is not a whole number of new elements.
  [[nodiscard]] BasicTensorView reinterpret(DType dtype) const {
    check_dtype("reinterpret dtype", dtype);
    const auto from = static_cast<std::int64_t>(size_of(dtype_));
    const auto to = static_cast<std::int64_t>(size_of(dtype));
    const int last = ndim() - 1;
    Dims shape = shape_;
    Dims strides = strides_;
    bool fits = last >= 0 && (numel_ == 0 || shape_[last] == 1 || strides_[last] == 1);
    fits = fits && (numel_ == 0 || reinterpret_cast<std::uintptr_t>(data_) % size_of(dtype) == 0);
    for (int d = 0; fits && d < last; ++d) {
      std::int64_t step = 0;  // in bytes
      const bool whole = !__builtin_mul_overflow(strides_[d], from, &step) && step % to == 0;
      fits = whole || numel_ == 0 || shape_[d] == 1;  // where nothing is stepped over, any will do
      strides[d] = whole ? step / to : 0;
    }
    if (!fits || shape_[last] * from % to != 0) {
      throw UsageError(fmt::format("reinterpret: cannot view {}{} with strides {} as {}",
                                   to_string(dtype_), to_string(shape_), to_string(strides_),
                                   to_string(dtype)));
    }
    shape[last] = shape_[last] * from / to;
    strides[last] = 1;
    return {data_, dtype, shape, strides, device_};
  }

 private:
  void check_data() const {
    if (data_ == nullptr && numel_ > 0) {
      detail::refuse([this] {
        return fmt::format("data: expected memory for the shape {}, got a null pointer",
                           to_string(shape_));
      });
    }
  }

  struct Unsqueezed {};
  /// Built where it is to be: a processor waits for what it has just written in small pieces and
  /// copies in large ones.
  BasicTensorView(const BasicTensorView& x, Unsqueezed /*how*/)
      : data_(x.data_),
        shape_(x.shape_.behind(1)),
        strides_(x.strides_.behind(0)),
        numel_(x.numel_),
        device_(x.device_),
        dtype_(x.dtype_),
        is_contiguous_(x.is_contiguous_) {}

  /// Asked of a view several times in each call, so it is known once the view is made.
  [[nodiscard]] static bool has_no_gaps(const Dims& shape, const Dims& strides,
                                        std::int64_t numel) noexcept {
    std::int64_t step = 1;
    for (int i = shape.size() - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != step) {
        return numel == 0;
      }
      step *= shape[i];
    }
    return true;
  }

  [[nodiscard]] Void* offset(std::int64_t elements) const noexcept {
    if (data_ == nullptr) {
      return nullptr;
    }
    return static_cast<Byte*>(data_) + elements * static_cast<std::int64_t>(size_of(dtype_));
  }

  Void* data_ = nullptr;
  Dims shape_{0};
  Dims strides_{1};
  std::int64_t numel_ = 0;
  Device device_{};
  DType dtype_ = DType::u8;
  bool is_contiguous_ = true;
};

/// What a call writes.
using TensorView = BasicTensorView<void>;
/// What a call only reads.
using ConstTensorView = BasicTensorView<const void>;

/// Shape, type and device.
template <class Void>
[[nodiscard]] std::string to_string(const BasicTensorView<Void>& view) {
  return fmt::format("{}{} on {}", to_string(view.dtype()), to_string(view.shape()),
                     to_string(view.device()));
}

/// Where the memory of owning tensors came from. Tensors share it, so it outlives them.
class MemoryOwner {
 public:
  MemoryOwner() = default;
  MemoryOwner(const MemoryOwner&) = delete;
  MemoryOwner& operator=(const MemoryOwner&) = delete;
  virtual ~MemoryOwner() = default;

  /// Takes block `block` back, in the order of the stream that it was allocated on.
  virtual void release(std::uint64_t block) noexcept = 0;
  /// The same, and takes the tensor's share of the owner, `self`, which is null afterwards: an
  /// owner may keep it for its next tensor, because to let go of a share and to make another costs
  /// more than a block.
  virtual void take_back(std::uint64_t block, std::shared_ptr<MemoryOwner>& self) noexcept {
    release(block);
    self.reset();
  }
  /// A later reuse of the block also waits for what `stream` has enqueued when it is released.
  virtual void record_stream(std::uint64_t block, StreamRef stream) = 0;
};

/// A contiguous tensor that owns its memory. Move-only; frees on destruction.
class Tensor {
 public:
  Tensor() = default;
  /// Of a block that its owner gave.
  Tensor(const TensorView& view, std::shared_ptr<MemoryOwner> owner, std::uint64_t block) noexcept
      : view_(view), owner_(std::move(owner)), block_(block) {}
  /// The same, without gaps and of so many elements as the shape has, built where it is to be.
  Tensor(void* data, DType dtype, const Dims& shape, Counted numel, Device device,
         std::shared_ptr<MemoryOwner>&& owner, std::uint64_t block) noexcept
      : view_(data, dtype, shape, numel, device), owner_(std::move(owner)), block_(block) {}
  /// The other is empty afterwards.
  Tensor(Tensor&& other) noexcept
      : view_(other.view_), owner_(std::move(other.owner_)), block_(other.block_) {
    other.view_ = kNothing;
  }
  /// Frees its own block first; the other is empty afterwards.
  Tensor& operator=(Tensor&& other) noexcept {
    if (this != &other) {
      release();
      view_ = other.view_;
      owner_ = std::move(other.owner_);
      block_ = other.block_;
      other.view_ = kNothing;
    }
    return *this;
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() { release(); }

  /// Frees the memory, in stream order, and leaves an empty tensor.
  void reset() noexcept {
    release();
    view_ = kNothing;
  }

  /// Views the front of the memory as a contiguous tensor of another shape, for memory whose size
  /// must be the same on all ranks though the shapes are not. Throws `UsageError` where the shape
  /// needs more bytes.
  void shrink_to(const Dims& shape) {
    const TensorView smaller(view_.data(), view_.dtype(), shape, view_.device());
    if (smaller.numel() > view_.numel()) {
      throw UsageError(fmt::format("shrink_to: {} needs more elements than {}", to_string(shape),
                                   to_string(view_.shape())));
    }
    view_ = smaller;
  }

  /// The memory is also used on `stream`: a reuse after this tensor is freed waits for it.
  void record_stream(StreamRef stream) {
    if (owner_ != nullptr) {
      owner_->record_stream(block_, stream);
    }
  }

  /// The same elements, not owned.
  [[nodiscard]] const TensorView& view() const noexcept { return view_; }
  /// As `view`.
  operator const TensorView&() const noexcept { return view_; }  // NOLINT(google-explicit-*)
  /// As `view`, to be read only.
  operator ConstTensorView() const noexcept { return view_; }  // NOLINT(google-explicit-*)

  /// The first element.
  [[nodiscard]] void* data() const noexcept { return view_.data(); }
  /// The elements as `T`. Throws `UsageError` where `T` is not their type.
  template <class T>
  [[nodiscard]] T* data_as() const {
    return view_.data_as<T>();
  }
  /// Of the elements.
  [[nodiscard]] DType dtype() const noexcept { return view_.dtype(); }
  /// Where they lie.
  [[nodiscard]] Device device() const noexcept { return view_.device(); }
  /// Elements along each dimension.
  [[nodiscard]] const Dims& shape() const noexcept { return view_.shape(); }
  /// Dimensions.
  [[nodiscard]] int ndim() const noexcept { return view_.ndim(); }
  /// Elements along `dim`; negative counts from the end.
  [[nodiscard]] std::int64_t size(int dim) const { return view_.size(dim); }
  /// Elements.
  [[nodiscard]] std::int64_t numel() const noexcept { return view_.numel(); }
  /// Of all elements.
  [[nodiscard]] std::size_t bytes() const noexcept { return view_.bytes(); }

 private:
  void release() noexcept {
    if (owner_ != nullptr) {
      owner_->take_back(block_, owner_);
    }
  }

  /// Copied, where one made on the spot would first be cleared and then be read in wider words than
  /// it was written: a fifth of what a block of an arena costs.
  static constexpr TensorView kNothing{};

  TensorView view_;
  std::shared_ptr<MemoryOwner> owner_;
  std::uint64_t block_ = 0;
};

}  // namespace cohort
