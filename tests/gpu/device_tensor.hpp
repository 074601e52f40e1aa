// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "cohort/cuda/handles.hpp"
#include "cohort/dtype.hpp"
#include "cohort/tensor.hpp"

/// \file
/// Tensors on the device with values that the host knows exactly, in layouts with and without gaps.

namespace cohort::test {

/// How a test tensor lies in memory.
enum class Layout { contiguous, transposed, gapped };

inline void encode(DType dtype, double value, std::byte* to) {
  const auto put = [to](auto typed) { std::memcpy(to, &typed, sizeof(typed)); };
  switch (dtype) {
    case DType::f64:
      return put(value);
    case DType::f32:
      return put(static_cast<float>(value));
    case DType::f16:
      return put(Half(static_cast<float>(value)));
    case DType::bf16:
      return put(BFloat16(static_cast<float>(value)));
    case DType::i8:
      return put(static_cast<std::int8_t>(value));
    case DType::i32:
      return put(static_cast<std::int32_t>(value));
    case DType::i64:
      return put(static_cast<std::int64_t>(value));
    case DType::u8:
    case DType::f8_e4m3:
    case DType::f8_e5m2:  // moved as bytes
    case DType::b8:
      return put(static_cast<std::uint8_t>(value));
    case DType::i16:
      return put(static_cast<std::int16_t>(value));
    case DType::u16:
      return put(static_cast<std::uint16_t>(value));
  }
}

inline double decode(DType dtype, const std::byte* from) {
  const auto get = [from](auto typed) {
    std::memcpy(&typed, from, sizeof(typed));
    return typed;
  };
  switch (dtype) {
    case DType::f64:
      return get(double{});
    case DType::f32:
      return static_cast<double>(get(float{}));
    case DType::f16:
      return static_cast<double>(static_cast<float>(get(Half{})));
    case DType::bf16:
      return static_cast<double>(static_cast<float>(get(BFloat16{})));
    case DType::i8:
      return get(std::int8_t{});
    case DType::i32:
      return get(std::int32_t{});
    case DType::i64:
      return static_cast<double>(get(std::int64_t{}));
    case DType::u8:
    case DType::f8_e4m3:
    case DType::f8_e5m2:
    case DType::b8:
      return get(std::uint8_t{});
    case DType::i16:
      return get(std::int16_t{});
    case DType::u16:
      return get(std::uint16_t{});
  }
  return 0;
}

/// A tensor with memory of its own. Bytes between its elements hold a mark that must survive.
class DeviceTensor {
 public:
  DeviceTensor(DType dtype, Dims shape, Layout layout, Device device)
      : strides_(contiguous_strides(shape)), storage_(numel(shape)) {
    if (layout == Layout::transposed) {
      std::int64_t step = 1;
      for (int d = 0; d < shape.size(); ++d) {
        strides_[d] = step;
        step *= shape[d];
      }
    } else if (layout == Layout::gapped) {
      std::int64_t step = 2;
      for (int d = shape.size() - 1; d >= 0; --d) {
        strides_[d] = step;
        step = step * shape[d] + 3;
      }
      storage_ = step;
    }
    const std::size_t bytes = static_cast<std::size_t>(storage_) * size_of(dtype);
    memory_ = make_memory(device.index, bytes + 16);
    view_ = TensorView(memory_.get(), dtype, shape, strides_, device);
    fill([](std::int64_t) { return 0.0; });
  }

  /// Element i in row-major order becomes value(i).
  void fill(const std::function<double(std::int64_t)>& value) {
    std::vector<std::byte> bytes(storage_bytes(), kMark);
    for (std::int64_t i = 0; i < view_.numel(); ++i) {
      encode(view_.dtype(), value(i), bytes.data() + place(i));
    }
    cuda_check(cudaMemcpy(memory_.get(), bytes.data(), bytes.size(), cudaMemcpyHostToDevice),
               "cudaMemcpy");
    // From pageable memory cudaMemcpy may return before the bytes have arrived (CUDA Runtime API,
    // "API synchronization behavior"), and the tests' streams do not wait for the legacy one.
    cuda_check(cudaStreamSynchronize(cudaStreamLegacy), "cudaStreamSynchronize");
  }

  /// What differs from expected(i), and where; "" where nothing does. Waits for no stream.
  [[nodiscard]] std::string differs(const std::function<double(std::int64_t)>& expected) const {
    std::vector<std::byte> bytes(storage_bytes());
    cuda_check(cudaMemcpy(bytes.data(), memory_.get(), bytes.size(), cudaMemcpyDeviceToHost),
               "cudaMemcpy");
    const std::size_t element = size_of(view_.dtype());
    for (std::int64_t i = 0; i < view_.numel(); ++i) {
      const double got = decode(view_.dtype(), bytes.data() + place(i));
      if (!(got == expected(i))) {
        return "element " + std::to_string(i) + " of " + to_string(view_) + ": expected " +
               std::to_string(expected(i)) + ", got " + std::to_string(got);
      }
      std::memset(bytes.data() + place(i), static_cast<int>(kMark), element);
    }
    for (std::size_t b = 0; b < bytes.size(); ++b) {
      if (bytes[b] != kMark) {
        return "byte " + std::to_string(b) + " between the elements was written";
      }
    }
    return "";
  }

  [[nodiscard]] const TensorView& view() const noexcept { return view_; }

 private:
  static constexpr std::byte kMark{0x5a};

  [[nodiscard]] std::size_t storage_bytes() const {
    return static_cast<std::size_t>(storage_) * size_of(view_.dtype());
  }
  /// Byte offset of element i.
  [[nodiscard]] std::size_t place(std::int64_t i) const {
    std::int64_t offset = 0;
    for (int d = view_.ndim() - 1; d >= 0; --d) {
      offset += i % view_.shape()[d] * strides_[d];
      i /= view_.shape()[d];
    }
    return static_cast<std::size_t>(offset) * size_of(view_.dtype());
  }

  Dims strides_;
  std::int64_t storage_;
  UniqueMemory memory_;
  TensorView view_;
};

}  // namespace cohort::test
