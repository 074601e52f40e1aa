// SPDX-License-Identifier: Apache-2.0
#include "attention.cuh"
#include "cohort/dcp/packed_piece.hpp"

// The staged and the packed plan's local steps, and the packing of the query.

namespace cohort::cuda {
namespace detail {
namespace {

constexpr int kThreads = 256;

/// Grid for one 16-byte vector a thread, looping beyond.
int blocks_for(std::int64_t vectors) {
  constexpr std::int64_t kMost = 132 * 32;
  return static_cast<int>(std::clamp<std::int64_t>(ceil_div(vectors, kThreads), 1, kMost));
}

/// Where a rank's piece of the packed plan starts, and its LSEs within it.
struct Pieces {
  std::byte* base;
  std::int64_t piece_bytes;
  std::int64_t lse_offset;
};

Pieces pieces_of(const MergeShape& s, int n, const void* base) {
  const std::int64_t payload =
      s.batch * (s.heads / n) * s.dim * static_cast<std::int64_t>(size_of(s.dtype));
  return {static_cast<std::byte*>(const_cast<void*>(base)),
          static_cast<std::int64_t>(packed_piece_bytes(s, n)), payload};
}

/// corrected = scale * partial. One thread a vector of the partial; the scale is computed per
/// thread, which costs less than sharing it.
template <int kRanks, class T, class Out>
__global__ void __launch_bounds__(kThreads)
    correct_kernel(Rows partial, const float* lses, int ranks, int rank, Rows corrected,
                   float* merged_lse, FastDiv vectors_per_row, FastDiv heads, std::uint32_t rows,
                   std::uint32_t vectors, LseBase base) {
  const int n = kRanks > 0 ? kRanks : ranks;
  await_predecessor();
  for (std::uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < vectors;
       i += gridDim.x * kThreads) {
    const std::uint32_t row = vectors_per_row.divide(i);
    const std::uint32_t v = i - row * vectors_per_row.divisor;
    const std::uint32_t b = heads.divide(row);
    const std::uint32_t h = row - b * heads.divisor;
    float scales[kRanks > 0 ? kRanks : kMaxPeers];
#pragma unroll
    for (int r = 0; r < n; ++r) {
      scales[r] = lses[static_cast<std::int64_t>(r) * rows + row];
    }
    const float merged = merge_scales(scales, n, base);
    if (merged_lse != nullptr && v == 0) {
      merged_lse[row] = merged;
    }
    unsigned bits = 0;  // picked by masks: an index would move the array out of registers
#pragma unroll
    for (int r = 0; r < n; ++r) {
      bits |= r == rank ? __float_as_uint(scales[r]) : 0U;
    }
    const float scale = __uint_as_float(bits);
    const uint4 in = load_as<uint4>(partial.row(b, h) + 16 * v, partial.aligned);
    WeightedSum<T> sums[2];
    sums[0].add(scale, low(in));
    sums[1].add(scale, high(in));
    if constexpr (sizeof(Out) == sizeof(T)) {
      store_as(corrected.row(b, h) + 16 * v, join(sums[0].result(), sums[1].result()),
               corrected.aligned);
    } else {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint4 wide =
            make_uint4(__float_as_uint(sums[k].at(0)), __float_as_uint(sums[k].at(1)),
                       __float_as_uint(sums[k].at(2)), __float_as_uint(sums[k].at(3)));
        store_as(corrected.row(b, h) + 32 * v + 16 * k, wide, corrected.aligned);
      }
    }
  }
}

/// Piece p = rows of the heads of rank p, and their LSEs. `rows` of one piece.
__global__ void __launch_bounds__(kThreads)
    pack_partial_kernel(Rows partial, Strided2 lse, Pieces pieces, FastDiv vectors_per_piece,
                        FastDiv vectors_per_row, FastDiv heads, std::uint32_t rows,
                        std::uint32_t vectors) {
  await_predecessor();
  for (std::uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < vectors;
       i += gridDim.x * kThreads) {
    const std::uint32_t p = vectors_per_piece.divide(i);
    const std::uint32_t in_piece = i - p * vectors_per_piece.divisor;
    const std::uint32_t row = vectors_per_row.divide(in_piece);
    const std::uint32_t v = in_piece - row * vectors_per_row.divisor;
    const std::uint32_t b = heads.divide(row);
    const std::uint32_t h = p * heads.divisor + row - b * heads.divisor;
    std::byte* piece = pieces.base + p * pieces.piece_bytes;
    reinterpret_cast<uint4*>(piece)[in_piece] =
        load_as<uint4>(partial.row(b, h) + 16 * v, partial.aligned);
    if (v == 0) {
      reinterpret_cast<float*>(piece + pieces.lse_offset)[row] = *lse.at(b, h);
    }
  }
}

template <int kRanks, class T>
__global__ void __launch_bounds__(kThreads)
    merge_pieces_kernel(Pieces pieces, int ranks, Rows merged, Strided2 merged_lse,
                        FastDiv vectors_per_row, FastDiv heads, std::uint32_t vectors,
                        LseBase base) {
  constexpr int kMost = kRanks > 0 ? kRanks : kMaxPeers;
  constexpr int kStep = kRanks > 0 ? kRanks : 8;
  const int n = kRanks > 0 ? kRanks : ranks;
  await_predecessor();
  for (std::uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < vectors;
       i += gridDim.x * kThreads) {
    const std::uint32_t row = vectors_per_row.divide(i);
    const std::uint32_t v = i - row * vectors_per_row.divisor;
    const std::uint32_t b = heads.divide(row);
    const std::uint32_t h = row - b * heads.divisor;
    float scales[kMost];
#pragma unroll
    for (int r = 0; r < n; ++r) {
      scales[r] = reinterpret_cast<const float*>(pieces.base + r * pieces.piece_bytes +
                                                 pieces.lse_offset)[row];
    }
    const float merged_value = merge_scales(scales, n, base);
    WeightedSum<T> sums[2];
    for (int r0 = 0; r0 < n; r0 += kStep) {
      uint4 values[kStep];
#pragma unroll
      for (int j = 0; j < kStep; ++j) {
        if (r0 + j < n) {
          values[j] =
              reinterpret_cast<const uint4*>(pieces.base + (r0 + j) * pieces.piece_bytes)[i];
        }
      }
#pragma unroll
      for (int j = 0; j < kStep; ++j) {
        if (r0 + j < n) {
          sums[0].add(scales[r0 + j], low(values[j]));
          sums[1].add(scales[r0 + j], high(values[j]));
        }
      }
    }
    store_as(merged.row(b, h) + 16 * v, join(sums[0].result(), sums[1].result()), merged.aligned);
    if (v == 0 && merged_lse.base != nullptr) {
      *merged_lse.at(b, h) = merged_value;
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    pack_query_kernel(Rows nope, Rows pe, Rows out, FastDiv vectors_per_row, FastDiv heads,
                      std::uint32_t nope_vectors, std::uint32_t vectors) {
  await_predecessor();
  for (std::uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < vectors;
       i += gridDim.x * kThreads) {
    const std::uint32_t row = vectors_per_row.divide(i);
    const std::uint32_t v = i - row * vectors_per_row.divisor;
    const std::uint32_t b = heads.divide(row);
    const std::uint32_t h = row - b * heads.divisor;
    const uint4 value = v < nope_vectors
                            ? load_as<uint4>(nope.row(b, h) + 16 * v, nope.aligned)
                            : load_as<uint4>(pe.row(b, h) + 16 * (v - nope_vectors), pe.aligned);
    store_as(out.row(b, h) + 16 * v, value, out.aligned);
  }
}

}  // namespace

void load_local_merge() {
  const auto load_for = []<class T>(T*) {
    for (int n = 1; n <= 8; ++n) {  // 1 stands for all numbers without a kernel of their own
      with_ranks(n, []<class Ranks>(Ranks) {
        load(correct_kernel<Ranks::value, T, float>);
        load(correct_kernel<Ranks::value, T, T>);
        load(merge_pieces_kernel<Ranks::value, T>);
      });
    }
  };
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    with_float_type(dtype, "dtype", load_for);
  }
  load(pack_partial_kernel);
  load(pack_query_kernel);
}

void report_local_merge(std::vector<KernelInfo>& report) {
  report.push_back(
      describe("correct_partial bf16 to f32", correct_kernel<2, __nv_bfloat16, float>, kThreads));
  report.push_back(describe("pack_partial", pack_partial_kernel, kThreads));
  report.push_back(
      describe("merge_pieces bf16, 2 ranks", merge_pieces_kernel<2, __nv_bfloat16>, kThreads));
  report.push_back(
      describe("merge_pieces bf16, 8 ranks", merge_pieces_kernel<8, __nv_bfloat16>, kThreads));
  report.push_back(describe("pack_query", pack_query_kernel, kThreads));
}

}  // namespace detail

using namespace detail;

std::size_t packed_piece_bytes(const MergeShape& shape, int n) {
  check_merge_shape(shape, n);
  return dcp::packed_piece(shape.batch, shape.heads / n, shape.dim, size_of(shape.dtype)).bytes;
}

void correct_partial(const MergeShape& shape, int n, int rank, const Partial& partial,
                     const float* lses, void* corrected, std::int64_t out_batch_stride,
                     std::int64_t out_head_stride, DType out_dtype, float* merged_lse,
                     cudaStream_t stream) {
  check_merge_shape(shape, 1);
  require(n >= 1 && n <= kMaxPeers && rank >= 0 && rank < n, "rank",
          "expected 0 to {} of at most {}, got {}", n - 1, kMaxPeers, rank);
  require(out_dtype == shape.dtype || out_dtype == DType::f32, "out_dtype",
          "expected f32 or the partial's {}, got {}", to_string(shape.dtype), to_string(out_dtype));
  if (is_empty(shape)) {
    return;
  }
  require(partial.out != nullptr && lses != nullptr && corrected != nullptr,
          "partial, lses, corrected", "null pointer");
  const std::size_t element = size_of(shape.dtype);
  const std::int64_t rows = shape.batch * shape.heads;
  const std::int64_t per_row = shape.dim * static_cast<std::int64_t>(element) / 16;
  const Rows in(partial.out, partial.out_batch_stride, partial.out_head_stride, element);
  const Rows out(corrected, out_batch_stride, out_head_stride, size_of(out_dtype));
  const auto run = [&](auto kernel) {
    launch(kernel, blocks_for(rows * per_row), kThreads, stream, in, lses, n, rank, out, merged_lse,
           FastDiv(per_row), FastDiv(shape.heads), static_cast<std::uint32_t>(rows),
           static_cast<std::uint32_t>(rows * per_row), shape.base);
  };
  with_float_type(shape.dtype, "dtype", [&]<class T>(T*) {
    with_ranks(n, [&](auto ranks) {
      if (out_dtype == DType::f32) {
        run(correct_kernel<ranks(), T, float>);
      } else {
        run(correct_kernel<ranks(), T, T>);
      }
    });
  });
}

void pack_partial(const MergeShape& shape, int n, const Partial& partial, void* pieces,
                  cudaStream_t stream) {
  check_merge_shape(shape, n);
  if (is_empty(shape)) {
    return;
  }
  require(partial.out != nullptr && partial.lse != nullptr, "partial", "null pointer");
  require(pieces != nullptr && is_aligned<uint4>(pieces), "pieces",
          "expected memory aligned to 16 bytes");
  const std::size_t element = size_of(shape.dtype);
  const std::int64_t heads = shape.heads / n;
  const std::int64_t rows = shape.batch * heads;
  const std::int64_t per_row = shape.dim * static_cast<std::int64_t>(element) / 16;
  launch(
      pack_partial_kernel, blocks_for(n * rows * per_row), kThreads, stream,
      Rows(partial.out, partial.out_batch_stride, partial.out_head_stride, element),
      Strided2{const_cast<float*>(partial.lse), partial.lse_batch_stride, partial.lse_head_stride},
      pieces_of(shape, n, pieces), FastDiv(rows * per_row), FastDiv(per_row), FastDiv(heads),
      static_cast<std::uint32_t>(rows), static_cast<std::uint32_t>(n * rows * per_row));
}

void merge_pieces(const MergeShape& shape, int n, const void* pieces, const Merged& merged,
                  cudaStream_t stream) {
  check_merge_shape(shape, n);
  if (is_empty(shape)) {
    return;
  }
  require(merged.out != nullptr, "merged", "null pointer");
  require(pieces != nullptr && is_aligned<uint4>(pieces), "pieces",
          "expected memory aligned to 16 bytes");
  const std::size_t element = size_of(shape.dtype);
  const std::int64_t heads = shape.heads / n;
  const std::int64_t per_row = shape.dim * static_cast<std::int64_t>(element) / 16;
  const std::int64_t vectors = shape.batch * heads * per_row;
  with_float_type(shape.dtype, "dtype", [&]<class T>(T*) {
    with_ranks(n, [&](auto ranks) {
      launch(merge_pieces_kernel<ranks(), T>, blocks_for(vectors), kThreads, stream,
             pieces_of(shape, n, pieces), n,
             Rows(merged.out, merged.out_batch_stride, merged.out_head_stride, element),
             Strided2{merged.lse, merged.lse_batch_stride, merged.lse_head_stride},
             FastDiv(per_row), FastDiv(heads), static_cast<std::uint32_t>(vectors), shape.base);
    });
  });
}

void pack_query(const Query& query, void* out, std::int64_t out_batch_stride,
                std::int64_t out_head_stride, cudaStream_t stream) {
  const std::int64_t bytes = query_lane_bytes(query, PeerPath::flag_line);  // checks the query
  if (bytes == 0) {
    return;
  }
  require(out != nullptr, "out", "null pointer");
  const std::size_t element = size_of(query.dtype);
  const std::int64_t nope = query.nope_dim * static_cast<std::int64_t>(element) / 16;
  const std::int64_t per_row = nope + query.pe_dim * static_cast<std::int64_t>(element) / 16;
  launch(pack_query_kernel, blocks_for(bytes / 16), kThreads, stream,
         Rows(query.nope, query.nope_batch_stride, query.nope_head_stride, element),
         Rows(query.pe, query.pe_batch_stride, query.pe_head_stride, element),
         Rows(out, out_batch_stride, out_head_stride, element), FastDiv(per_row),
         FastDiv(query.heads), static_cast<std::uint32_t>(nope),
         static_cast<std::uint32_t>(bytes / 16));
}

}  // namespace cohort::cuda
