// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>

#include "cohort/dcp/lse_merge.hpp"
#include "launch.cuh"

// Elements in registers: 8-byte words and 16-byte vectors, and the arithmetic on them. Words are
// the unit of all arithmetic, so that an element's bits do not depend on how wide it travelled.

namespace cohort::cuda::detail {

/// Division by a number known at launch: a multiplication and a shift, for numerators below 2^31
/// (T. Granlund and P. L. Montgomery, "Division by invariant integers using multiplication", 1994).
/// 0, an extent of a shape without elements, stands for 1: nothing is divided then.
struct FastDiv {
  std::uint32_t divisor = 1;
  std::uint32_t multiplier = 1;
  std::uint32_t shift = 0;

  FastDiv() = default;
  explicit FastDiv(std::int64_t d)
      : divisor(std::max(static_cast<std::uint32_t>(d), 1U)), shift(0) {
    while ((std::uint64_t{1} << shift) < divisor) {
      ++shift;
    }
    multiplier = static_cast<std::uint32_t>(
        ((std::uint64_t{1} << 32) * ((std::uint64_t{1} << shift) - divisor)) / divisor + 1);
  }

  __device__ __forceinline__ std::uint32_t divide(std::uint32_t numerator) const {
    return (__umulhi(numerator, multiplier) + numerator) >> shift;
  }
};

/// Keeps the compiler from working an address out later than here.
template <class T>
__device__ __forceinline__ T* settled(T* address) {
  asm volatile("" : "+l"(address));
  return address;
}

template <class T>
struct Word;  ///< Unpacks 8 bytes into floats and packs them again.

template <>
struct Word<float> {
  static constexpr int kElements = 2;
  static constexpr std::uint32_t kNegativeZeros = 0x80000000U;
  static __device__ __forceinline__ void unpack(uint2 w, float (&f)[2]) {
    f[0] = __uint_as_float(w.x);
    f[1] = __uint_as_float(w.y);
  }
  static __device__ __forceinline__ uint2 pack(const float (&f)[2]) {
    return make_uint2(__float_as_uint(f[0]), __float_as_uint(f[1]));
  }
};

template <>
struct Word<__half> {
  static constexpr int kElements = 4;
  static constexpr std::uint32_t kNegativeZeros = 0x80008000U;
  static __device__ __forceinline__ void unpack(uint2 w, float (&f)[4]) {
    const float2 a = __half22float2(*reinterpret_cast<const __half2*>(&w.x));
    const float2 b = __half22float2(*reinterpret_cast<const __half2*>(&w.y));
    f[0] = a.x, f[1] = a.y, f[2] = b.x, f[3] = b.y;
  }
  static __device__ __forceinline__ uint2 pack(const float (&f)[4]) {
    const __half2 a = __floats2half2_rn(f[0], f[1]);
    const __half2 b = __floats2half2_rn(f[2], f[3]);
    return make_uint2(*reinterpret_cast<const unsigned*>(&a),
                      *reinterpret_cast<const unsigned*>(&b));
  }
};

template <>
struct Word<__nv_bfloat16> {
  static constexpr int kElements = 4;
  static constexpr std::uint32_t kNegativeZeros = 0x80008000U;
  static __device__ __forceinline__ void unpack(uint2 w, float (&f)[4]) {
    f[0] = __uint_as_float(w.x << 16), f[1] = __uint_as_float(w.x & 0xffff0000U);
    f[2] = __uint_as_float(w.y << 16), f[3] = __uint_as_float(w.y & 0xffff0000U);
  }
  static __device__ __forceinline__ uint2 pack(const float (&f)[4]) {
    const __nv_bfloat162 a = __floats2bfloat162_rn(f[0], f[1]);
    const __nv_bfloat162 b = __floats2bfloat162_rn(f[2], f[3]);
    return make_uint2(*reinterpret_cast<const unsigned*>(&a),
                      *reinterpret_cast<const unsigned*>(&b));
  }
};

/// Calls `call` with a null pointer to the device's type. f32, f16, bf16.
template <class Call>
void with_float_type(DType dtype, const char* argument, const Call& call) {
  switch (dtype) {
    case DType::f32:
      return call(static_cast<float*>(nullptr));
    case DType::f16:
      return call(static_cast<__half*>(nullptr));
    case DType::bf16:
      return call(static_cast<__nv_bfloat16*>(nullptr));
    default:
      throw UsageError(
          fmt::format("{}: expected f32, f16 or bf16, got {}", argument, to_string(dtype)));
  }
}

/// Weighted sum of words in rank order. Starts at -0, the neutral element of addition, so that the
/// first term keeps its bits; every further term is one fused multiply-add.
template <class T>
class WeightedSum {
 public:
  __device__ __forceinline__ WeightedSum() {
#pragma unroll
    for (int k = 0; k < Word<T>::kElements; ++k) {
      sums_[k] = -0.0F;
    }
  }
  /// A rank whose scale is 0 is left out: its partial may hold NaN. Zeros take its place, negative
  /// ones, to which a sum adds nothing whatever its sign.
  __device__ __forceinline__ void add(float scale, uint2 word) {
    constexpr std::uint32_t kZeros = Word<T>::kNegativeZeros;
    const bool counts = scale != 0.0F;
    float x[Word<T>::kElements];
    Word<T>::unpack(make_uint2(counts ? word.x : kZeros, counts ? word.y : kZeros), x);
#pragma unroll
    for (int k = 0; k < Word<T>::kElements; ++k) {
      sums_[k] = __fmaf_rn(scale, x[k], sums_[k]);
    }
    any_ = any_ || counts;
  }
  __device__ __forceinline__ uint2 result() const {
    return any_ ? Word<T>::pack(sums_) : make_uint2(0, 0);
  }
  /// One sum, for outputs wider than T.
  __device__ __forceinline__ float at(int k) const { return any_ ? sums_[k] : 0.0F; }

 private:
  float sums_[Word<T>::kElements];
  bool any_ = false;
};

/// Plain sum of words in rank order.
template <class T>
class Sum {
 public:
  __device__ __forceinline__ Sum() {
#pragma unroll
    for (int k = 0; k < Word<T>::kElements; ++k) {
      sums_[k] = -0.0F;
    }
  }
  __device__ __forceinline__ void add(uint2 word) {
    float x[Word<T>::kElements];
    Word<T>::unpack(word, x);
#pragma unroll
    for (int k = 0; k < Word<T>::kElements; ++k) {
      sums_[k] = __fadd_rn(sums_[k], x[k]);
    }
  }
  __device__ __forceinline__ uint2 result() const { return Word<T>::pack(sums_); }

 private:
  float sums_[Word<T>::kElements];
};

/// Out of line: few weights are so small.
static __device__ __noinline__ float divide_small(float weight, float sum) { return weight / sum; }

/// Divides the weights of a row's partials by their sum, of at least 1, to the nearest as `/` does
/// and by the same steps, with one reciprocal for all of them. Those steps need what is left over
/// to be a normal number; smaller weights are left to `/`.
struct DivideWeights {
  __device__ __forceinline__ void operator()(float* weights, int n, float sum) const {
    constexpr float kSmall = 0x1p-100F;
    float reciprocal;
    asm("rcp.approx.ftz.f32 %0,%1;" : "=f"(reciprocal) : "f"(sum));
    reciprocal = __fmaf_rn(reciprocal, __fmaf_rn(-sum, reciprocal, 1.0F), reciprocal);
#pragma unroll
    for (int r = 0; r < n; ++r) {
      const float weight = weights[r];
      const float quotient = __fmul_rn(weight, reciprocal);
      weights[r] = weight < kSmall && weight != 0.0F
                       ? divide_small(weight, sum)
                       : __fmaf_rn(reciprocal, __fmaf_rn(-sum, quotient, weight), quotient);
    }
  }
};

/// Every rank's scale from every rank's LSE (dcp/lse_merge.hpp), in place; returns what the merged
/// LSE follows from.
__device__ __forceinline__ dcp::RowMass merge_scales(float* lses, int n, LseBase base,
                                                     float sink = dcp::kEmptyLse) {
  struct ExpE {
    __host__ __device__ float operator()(float x) const { return expf(x); }
  };
  struct Exp2 {
    __host__ __device__ float operator()(float x) const { return exp2f(x); }
  };
  const dcp::RowMass mass = base == LseBase::e ? dcp::weigh_with(lses, n, ExpE{}, lses, sink)
                                               : dcp::weigh_with(lses, n, Exp2{}, lses, sink);
  DivideWeights{}(lses, n, max(mass.sum, 1.0F));
  return mass;
}
/// The merged LSE.
__device__ __forceinline__ float mass_lse(const dcp::RowMass& mass, LseBase base) {
  struct LogE {
    __host__ __device__ float operator()(float x) const { return logf(x); }
  };
  struct Log2 {
    __host__ __device__ float operator()(float x) const { return log2f(x); }
  };
  return base == LseBase::e ? mass.lse(LogE{}) : mass.lse(Log2{});
}

template <class Value>
__host__ __device__ inline bool is_aligned(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) % sizeof(Value) == 0;
}

/// Byte by byte, in a loop: aligned data is the rule, and small code starts sooner.
__device__ __forceinline__ uint4 load_unaligned(const std::byte* address, unsigned bytes) {
  std::uint64_t low = 0;
  std::uint64_t high = 0;
#pragma unroll 1
  for (unsigned k = 0; k < bytes; ++k) {
    const auto byte = static_cast<std::uint64_t>(address[k]);
    low |= k < 8 ? byte << (8 * k) : 0;
    high |= k < 8 ? 0 : byte << (8 * (k - 8));
  }
  return make_uint4(static_cast<unsigned>(low), static_cast<unsigned>(low >> 32),
                    static_cast<unsigned>(high), static_cast<unsigned>(high >> 32));
}

__device__ __forceinline__ void store_unaligned(std::byte* address, uint4 value, unsigned bytes) {
  const std::uint64_t low = value.x | (static_cast<std::uint64_t>(value.y) << 32);
  const std::uint64_t high = value.z | (static_cast<std::uint64_t>(value.w) << 32);
#pragma unroll 1
  for (unsigned k = 0; k < bytes; ++k) {
    address[k] = static_cast<std::byte>(k < 8 ? low >> (8 * k) : high >> (8 * (k - 8)));
  }
}

__device__ __forceinline__ uint2 low(uint4 v) { return make_uint2(v.x, v.y); }
__device__ __forceinline__ uint2 high(uint4 v) { return make_uint2(v.z, v.w); }
__device__ __forceinline__ uint4 join(uint2 a, uint2 b) { return make_uint4(a.x, a.y, b.x, b.y); }

/// Loads or stores 8 or 16 bytes whose address may be aligned to less; `aligned` is uniform over
/// the launch.
template <class Value>
__device__ __forceinline__ Value load_as(const std::byte* address, bool aligned) {
  if (aligned) {
    return *reinterpret_cast<const Value*>(address);
  }
  const uint4 value = load_unaligned(address, sizeof(Value));
  if constexpr (sizeof(Value) == 16) {
    return value;
  } else {
    return low(value);
  }
}

__device__ __forceinline__ void store_as(std::byte* address, uint4 value, bool aligned) {
  if (aligned) {
    *reinterpret_cast<uint4*>(address) = value;
  } else {
    store_unaligned(address, value, 16);
  }
}

/// The same to an address in device memory of which the compiler knows nothing any more, such as a
/// `settled` one.
__device__ __forceinline__ void store_settled(std::byte* address, uint2 value, bool aligned) {
  if (aligned) {
    asm volatile("st.global.v2.u32 [%0],{%1,%2};" ::"l"(address), "r"(value.x), "r"(value.y)
                 : "memory");
  } else {
    store_unaligned(address, join(value, make_uint2(0, 0)), 8);
  }
}

/// Rows of a [batch][heads][row] tensor, in bytes.
struct Rows {
  std::byte* base = nullptr;
  std::int64_t batch_stride = 0;
  std::int64_t head_stride = 0;
  bool aligned = true;  ///< Every row starts on 16 bytes.

  Rows() = default;
  Rows(const void* data, std::int64_t batch_elements, std::int64_t head_elements,
       std::size_t element)
      : base(static_cast<std::byte*>(const_cast<void*>(data))),
        batch_stride(batch_elements * static_cast<std::int64_t>(element)),
        head_stride(head_elements * static_cast<std::int64_t>(element)),
        aligned(is_aligned<uint4>(data) && batch_stride % 16 == 0 && head_stride % 16 == 0) {}

  __device__ __forceinline__ std::byte* row(std::uint32_t b, std::uint32_t h) const {
    return base + b * batch_stride + h * head_stride;
  }
};

}  // namespace cohort::cuda::detail
