// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cohort/cohort.hpp>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "support/threads.hpp"

/// \file
/// Tensors of every form and memory, filled with small whole numbers, so that the right answer of a
/// collective is known exactly. Used by ranks that are threads and by ranks of an MPI job alike.

namespace cohort::test {

/// How a tensor's elements are laid out.
enum class Form { contiguous, transposed, sliced };
inline constexpr Form kForms[] = {Form::contiguous, Form::transposed, Form::sliced};

/// Where they lie: in the group's arena or in ordinary memory, or by turns from rank to rank.
enum class Memory { arena, ordinary, mixed };

inline constexpr DType kAllDTypes[] = {
    DType::f64, DType::f32,     DType::f16,     DType::bf16, DType::i8,  DType::u8, DType::i32,
    DType::i64, DType::f8_e4m3, DType::f8_e5m2, DType::b8,   DType::i16, DType::u16};

[[nodiscard]] inline std::size_t u(std::int64_t value) { return static_cast<std::size_t>(value); }
[[nodiscard]] inline Dims dims(const std::vector<std::int64_t>& values) {
  return Dims(std::span<const std::int64_t>(values));
}

/// A state on the host with windows for TP, PP and DCP.
[[nodiscard]] inline ParallelState make_state(ControlPlane& world, const ParallelLayout& layout,
                                              ParallelOptions options = {}) {
  options.layout = layout;
  if (options.backend == nullptr) {
    options.backend = host_backend({.window_bytes = 2048});  // read where tests' tensors lie
  }
  if (!options.symmetric.enabled) {
    options.symmetric = {.enabled = true, .selection = Selection::all()};
  }
  if (options.arena.growth_bytes == ArenaOptions{}.growth_bytes) {
    options.arena.growth_bytes = std::size_t{1} << 20;
  }
  return ParallelState::create(world, std::move(options));
}

/// -3 to 7, from the rank and the place in the tensor: sums over 8 ranks are exact in every type.
[[nodiscard]] inline std::int64_t value_at(int rank, std::int64_t flat) {
  return (rank * 5 + flat * 7) % 11 - 3;
}

/// Calls `visit` with a value of the C++ type that holds elements of `dtype`. 8-bit floats
/// and truth values are bytes here.
template <class Visit>
auto with_type(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::f64:
      return visit(double{});
    case DType::f32:
      return visit(float{});
    case DType::f16:
      return visit(Half{});
    case DType::bf16:
      return visit(BFloat16{});
    case DType::i32:
      return visit(std::int32_t{});
    case DType::i64:
      return visit(std::int64_t{});
    case DType::i8:
      return visit(std::int8_t{});
    case DType::i16:
      return visit(std::int16_t{});
    case DType::u16:
      return visit(std::uint16_t{});
    default:
      return visit(std::uint8_t{});
  }
}

template <class T>
[[nodiscard]] T from_integer(std::int64_t value) {
  if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>) {
    return T(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

/// Calls `each(flat, address)` for the elements in row-major order.
template <class Each>
void walk(const ConstTensorView& view, const Each& each) {
  if (view.numel() == 0) {
    return;
  }
  const auto element = static_cast<std::int64_t>(size_of(view.dtype()));
  std::vector<std::int64_t> index(u(view.ndim()), 0);
  const auto* address = static_cast<const std::byte*>(view.data());
  for (std::int64_t flat = 0;; ++flat) {
    each(flat, address);
    int d = view.ndim() - 1;
    for (; d >= 0; --d) {
      auto& i = index[u(d)];
      address += view.strides()[d] * element;
      if (++i < view.shape()[d]) {
        break;
      }
      address -= i * view.strides()[d] * element;
      i = 0;
    }
    if (d < 0) {
      return;
    }
  }
}

/// How the host reaches a card's memory, where tests run on one. Reading waits for the work before.
class DeviceAccess {
 public:
  DeviceAccess() = default;
  DeviceAccess(const DeviceAccess&) = delete;
  DeviceAccess& operator=(const DeviceAccess&) = delete;
  virtual ~DeviceAccess() = default;
  virtual void read(void* to, const void* from, std::size_t bytes) = 0;
  virtual void write(void* to, const void* from, std::size_t bytes) = 0;
};
inline DeviceAccess* device_access = nullptr;  // of the process

/// A view's memory as the host can read it: itself, or a copy.
class HostImage {
 public:
  explicit HostImage(const ConstTensorView& view) : view_(view) {
    if (view.device().kind == DeviceKind::host || view.numel() == 0) {
      return;
    }
    std::int64_t last = 0;
    for (int d = 0; d < view.ndim(); ++d) {
      last += (view.shape()[d] - 1) * view.strides()[d];
    }
    copy_.resize(u(last + 1) * size_of(view.dtype()));
    device_access->read(copy_.data(), view.data(), copy_.size());
    view_ = ConstTensorView(copy_.data(), view.dtype(), view.shape(), view.strides());
  }

  [[nodiscard]] const ConstTensorView& view() const noexcept { return view_; }
  /// What was written into the image is in `view` then.
  void store(const TensorView& view) const {
    if (!copy_.empty()) {
      device_access->write(view.data(), copy_.data(), copy_.size());
    }
  }

 private:
  ConstTensorView view_;
  std::vector<std::byte> copy_;
};

/// As `walk`, wherever the elements lie; what `each` writes to the addresses is kept.
template <class Each>
void write_elements(const TensorView& view, const Each& each) {
  const HostImage image(view);
  walk(image.view(), [&](std::int64_t flat, const std::byte* address) {
    each(flat, const_cast<std::byte*>(address));
  });
  image.store(view);
}
/// As `walk`, wherever the elements lie.
template <class Each>
void read_elements(const ConstTensorView& view, const Each& each) {
  walk(HostImage(view).view(), each);
}
inline void fill_bytes(const TensorView& view, int byte) {
  const HostImage image(view);
  std::memset(const_cast<void*>(image.view().data()), byte, view.bytes());
  image.store(view);
}

/// Writes `value(flat)`.
template <class Value>
void fill_with(const TensorView& view, const Value& value) {
  with_type(view.dtype(), [&](auto type) {
    using T = decltype(type);
    write_elements(view, [&](std::int64_t flat, std::byte* address) {
      const T x = from_integer<T>(value(flat));
      std::memcpy(address, &x, sizeof(x));
    });
  });
}
inline void fill(const TensorView& view, int rank) {
  fill_with(view, [&](std::int64_t flat) { return value_at(rank, flat); });
}

/// Throws unless every element has the bits of `value(flat)`.
template <class Value>
void check_values(const ConstTensorView& view, std::string_view what, const Value& value) {
  with_type(view.dtype(), [&](auto type) {
    using T = decltype(type);
    read_elements(view, [&](std::int64_t flat, const std::byte* address) {
      const T expected = from_integer<T>(value(flat));
      if (std::memcmp(address, &expected, sizeof(T)) != 0) {
        throw std::runtime_error(fmt::format("{}: element {} of {} is not {}", what, flat,
                                             to_string(view), value(flat)));
      }
    });
  });
}

/// Makes tensors for one rank and keeps their memory.
class Site {
 public:
  Site(GroupCoordinator& group, Memory memory, StreamRef stream = {})
      : group_(group), memory_(memory), stream_(stream) {}

  /// A tensor of the shape with the form's strides.
  [[nodiscard]] TensorView tensor(const Dims& shape, DType dtype, Form form = Form::contiguous) {
    return tensor(shape, shape, dtype, form);
  }
  /// The same where shapes differ between the ranks: `widest` is as large as any and equal on all.
  [[nodiscard]] TensorView tensor(const Dims& shape, const Dims& widest, DType dtype, Form form) {
    const Dims storage = storage_of(shape, form);
    const int last = shape.size() - 1;
    // Every rank allocates in the arena, so that offsets agree, whether it then uses that or not.
    kept_.push_back(group_.arena()->empty(storage_of(widest, form), dtype, stream_));
    kept_.back().shrink_to(storage);
    if (memory_ == Memory::ordinary || (memory_ == Memory::mixed && group_.rank() % 2 == 1)) {
      kept_.push_back(group_.backend().allocate(storage, dtype, stream_));
    }
    const TensorView all = kept_.back();
    fill_bytes(all, 0x5a);
    if (form == Form::sliced) {
      return all.slice(last, 1, shape[last]);
    }
    return form == Form::transposed ? all.transpose(0, last) : all;
  }
  [[nodiscard]] TensorView filled(const Dims& shape, DType dtype, Form form = Form::contiguous) {
    const auto view = tensor(shape, dtype, form);
    fill(view, group_.rank());
    return view;
  }

 private:
  [[nodiscard]] static Dims storage_of(const Dims& shape, Form form) {
    Dims storage = shape;
    const int last = shape.size() - 1;
    if (form == Form::sliced) {
      storage[last] += 3;
    } else if (form == Form::transposed) {
      std::swap(storage[0], storage[last]);
    }
    return storage;
  }

  GroupCoordinator& group_;
  Memory memory_;
  StreamRef stream_;
  std::vector<Tensor> kept_;
};

}  // namespace cohort::test
