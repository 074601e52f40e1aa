// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/record_stream.h>
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "cohort/dtype.hpp"
#include "cohort/error.hpp"
#include "cohort/stream.hpp"
#include "cohort/tensor.hpp"
#include "cohort/transport.hpp"

/// \file
/// Between LibTorch and Cohort: views of `at::Tensor` and back without copies, torch's current
/// stream, and errors as torch's. Link with cohort::torch, which exists where Torch is found.
/// Needs no header of CUDA.

namespace cohort {

namespace detail {

inline constexpr std::array kTorchTypes = {
    std::pair{DType::f64, c10::ScalarType::Double},
    std::pair{DType::f32, c10::ScalarType::Float},
    std::pair{DType::f16, c10::ScalarType::Half},
    std::pair{DType::bf16, c10::ScalarType::BFloat16},
    std::pair{DType::i8, c10::ScalarType::Char},
    std::pair{DType::u8, c10::ScalarType::Byte},
    std::pair{DType::i32, c10::ScalarType::Int},
    std::pair{DType::i64, c10::ScalarType::Long},
    std::pair{DType::f8_e4m3, c10::ScalarType::Float8_e4m3fn},
    std::pair{DType::f8_e5m2, c10::ScalarType::Float8_e5m2},
    std::pair{DType::b8, c10::ScalarType::Bool},
    std::pair{DType::i16, c10::ScalarType::Short},
    std::pair{DType::u16, c10::ScalarType::UInt16},
};

/// A tensor in torch's hands, and the backend whose memory it is.
struct TorchLoan {
  std::shared_ptr<Backend> backend;  // goes after the tensor
  Tensor tensor;

  static void end(void* loan) noexcept { delete static_cast<TorchLoan*>(loan); }
};

}  // namespace detail

/// The library's element type. Throws torch's `TypeError` where it has none, as for complex
/// numbers.
[[nodiscard]] inline DType dtype_from_torch(c10::ScalarType type) {
  for (const auto& [ours, theirs] : detail::kTorchTypes) {
    if (theirs == type) {
      return ours;
    }
  }
  TORCH_CHECK_TYPE(false, "cohort has no element type for ", type);
}

/// Torch's element type.
[[nodiscard]] inline c10::ScalarType dtype_to_torch(DType dtype) {
  for (const auto& [ours, theirs] : detail::kTorchTypes) {
    if (ours == dtype) {
      return theirs;
    }
  }
  return c10::ScalarType::Undefined;
}

/// Torch's name of a device.
[[nodiscard]] inline c10::Device device_to_torch(Device device) {
  return device.kind == DeviceKind::host
             ? c10::Device(c10::DeviceType::CPU)
             : c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device.index));
}

/// The library's name of a device. Throws torch's `ValueError` for other kinds than CPU and CUDA.
[[nodiscard]] inline Device device_from_torch(c10::Device device) {
  if (device.is_cpu()) {
    return {};
  }
  TORCH_CHECK_VALUE(device.is_cuda(), "cohort: expected a tensor on cpu or cuda, got one on ",
                    device);
  return {DeviceKind::cuda, device.index()};
}

namespace detail {

template <class Void>
[[nodiscard]] BasicTensorView<Void> torch_view(const at::Tensor& x, Void* data) {
  return {data, dtype_from_torch(x.scalar_type()),
          Dims(std::span<const std::int64_t>(x.sizes().data(), x.sizes().size())),
          Dims(std::span<const std::int64_t>(x.strides().data(), x.strides().size())),
          device_from_torch(x.device())};
}

inline void check_plain(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.defined(), "cohort: expected a tensor, got none");
  TORCH_CHECK_TYPE(x.layout() == c10::kStrided && !x.is_nested() && !x.is_conj() && !x.is_neg(),
                   "cohort: expected a strided tensor whose elements lie in memory as they are");
}

}  // namespace detail

/// A view of what a call writes. Throws torch's `TypeError` and `ValueError` for tensors that the
/// library cannot take, and `UsageError` beyond `kMaxDims` dimensions.
[[nodiscard]] inline TensorView view_of(const at::Tensor& x) {
  detail::check_plain(x);
  return detail::torch_view<void>(x, x.mutable_data_ptr());
}

/// A view of what a call only reads; throws as `view_of`.
[[nodiscard]] inline ConstTensorView const_view_of(const at::Tensor& x) {
  detail::check_plain(x);
  return detail::torch_view<const void>(x, x.const_data_ptr());
}

/// A tensor of torch over the same memory, which is given back, in the order of the stream that it
/// was allocated on, when torch lets go of the last view. `backend` lives until then.
/// Torch's `record_stream` does nothing to it; `record_current_stream` does.
[[nodiscard]] inline at::Tensor to_torch(Tensor tensor, std::shared_ptr<Backend> backend) {
  const TensorView view = tensor.view();
  const std::span<const std::int64_t> shape(view.shape().begin(), view.shape().end());
  auto loan = std::make_unique<detail::TorchLoan>();
  loan->backend = std::move(backend);
  loan->tensor = std::move(tensor);
  const auto device = device_to_torch(view.device());
  return at::for_blob(view.data(), at::IntArrayRef(shape.data(), shape.size()))
      .context(loan.release(), &detail::TorchLoan::end)
      .target_device(device)
      .options(at::TensorOptions().dtype(dtype_to_torch(view.dtype())).device(device))
      .make_tensor();
}

/// The library's tensor behind a tensor, or a view of one, that `to_torch` of this module made;
/// null for any other.
[[nodiscard]] inline Tensor* tensor_behind(const at::Tensor& x) noexcept {
  if (!x.defined() || !x.has_storage()) {
    return nullptr;
  }
  const c10::DataPtr& data = x.storage().data_ptr();
  return data.get_deleter() == &detail::TorchLoan::end
             ? &static_cast<detail::TorchLoan*>(data.get_context())->tensor
             : nullptr;
}

/// Torch's current stream of the backend's device; none on the host, where calls are synchronous.
[[nodiscard]] inline StreamRef current_torch_stream(Backend& backend) {
  if (backend.device().kind == DeviceKind::host) {
    return {};
  }
  const auto device = device_to_torch(backend.device());
  const c10::impl::VirtualGuardImpl guard(device.type());
  return {backend.streams(), guard.getStreamNativeHandle(guard.getStream(device))};
}

/// The memory is also used on torch's current stream of the backend's device, whoever owns it:
/// torch's own `record_stream` for torch's memory.
inline void record_current_stream(const at::Tensor& x, Backend& backend) {
  const StreamRef stream = current_torch_stream(backend);
  if (Tensor* ours = tensor_behind(x)) {
    ours->record_stream(stream);
  } else if (stream.valid()) {
    const c10::impl::VirtualGuardImpl guard(x.device().type());
    x.record_stream(guard.getStream(x.device()));
  }
}

/// Calls `body`; what the library throws comes out as torch's: `ConfigError` and `UsageError` as
/// `ValueError`, the others as `DistBackendError`, whose texts name the kind, ranks and codes.
template <class Body>
decltype(auto) with_torch_errors(const Body& body) {
  try {
    return body();
  } catch (const UsageError& error) {
    C10_THROW_ERROR(ValueError, error.what());
  } catch (const ConfigError& error) {
    C10_THROW_ERROR(ValueError, error.what());
  } catch (const TimeoutError& error) {
    C10_THROW_ERROR(DistBackendError, std::string("cohort timed out: ") + error.what());
  } catch (const SymmetryError& error) {
    C10_THROW_ERROR(DistBackendError, std::string("cohort ranks differ: ") + error.what());
  } catch (const Error& error) {
    C10_THROW_ERROR(DistBackendError, std::string("cohort: ") + error.what());
  }
}

}  // namespace cohort
