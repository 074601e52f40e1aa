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
  const auto piece = dcp::packed_piece(s.rows(n).widest(), 1, s.dim, size_of(s.dtype));
  return {static_cast<std::byte*>(const_cast<void*>(base)), static_cast<std::int64_t>(piece.bytes),
          static_cast<std::int64_t>(piece.lse_offset)};
}

/// Where rows are taken as they are and there is no sink.
struct PlainRows {
  Rows out;
  LseBase base;

  template <class T>
  __device__ __forceinline__ uint4 load(std::uint32_t b, std::uint32_t h, std::uint32_t v) const {
    return load_as<uint4>(out.row(b, h) + 16 * v, out.aligned);
  }
  __device__ __forceinline__ float sink(std::uint32_t) const { return dcp::kEmptyLse; }
};
/// Elsewhere, of any number of splits. A thread works out the scales of its row by itself, which
/// costs less than sharing them.
struct AnyRows : SplitRows {
  Sinks sinks;
  LseBase base;

  AnyRows(const MergeShape& s, const Partial& p)
      : SplitRows(s, p), sinks(sinks_of(p)), base(s.base) {}

  template <class T>
  __device__ __forceinline__ uint4 load(std::uint32_t b, std::uint32_t h, std::uint32_t v) const {
    const std::byte* const first = out.row(b, h) + 16 * v;
    if (splits == 1) {
      return load_as<uint4>(first, out.aligned);
    }
    const dcp::RowMass mass = mass_of(b, h);
    WeightedSum<T> sums[2];
    for (int s = 0; s < splits; ++s) {
      const uint4 value = load_as<uint4>(first + s * out_split, out.aligned);
      const float scale = mass.scale(lse.at(b, h)[s * lse_split], split_base.exp());
      sums[0].add(scale, low(value));
      sums[1].add(scale, high(value));
    }
    return join(sums[0].result(), sums[1].result());
  }
  __device__ __forceinline__ float load_lse(std::uint32_t b, std::uint32_t h) const {
    if (is_empty(b)) {
      return dcp::kEmptyLse;
    }
    return splits == 1 ? *lse.at(b, h) : mass_of(b, h).lse(split_base.log());
  }
  __device__ __forceinline__ float sink(std::uint32_t h) const { return sinks.at(h); }

 private:
  __device__ __forceinline__ dcp::RowMass mass_of(std::uint32_t b, std::uint32_t h) const {
    const float* const lses = lse.at(b, h);
    return dcp::mass_of([&](int s) { return lses[s * lse_split]; }, splits, split_base.exp());
  }
};

/// corrected = scale * partial. One thread a vector of the partial; the scale is computed per
/// thread, which costs less than sharing it.
template <int kRanks, class T, class Out, class From>
__global__ void __launch_bounds__(kThreads)
    correct_kernel(const __grid_constant__ From partial, const float* lses, int ranks, int rank,
                   Rows corrected, FastDiv vectors_per_row, FastDiv heads, std::uint32_t rows,
                   std::uint32_t vectors) {
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
    merge_scales(scales, n, partial.base, partial.sink(h));
    unsigned bits = 0;  // picked by masks: an index would move the array out of registers
#pragma unroll
    for (int r = 0; r < n; ++r) {
      bits |= r == rank ? __float_as_uint(scales[r]) : 0U;
    }
    const float scale = __uint_as_float(bits);
    const uint4 in = partial.template load<T>(b, h, v);
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

/// The same for rows of any place and making, of what each rank merges.
template <class T>
__global__ void __launch_bounds__(kThreads)
    pack_rows_kernel(const __grid_constant__ AnyRows partial,
                     const __grid_constant__ RankRows<kMaxPeers> ranks, Pieces pieces,
                     FastDiv vectors_per_piece, FastDiv vectors_per_row, FastDiv heads,
                     std::uint32_t vectors) {
  await_predecessor();
  for (std::uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < vectors;
       i += gridDim.x * kThreads) {
    const std::uint32_t p = vectors_per_piece.divide(i);
    const std::uint32_t in_piece = i - p * vectors_per_piece.divisor;
    const std::uint32_t row = vectors_per_row.divide(in_piece);
    const auto block = ranks.of(static_cast<int>(p));
    if (row >= block.rows()) {
      continue;
    }
    const std::uint32_t v = in_piece - row * vectors_per_row.divisor;
    const auto place = block.place(row, heads.divide(row));
    std::byte* piece = pieces.base + p * pieces.piece_bytes;
    reinterpret_cast<uint4*>(piece)[in_piece] = partial.load<T>(place.token, place.head, v);
    if (v == 0) {
      reinterpret_cast<float*>(piece + pieces.lse_offset)[row] =
          partial.load_lse(place.token, place.head);
    }
  }
}

/// kSinks: heads have sinks, from the first head of this rank's on.
template <int kRanks, class T, bool kSinks = false>
__global__ void __launch_bounds__(kThreads)
    merge_pieces_kernel(Pieces pieces, int ranks, Rows merged, Strided2 merged_lse,
                        FastDiv vectors_per_row, FastDiv heads, std::uint32_t vectors, LseBase base,
                        Sinks sinks) {
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
    const dcp::RowMass mass = merge_scales(scales, n, base, kSinks ? sinks.at(h) : dcp::kEmptyLse);
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
      *merged_lse.at(b, h) = mass_lse(mass, base);
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
        load(correct_kernel<Ranks::value, T, float, PlainRows>);
        load(correct_kernel<Ranks::value, T, T, PlainRows>);
        load(merge_pieces_kernel<Ranks::value, T>);
      });
    }
    load(correct_kernel<0, T, float, AnyRows>);
    load(correct_kernel<0, T, T, AnyRows>);
    load(pack_rows_kernel<T>);
    load(merge_pieces_kernel<0, T, true>);
  };
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    with_float_type(dtype, "dtype", load_for);
  }
  load(pack_partial_kernel);
  load(pack_query_kernel);
}

void report_local_merge(std::vector<KernelInfo>& report) {
  report.push_back(describe("correct_partial bf16 to f32",
                            correct_kernel<2, __nv_bfloat16, float, PlainRows>, kThreads));
  report.push_back(describe("pack_partial", pack_partial_kernel, kThreads));
  report.push_back(
      describe("merge_pieces bf16, 2 ranks", merge_pieces_kernel<2, __nv_bfloat16>, kThreads));
  report.push_back(
      describe("merge_pieces bf16, 8 ranks", merge_pieces_kernel<8, __nv_bfloat16>, kThreads));
  report.push_back(describe("pack_rows bf16", pack_rows_kernel<__nv_bfloat16>, kThreads));
  report.push_back(describe("pack_query", pack_query_kernel, kThreads));
}

}  // namespace detail

using namespace detail;

std::size_t packed_piece_bytes(const MergeShape& shape, int n) {
  check_merge_shape(shape, n);
  return dcp::packed_piece(shape.rows(n).widest(), 1, shape.dim, size_of(shape.dtype)).bytes;
}

void correct_partial(const MergeShape& shape, int n, int rank, const Partial& partial,
                     const float* lses, void* corrected, std::int64_t out_batch_stride,
                     std::int64_t out_head_stride, DType out_dtype, cudaStream_t stream) {
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
  const std::int64_t rows = shape.batch * shape.heads;
  const std::int64_t per_row = shape.dim * row_element(shape) / 16;
  const Rows out(corrected, out_batch_stride, out_head_stride, size_of(out_dtype));
  const auto run = [&](auto kernel, const auto& from) {
    launch(kernel, blocks_for(rows * per_row), kThreads, stream, from, lses, n, rank, out,
           FastDiv(per_row), FastDiv(shape.heads), static_cast<std::uint32_t>(rows),
           static_cast<std::uint32_t>(rows * per_row));
  };
  const auto run_for = [&]<class From>(auto ranks, auto type, const From& from) {
    using T = decltype(type);
    if (out_dtype == DType::f32) {
      run(correct_kernel<ranks(), T, float, From>, from);
    } else {
      run(correct_kernel<ranks(), T, T, From>, from);
    }
  };
  with_float_type(shape.dtype, "dtype", [&]<class T>(T*) {
    if (is_plain(shape, partial) && partial.sink == nullptr) {
      const PlainRows from{
          Rows(partial.out, partial.out_batch_stride, partial.out_head_stride, sizeof(T)),
          shape.base};
      with_ranks(n, [&](auto ranks) { run_for(ranks, T{}, from); });
    } else {
      run_for(std::integral_constant<int, 0>{}, T{}, AnyRows(shape, partial));
    }
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
  const dcp::MergeRows ranks = shape.rows(n);
  const std::int64_t rows = ranks.widest();
  const std::int64_t per_row = shape.dim * row_element(shape) / 16;
  const std::int64_t vectors = n * rows * per_row;
  const FastDiv heads(ranks.of(0).heads);
  if (is_plain(shape, partial) && is_by_head(shape)) {
    launch(
        pack_partial_kernel, blocks_for(vectors), kThreads, stream,
        Rows(partial.out, partial.out_batch_stride, partial.out_head_stride, size_of(shape.dtype)),
        lses_of(partial), pieces_of(shape, n, pieces), FastDiv(rows * per_row), FastDiv(per_row),
        heads, static_cast<std::uint32_t>(rows), static_cast<std::uint32_t>(vectors));
    return;
  }
  with_float_type(shape.dtype, "dtype", [&]<class T>(T*) {
    launch(pack_rows_kernel<T>, blocks_for(vectors), kThreads, stream, AnyRows(shape, partial),
           RankRows<kMaxPeers>(ranks), pieces_of(shape, n, pieces), FastDiv(rows * per_row),
           FastDiv(per_row), heads, static_cast<std::uint32_t>(vectors));
  });
}

void merge_pieces(const MergeShape& shape, int n, int rank, const void* pieces,
                  const Partial& partial, const Merged& merged, cudaStream_t stream) {
  check_merge_shape(shape, n);
  require(rank >= 0 && rank < n, "rank", "expected 0 to {}, got {}", n - 1, rank);
  const auto block = shape.rows(n).of(rank);
  if (is_empty(shape) || block.rows() == 0) {
    return;
  }
  require(merged.out != nullptr, "merged", "null pointer");
  require(pieces != nullptr && is_aligned<uint4>(pieces), "pieces",
          "expected memory aligned to 16 bytes");
  const std::int64_t per_row = shape.dim * row_element(shape) / 16;
  const std::int64_t vectors = block.rows() * per_row;
  const Sinks sinks{
      partial.sink == nullptr ? nullptr : partial.sink + block.first_head * partial.sink_stride,
      partial.sink_stride};
  const auto run = [&](auto kernel) {
    launch(kernel, blocks_for(vectors), kThreads, stream, pieces_of(shape, n, pieces), n,
           Rows(merged.out, merged.out_batch_stride, merged.out_head_stride, size_of(shape.dtype)),
           lses_of(merged), FastDiv(per_row), FastDiv(block.heads),
           static_cast<std::uint32_t>(vectors), shape.base, sinks);
  };
  with_float_type(shape.dtype, "dtype", [&]<class T>(T*) {
    if (partial.sink != nullptr) {
      run(merge_pieces_kernel<0, T, true>);
    } else {
      with_ranks(n, [&](auto ranks) { run(merge_pieces_kernel<ranks(), T>); });
    }
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
