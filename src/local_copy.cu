// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cstdlib>

#include "elements.cuh"

// Strided copy, fill and the sum of pieces.

namespace cohort::cuda {
namespace detail {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  ///< Independent loads in flight a thread.

/// A copy as vectors: dims[0] varies fastest and counts vectors; strides are bytes.
struct CopyPlan {
  const std::byte* in = nullptr;
  std::byte* out = nullptr;
  std::uint32_t vectors = 0;
  int dims = 1;
  FastDiv extent[kMaxCopyDims];
  std::int64_t in_stride[kMaxCopyDims] = {};
  std::int64_t out_stride[kMaxCopyDims] = {};
};

/// `kDims` runs of the index are split off; a constant so that one- to three-dimensional copies,
/// the common ones, cost few instructions.
template <class Vector, int kDims>
__global__ void __launch_bounds__(kThreads) copy_kernel(const __grid_constant__ CopyPlan plan) {
  await_predecessor();
  const std::uint32_t base = blockIdx.x * (kThreads * kUnroll) + threadIdx.x;
  Vector values[kUnroll];
  std::int64_t to[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    std::uint32_t rest = base + static_cast<std::uint32_t>(u) * kThreads;
    std::int64_t from = 0;
    to[u] = -1;
    if (rest < plan.vectors) {
      to[u] = 0;
#pragma unroll
      for (int d = 0; d < kDims; ++d) {
        const std::uint32_t next = d + 1 < kDims ? plan.extent[d].divide(rest) : 0;
        const std::uint32_t index = rest - next * plan.extent[d].divisor;
        from += index * plan.in_stride[d];
        to[u] += index * plan.out_stride[d];
        rest = next;
      }
      values[u] = *reinterpret_cast<const Vector*>(plan.in + from);
    }
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (to[u] >= 0) {
      *reinterpret_cast<Vector*>(plan.out + to[u]) = values[u];
    }
  }
}

struct Dim {
  std::int64_t extent;
  std::int64_t in;   ///< bytes
  std::int64_t out;  ///< bytes
};

/// A short list of dimensions, held in place: a launch allocates nothing.
class DimList {
 public:
  static constexpr std::size_t kMost = 16;

  [[nodiscard]] std::size_t size() const noexcept { return size_; }
  [[nodiscard]] bool empty() const noexcept { return size_ == 0; }
  [[nodiscard]] Dim& operator[](std::size_t i) noexcept { return dims_[i]; }
  [[nodiscard]] const Dim& operator[](std::size_t i) const noexcept { return dims_[i]; }
  [[nodiscard]] Dim& back() noexcept { return dims_[size_ - 1]; }
  [[nodiscard]] const Dim* begin() const noexcept { return dims_.data(); }
  [[nodiscard]] const Dim* end() const noexcept { return dims_.data() + size_; }

  void push_back(const Dim& dim) noexcept { dims_[size_++] = dim; }

  /// Before the first that `comes_after` it; behind those that are equal.
  template <class ComesAfter>
  void insert(const Dim& dim, const ComesAfter& comes_after) noexcept {
    std::size_t at = size_++;
    for (; at > 0 && comes_after(dims_[at - 1], dim); --at) {
      dims_[at] = dims_[at - 1];
    }
    dims_[at] = dim;
  }

 private:
  std::array<Dim, kMost> dims_;
  std::size_t size_ = 0;
};

/// The copy's dimensions, fastest first: ordered by the output's strides so that writes coalesce,
/// without those of extent 1, and joined where one continues the other on both sides.
DimList joined_dims(std::span<const std::int64_t> in, std::span<const std::int64_t> out,
                    std::span<const std::int64_t> shape, std::int64_t element) {
  require(shape.size() <= DimList::kMost, "shape", "expected at most {} dimensions, got {}",
          DimList::kMost, shape.size());
  DimList dims;
  for (std::size_t d = 0; d < shape.size(); ++d) {
    if (shape[d] != 1) {
      dims.insert({shape[d], in[d] * element, out[d] * element},
                  [](const Dim& a, const Dim& b) { return std::abs(a.out) > std::abs(b.out); });
    }
  }
  DimList joined;
  for (const Dim& dim : dims) {
    if (!joined.empty() && dim.in == joined.back().in * joined.back().extent &&
        dim.out == joined.back().out * joined.back().extent) {
      joined.back().extent *= dim.extent;
    } else {
      joined.push_back(dim);
    }
  }
  return joined;
}

/// Widest access that every run's start and length allow.
std::int64_t vector_bytes(const void* in, const void* out, const DimList& dims,
                          std::int64_t element) {
  if (dims.empty() || dims[0].in != element || dims[0].out != element) {
    return element;
  }
  auto bits = reinterpret_cast<std::uintptr_t>(in) | reinterpret_cast<std::uintptr_t>(out) |
              static_cast<std::uintptr_t>(dims[0].extent * element) | 16U;
  for (std::size_t d = 1; d < dims.size(); ++d) {
    bits |= static_cast<std::uintptr_t>(dims[d].in) | static_cast<std::uintptr_t>(dims[d].out);
  }
  return static_cast<std::int64_t>(bits & (~bits + 1));
}

template <class Vector>
void launch_copy(const CopyPlan& plan, cudaStream_t stream) {
  const auto blocks = static_cast<int>(ceil_div(plan.vectors, kThreads * kUnroll));
  switch (plan.dims) {
    case 1:
      return launch(copy_kernel<Vector, 1>, blocks, kThreads, stream, plan);
    case 2:
      return launch(copy_kernel<Vector, 2>, blocks, kThreads, stream, plan);
    case 3:
      return launch(copy_kernel<Vector, 3>, blocks, kThreads, stream, plan);
    default:
      return launch(copy_kernel<Vector, kMaxCopyDims>, blocks, kThreads, stream, plan);
  }
}

/// One launch for up to 2^30 vectors; larger copies are cut along their slowest dimension.
void copy_dims(const std::byte* in, std::byte* out, DimList dims, std::int64_t element,
               cudaStream_t stream) {
  const std::int64_t width = vector_bytes(in, out, dims, element);
  std::int64_t vectors = 1;
  for (const Dim& dim : dims) {
    vectors *= dim.extent;
  }
  vectors = vectors * element / width;
  constexpr std::int64_t kMost = std::int64_t{1} << 30;
  if (vectors > kMost) {
    Dim& slowest = dims.back();
    const std::int64_t unit = dims.size() == 1 ? width / element : 1;
    const std::int64_t half = std::max(slowest.extent / 2 / unit * unit, unit);
    DimList rest = dims;
    rest.back().extent = slowest.extent - half;
    const std::byte* in_rest = in + half * slowest.in;
    std::byte* out_rest = out + half * slowest.out;
    slowest.extent = half;
    copy_dims(in, out, dims, element, stream);
    copy_dims(in_rest, out_rest, rest, element, stream);
    return;
  }
  CopyPlan plan;
  plan.in = in;
  plan.out = out;
  plan.vectors = static_cast<std::uint32_t>(vectors);
  plan.dims = std::max(1, static_cast<int>(dims.size()));
  for (std::size_t d = 0; d < dims.size(); ++d) {
    const bool runs = d == 0 && dims[d].in == element && dims[d].out == element;
    plan.extent[d] = FastDiv(runs ? dims[d].extent * element / width : dims[d].extent);
    plan.in_stride[d] = runs ? width : dims[d].in;
    plan.out_stride[d] = runs ? width : dims[d].out;
  }
  switch (width) {
    case 16:
      return launch_copy<uint4>(plan, stream);
    case 8:
      return launch_copy<uint2>(plan, stream);
    case 4:
      return launch_copy<std::uint32_t>(plan, stream);
    case 2:
      return launch_copy<std::uint16_t>(plan, stream);
    default:
      return launch_copy<std::uint8_t>(plan, stream);
  }
}

/// Writes `count` copies of a 16-byte pattern, then the first `tail` bytes of it.
__global__ void __launch_bounds__(kThreads)
    fill_kernel(std::byte* out, std::int64_t count, std::uint32_t tail, uint4 pattern) {
  await_predecessor();
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i <= count; i += step) {
    if (i < count) {
      store_as(out + 16 * i, pattern, is_aligned<uint4>(out));
    } else if (tail != 0) {
      store_unaligned(out + 16 * i, pattern, tail);
    }
  }
}

/// Sums words of `n` pieces. `count` words, of which the last may be partial.
template <class T>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const std::byte* pieces, int n, std::int64_t piece_bytes, std::byte* out,
                  std::int64_t bytes, bool aligned) {
  await_predecessor();
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads * 16;
  for (std::int64_t at = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * 16; at < bytes;
       at += step) {
    const bool whole = at + 16 <= bytes;
    const auto length = static_cast<unsigned>(whole ? 16 : bytes - at);
    Sum<T> sums[2];
    for (int p0 = 0; p0 < n; p0 += kUnroll) {
      uint4 values[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (p0 + u < n) {
          const std::byte* from = pieces + (p0 + u) * piece_bytes + at;
          values[u] = aligned && whole ? *reinterpret_cast<const uint4*>(from)
                                       : load_unaligned(from, length);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (p0 + u < n) {
          sums[0].add(low(values[u]));
          sums[1].add(high(values[u]));
        }
      }
    }
    const uint4 result = join(sums[0].result(), sums[1].result());
    if (aligned && whole) {
      *reinterpret_cast<uint4*>(out + at) = result;
    } else {
      store_unaligned(out + at, result, length);
    }
  }
}

/// The bytes of `value` in a type, repeated to 16.
uint4 pattern_of(DType dtype, double value) {
  std::array<std::byte, 16> bytes{};
  const auto repeat = [&](auto element) {
    for (std::size_t at = 0; at < bytes.size(); at += sizeof(element)) {
      std::copy_n(reinterpret_cast<const std::byte*>(&element), sizeof(element), bytes.data() + at);
    }
  };
  switch (dtype) {
    case DType::f64:
      repeat(value);
      break;
    case DType::f32:
      repeat(static_cast<float>(value));
      break;
    case DType::f16:
      repeat(float_to_f16(static_cast<float>(value)));
      break;
    case DType::bf16:
      repeat(float_to_bf16(static_cast<float>(value)));
      break;
    case DType::i8:
      repeat(static_cast<std::int8_t>(value));
      break;
    case DType::u8:
      repeat(static_cast<std::uint8_t>(value));
      break;
    case DType::i32:
      repeat(static_cast<std::int32_t>(value));
      break;
    case DType::i64:
      repeat(static_cast<std::int64_t>(value));
      break;
    default:
      throw UsageError(fmt::format("dtype: cannot fill {}", to_string(dtype)));
  }
  uint4 pattern;
  std::copy_n(bytes.data(), bytes.size(), reinterpret_cast<std::byte*>(&pattern));
  return pattern;
}

int blocks_for(std::int64_t items) {
  constexpr std::int64_t kMost = 132 * 16;  // several waves on the largest card; the rest loops
  return static_cast<int>(std::clamp<std::int64_t>(ceil_div(items, kThreads), 1, kMost));
}

}  // namespace

void load_copy() {
  const auto load_of = []<class Vector>(Vector) {
    load(copy_kernel<Vector, 1>);
    load(copy_kernel<Vector, 2>);
    load(copy_kernel<Vector, 3>);
    load(copy_kernel<Vector, kMaxCopyDims>);
  };
  load_of(uint4{});
  load_of(uint2{});
  load_of(std::uint32_t{});
  load_of(std::uint16_t{});
  load_of(std::uint8_t{});
  load(fill_kernel);
  load(reduce_kernel<float>);
  load(reduce_kernel<__half>);
  load(reduce_kernel<__nv_bfloat16>);
}

void report_copy(std::vector<KernelInfo>& report) {
  report.push_back(describe("copy 16 bytes, 1 dim", copy_kernel<uint4, 1>, kThreads));
  report.push_back(describe("copy 16 bytes, 3 dims", copy_kernel<uint4, 3>, kThreads));
  report.push_back(describe("copy 16 bytes, 5 dims", copy_kernel<uint4, kMaxCopyDims>, kThreads));
  report.push_back(describe("reduce_pieces bf16", reduce_kernel<__nv_bfloat16>, kThreads));
}

}  // namespace detail

using namespace detail;

void strided_copy(const void* in, std::span<const std::int64_t> in_strides, void* out,
                  std::span<const std::int64_t> out_strides, std::span<const std::int64_t> shape,
                  DType dtype, cudaStream_t stream) {
  require(in_strides.size() == shape.size() && out_strides.size() == shape.size(), "strides",
          "expected {} of them, got {} and {}", shape.size(), in_strides.size(),
          out_strides.size());
  std::int64_t elements = 1;
  for (const std::int64_t extent : shape) {
    require(extent >= 0, "shape", "negative extent");
    elements *= extent;
  }
  if (elements == 0) {
    return;
  }
  require(in != nullptr && out != nullptr, "in, out", "null pointer");
  const auto element = static_cast<std::int64_t>(size_of(dtype));
  const DimList dims = joined_dims(in_strides, out_strides, shape, element);
  require(dims.size() <= kMaxCopyDims, "shape",
          "expected at most {} dimensions after joining, got {}", kMaxCopyDims, dims.size());
  copy_dims(static_cast<const std::byte*>(in), static_cast<std::byte*>(out), dims, element, stream);
}

void fill(void* out, std::int64_t count, DType dtype, double value, cudaStream_t stream) {
  require(count >= 0 && (count == 0 || out != nullptr), "out", "null pointer or negative count");
  if (count == 0) {
    return;
  }
  const std::int64_t bytes = count * static_cast<std::int64_t>(size_of(dtype));
  launch(fill_kernel, blocks_for(bytes / 16 + 1), kThreads, stream, static_cast<std::byte*>(out),
         bytes / 16, static_cast<std::uint32_t>(bytes % 16), pattern_of(dtype, value));
}

void reduce_pieces(const void* pieces, int n, std::int64_t piece_stride, void* out,
                   std::int64_t count, DType dtype, cudaStream_t stream) {
  require(n >= 1 && count >= 0, "n, count", "got n={} count={}", n, count);
  if (count == 0) {
    return;
  }
  require(pieces != nullptr && out != nullptr, "pieces, out", "null pointer");
  with_float_type(dtype, "dtype", [&]<class T>(T*) {
    const auto element = static_cast<std::int64_t>(sizeof(T));
    const bool aligned =
        is_aligned<uint4>(pieces) && is_aligned<uint4>(out) && piece_stride * element % 16 == 0;
    launch(reduce_kernel<T>, blocks_for(ceil_div(count * element, 16)), kThreads, stream,
           static_cast<const std::byte*>(pieces), n, piece_stride * element,
           static_cast<std::byte*>(out), count * element, aligned);
  });
}

}  // namespace cohort::cuda
