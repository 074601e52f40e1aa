// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <type_traits>
#include <utility>

#include "cohort/dtype.hpp"
#include "cohort/error.hpp"
#include "cohort/stream.hpp"
#include "cohort/tensor.hpp"

/// \file
/// Tensors from and to DLPack, the C structures by which frameworks hand each other tensors without
/// copies. They are the caller's types: include the framework's own dlpack.h, of any version, and
/// name its `DLManagedTensor` or `DLManagedTensorVersioned`. The library has none of its own, so
/// that two never meet.
///
/// A tensor that changes hands in the middle of work: what the producer has enqueued is ordered by
/// the streams alone, as DLPack leaves it.
///
/// Source of the layout and the numbers: DLPack 1.1, include/dlpack/dlpack.h.

namespace cohort {

namespace detail {

/// An element type as DLPack writes it.
struct DlpackType {
  std::uint8_t code = 0;
  std::uint8_t bits = 0;

  friend constexpr bool operator==(const DlpackType&, const DlpackType&) = default;
};

inline constexpr std::array kDlpackTypes = {
    std::pair{DType::f64, DlpackType{2, 64}},     std::pair{DType::f32, DlpackType{2, 32}},
    std::pair{DType::f16, DlpackType{2, 16}},     std::pair{DType::bf16, DlpackType{4, 16}},
    std::pair{DType::i8, DlpackType{0, 8}},       std::pair{DType::u8, DlpackType{1, 8}},
    std::pair{DType::i32, DlpackType{0, 32}},     std::pair{DType::i64, DlpackType{0, 64}},
    std::pair{DType::f8_e4m3, DlpackType{10, 8}}, std::pair{DType::f8_e5m2, DlpackType{12, 8}},
    std::pair{DType::b8, DlpackType{6, 8}},       std::pair{DType::i16, DlpackType{0, 16}},
    std::pair{DType::u16, DlpackType{1, 16}},
};

[[nodiscard]] constexpr DlpackType to_dlpack_type(DType dtype) noexcept {
  for (const auto& [ours, theirs] : kDlpackTypes) {
    if (ours == dtype) {
      return theirs;
    }
  }
  return {};
}

[[nodiscard]] constexpr std::optional<DType> from_dlpack_type(DlpackType type) noexcept {
  for (const auto& [ours, theirs] : kDlpackTypes) {
    if (theirs == type) {
      return ours;
    }
  }
  return std::nullopt;
}

// Kinds of devices. Pinned host memory is addressed by the host like any other, managed memory by
// the card.
inline constexpr int kDlpackHost = 1;
inline constexpr int kDlpackCuda = 2;
inline constexpr int kDlpackPinned = 3;
inline constexpr int kDlpackManaged = 13;
inline constexpr std::uint64_t kDlpackReadOnly = 1;
inline constexpr std::uint32_t kDlpackMajor = 1;

/// Whether the structure says its version and flags, as `DLManagedTensorVersioned` does.
template <class Managed>
inline constexpr bool is_versioned = requires(Managed m) {
  m.version.major;
  m.flags;
};

/// Holds a foreign tensor until the last of its memory is given back.
template <class Managed>
class DlpackOwner final : public MemoryOwner {
 public:
  explicit DlpackOwner(Managed* managed) noexcept : managed_(managed) {}
  DlpackOwner(const DlpackOwner&) = delete;
  DlpackOwner& operator=(const DlpackOwner&) = delete;
  ~DlpackOwner() override {
    if (managed_->deleter != nullptr) {
      managed_->deleter(managed_);
    }
  }

  void release(std::uint64_t /*block*/) noexcept override {}  // with the owner
  void record_stream(std::uint64_t /*block*/, StreamRef /*stream*/) override {
    throw UsageError(
        "record_stream: memory that came by DLPack is its producer's, who alone can keep it for a "
        "stream");
  }

 private:
  Managed* managed_;
};

/// A tensor of ours in foreign hands, in one allocation with what describes it.
template <class Managed>
struct DlpackLoan {
  Managed managed{};
  Tensor tensor;
  std::array<std::int64_t, kMaxDims> shape{};
  std::array<std::int64_t, kMaxDims> strides{};
};

}  // namespace detail

/// What a `DLTensor` describes, not owned. Throws `UsageError` for an element type or a kind of
/// device that the library does not know, and for more than `kMaxDims` dimensions.
template <class DlTensor>
[[nodiscard]] TensorView view_of_dlpack(const DlTensor& tensor) {
  const auto dtype = tensor.dtype.lanes == 1
                         ? detail::from_dlpack_type({tensor.dtype.code, tensor.dtype.bits})
                         : std::nullopt;
  if (!dtype) {
    throw UsageError(
        fmt::format("from DLPack: no element type with code {}, {} bits and {} lanes is known",
                    int{tensor.dtype.code}, int{tensor.dtype.bits}, int{tensor.dtype.lanes}));
  }
  Device device;
  const auto kind = static_cast<int>(tensor.device.device_type);
  if (kind == detail::kDlpackCuda || kind == detail::kDlpackManaged) {
    device = {DeviceKind::cuda, static_cast<int>(tensor.device.device_id)};
  } else if (kind != detail::kDlpackHost && kind != detail::kDlpackPinned) {
    throw UsageError(fmt::format(
        "from DLPack: expected memory of the host or of CUDA, got device type {}", kind));
  }
  const auto ndim = static_cast<std::size_t>(tensor.ndim);
  const Dims shape(std::span<const std::int64_t>(tensor.shape, ndim));
  const Dims strides = tensor.strides == nullptr
                           ? contiguous_strides(shape)
                           : Dims(std::span<const std::int64_t>(tensor.strides, ndim));
  auto* const data = static_cast<std::byte*>(tensor.data);
  return {data == nullptr ? nullptr : data + tensor.byte_offset, *dtype, shape, strides, device};
}

/// A tensor that owns what a producer hands over: `managed->deleter` is called when it is dropped,
/// on the thread that drops it. Throws as `view_of_dlpack`, and `UsageError` for null, for another
/// major version, for memory that is read-only and for gaps, whose `view_of_dlpack` may be used
/// instead; what was refused is still the caller's.
template <class Managed>
[[nodiscard]] Tensor from_dlpack(Managed* managed) {
  if (managed == nullptr) {
    throw UsageError("from_dlpack: expected a tensor, got null");
  }
  if constexpr (detail::is_versioned<Managed>) {
    if (managed->version.major != detail::kDlpackMajor) {
      throw UsageError(fmt::format("from_dlpack: expected version {} of DLPack, got {}.{}",
                                   detail::kDlpackMajor, managed->version.major,
                                   managed->version.minor));
    }
    if ((managed->flags & detail::kDlpackReadOnly) != 0) {
      throw UsageError("from_dlpack: expected memory that may be written, got a read-only tensor");
    }
  }
  const TensorView view = view_of_dlpack(managed->dl_tensor);
  if (!view.is_contiguous()) {
    throw UsageError(
        fmt::format("from_dlpack: expected a tensor without gaps, got {} with strides {}",
                    to_string(view.shape()), to_string(view.strides())));
  }
  return {view, std::make_shared<detail::DlpackOwner<Managed>>(managed), 0};
}

/// Hands a tensor over: the consumer calls `deleter` once, which drops the tensor, on a thread on
/// which it may be dropped.
template <class Managed>
[[nodiscard]] Managed* to_dlpack(Tensor tensor) {
  auto loan = std::make_unique<detail::DlpackLoan<Managed>>();
  const TensorView view = tensor.view();
  const auto type = detail::to_dlpack_type(view.dtype());
  for (int d = 0; d < view.ndim(); ++d) {
    loan->shape[static_cast<std::size_t>(d)] = view.shape()[d];
    loan->strides[static_cast<std::size_t>(d)] = view.strides()[d];
  }
  auto& managed = loan->managed;
  auto& described = managed.dl_tensor;
  using Type = std::remove_reference_t<decltype(described.device.device_type)>;
  described.data = view.data();
  described.device.device_type = static_cast<Type>(
      view.device().kind == DeviceKind::host ? detail::kDlpackHost : detail::kDlpackCuda);
  described.device.device_id = view.device().index;
  described.ndim = view.ndim();
  described.dtype.code = type.code;
  described.dtype.bits = type.bits;
  described.dtype.lanes = 1;
  described.shape = loan->shape.data();
  described.strides = loan->strides.data();
  described.byte_offset = 0;
  if constexpr (detail::is_versioned<Managed>) {
    managed.version.major = detail::kDlpackMajor;
    managed.version.minor = 1;
    managed.flags = 0;
  }
  loan->tensor = std::move(tensor);
  managed.manager_ctx = loan.get();
  managed.deleter = [](Managed* self) {
    delete static_cast<detail::DlpackLoan<Managed>*>(self->manager_ctx);
  };
  return &loan.release()->managed;
}

}  // namespace cohort
