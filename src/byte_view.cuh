// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "elements.cuh"

// A strided payload as a sequence of 8-byte words, whatever its alignment and size.

namespace cohort::cuda::detail {

/// Payloads without gaps that start on 8 bytes and are whole words: what tensors are as a rule, and
/// a fraction of the code.
struct FlatView {
  std::byte* base = nullptr;
  std::int64_t rank_stride = 0;  ///< Bytes from one rank's payload to the next; 0 if there is one.
};

__device__ __forceinline__ uint2 load_word(const FlatView& view, std::uint32_t word, int rank = 0) {
  return *reinterpret_cast<const uint2*>(view.base + rank * view.rank_stride +
                                         std::int64_t{8} * word);
}

__device__ __forceinline__ void store_word(const FlatView& view, std::uint32_t word, uint2 value,
                                           int rank = 0) {
  *reinterpret_cast<uint2*>(view.base + rank * view.rank_stride + std::int64_t{8} * word) = value;
}

/// [outer][inner] bytes with a stride between outer indices. Word i holds bytes [8i, 8i+8) of the
/// payload without gaps; bytes beyond the end read as 0 and are not written.
struct ByteView {
  std::byte* base = nullptr;
  std::int64_t outer_stride = 0;
  std::int64_t rank_stride = 0;  ///< As in `FlatView`.
  std::uint32_t total = 0;
  std::uint32_t inner = 1;
  FastDiv words_per_inner;
  FastDiv bytes_per_inner;
  bool contiguous = true;
  bool aligned = true;  ///< No word crosses a gap, and every word starts on 8 bytes.

  ByteView() = default;
  ByteView(const void* data, std::int64_t outer, std::int64_t inner_bytes, std::int64_t stride,
           std::int64_t stride_between_ranks)
      : base(static_cast<std::byte*>(const_cast<void*>(data))),
        outer_stride(stride),
        rank_stride(stride_between_ranks),
        total(static_cast<std::uint32_t>(outer * inner_bytes)),
        inner(static_cast<std::uint32_t>(std::max<std::int64_t>(inner_bytes, 1))),
        words_per_inner(std::max<std::int64_t>(inner_bytes / 8, 1)),
        bytes_per_inner(std::max<std::int64_t>(inner_bytes, 1)),
        contiguous(outer <= 1 || stride == inner_bytes) {
    aligned = is_aligned<uint2>(data) && rank_stride % 8 == 0 &&
              (contiguous || (inner_bytes % 8 == 0 && stride % 8 == 0));
  }

  [[nodiscard]] bool is_flat() const {
    return contiguous && aligned && total % 8 == 0 && total > 0;
  }
  [[nodiscard]] FlatView flat() const { return {base, rank_stride}; }

  __device__ __forceinline__ std::byte* word_at(std::uint32_t word) const {
    if (contiguous) {
      return base + std::int64_t{8} * word;
    }
    const std::uint32_t o = words_per_inner.divide(word);
    return base + o * outer_stride + std::int64_t{8} * (word - o * words_per_inner.divisor);
  }

  __device__ __forceinline__ std::byte* byte_at(std::uint32_t byte) const {
    const std::uint32_t o = contiguous ? 0 : bytes_per_inner.divide(byte);
    return base + o * outer_stride + (byte - o * inner);
  }
};

/// The words that the fast path cannot take, byte by byte.
__device__ __forceinline__ uint2 load_word_bytes(const ByteView& view, std::uint32_t first,
                                                 std::int64_t offset) {
  std::uint64_t bits = 0;
#pragma unroll 1
  for (std::uint32_t k = 0; k < 8 && first + k < view.total; ++k) {
    bits |= static_cast<std::uint64_t>(view.byte_at(first + k)[offset]) << (8 * k);
  }
  return make_uint2(static_cast<std::uint32_t>(bits), static_cast<std::uint32_t>(bits >> 32));
}

__device__ __forceinline__ void store_word_bytes(const ByteView& view, std::uint32_t first,
                                                 uint2 value, std::int64_t offset) {
  const std::uint64_t bits = value.x | (static_cast<std::uint64_t>(value.y) << 32);
#pragma unroll 1
  for (std::uint32_t k = 0; k < 8 && first + k < view.total; ++k) {
    view.byte_at(first + k)[offset] = static_cast<std::byte>(bits >> (8 * k));
  }
}

/// Of a rank's payload, where the view has one for each rank.
__device__ __forceinline__ uint2 load_word(const ByteView& view, std::uint32_t word, int rank = 0) {
  const std::int64_t offset = rank * view.rank_stride;
  if (view.aligned && word * 8 + 8 <= view.total) {
    return *reinterpret_cast<const uint2*>(view.word_at(word) + offset);
  }
  return load_word_bytes(view, word * 8, offset);
}

__device__ __forceinline__ void store_word(const ByteView& view, std::uint32_t word, uint2 value,
                                           int rank = 0) {
  const std::int64_t offset = rank * view.rank_stride;
  if (view.aligned && word * 8 + 8 <= view.total) {
    *reinterpret_cast<uint2*>(view.word_at(word) + offset) = value;
  } else {
    store_word_bytes(view, word * 8, value, offset);
  }
}

/// A word to be loaded or stored later, its address worked out now where that is simple.
template <class View>
struct WordAt {
  const View* view;
  std::uint32_t word;
  int rank;

  WordAt() = default;
  __device__ __forceinline__ WordAt(const View& v, std::uint32_t w, int r = 0)
      : view(&v), word(w), rank(r) {}
  __device__ __forceinline__ uint2 load_if(bool wanted) const {
    return wanted ? load_word(*view, word, rank) : make_uint2(0, 0);
  }
  __device__ __forceinline__ void store(uint2 value) const { store_word(*view, word, value, rank); }
};
template <>
struct WordAt<FlatView> {
  const std::byte* address;

  WordAt() = default;
  __device__ __forceinline__ WordAt(const FlatView& view, std::uint32_t word, int rank = 0)
      : address(settled(view.base + rank * view.rank_stride + std::int64_t{8} * word)) {}
  __device__ __forceinline__ uint2 load_if(bool wanted) const {
    uint2 value = make_uint2(0, 0);
    asm volatile("{.reg .pred p; setp.ne.u32 p,%3,0; @p ld.global.v2.u32 {%0,%1},[%2];}"
                 : "+r"(value.x), "+r"(value.y)
                 : "l"(address), "r"(static_cast<unsigned>(wanted))
                 : "memory");
    return value;
  }
  __device__ __forceinline__ void store(uint2 value) const {
    asm volatile("st.global.v2.u32 [%0],{%1,%2};" ::"l"(address), "r"(value.x), "r"(value.y)
                 : "memory");
  }
};

inline std::int64_t words_of(std::int64_t bytes) { return ceil_div(bytes, 8); }

/// Calls `call` with the number of ranks as a constant where the view is flat; line kernels for
/// other views exist for any number of ranks only.
template <class View, class Call>
void with_line_ranks(int n, const Call& call) {
  if constexpr (std::is_same_v<View, FlatView>) {
    with_ranks(n, call);
  } else {
    call(std::integral_constant<int, 0>{});
  }
}

/// Calls `call(from, to)` with the simplest views that both sides allow.
template <class Call>
void with_views(const ByteView& from, const ByteView& to, const Call& call) {
  if (from.is_flat() && to.is_flat()) {
    call(from.flat(), to.flat());
  } else {
    call(from, to);
  }
}

}  // namespace cohort::cuda::detail
