#include "attention.cuh"
#include "peer_device.cuh"

// The merge of partial attentions in one launch.

namespace cohort::cuda {
namespace detail {
namespace {

constexpr int kMaxChunkRows = 64;

/// What both kernels are given. `rows` counts the (batch, head) rows that each rank merges.
struct MergeArgs {
  Rows out;  ///< Partial.
  Strided2 lse;
  Rows merged;
  Strided2 merged_lse;
  FastDiv heads;  ///< Per rank.
  std::uint32_t rows;
  std::uint32_t row_bytes;
  LseBase base;
};

/// Polls the LSE words of one row and the payload words together, merges and stores. Used where all
/// ranks fit one batch.
template <int kRanks, class T>
__device__ __forceinline__ bool merge_word(const PeerTable& t, const Call& c, const MergeArgs& a,
                                           std::uint32_t i, std::uint32_t row, std::uint32_t byte,
                                           std::uint32_t words, Patience& patience) {
  const std::uint32_t b = a.heads.divide(row);
  const std::uint32_t h = row - b * a.heads.divisor;
  const std::uint32_t own_h = static_cast<std::uint32_t>(t.rank) * a.heads.divisor + h;
  const uint2 own = load_as<uint2>(a.out.row(b, own_h) + byte, a.out.aligned);
  constexpr int kMost = kRanks > 0 ? kRanks : kMaxPeers;
  float scales[kMost];
  const float own_lse = *a.lse.at(b, own_h);
  uint2 values[2][kBatch<kRanks>];
  const int n = ranks_of<kRanks>(t);
  for (int r0 = 0; r0 < n; r0 += kBatch<kRanks>) {
    if (!ll_receive<kRanks>(t, c, r0, {words + row / 2, i}, values, patience)) {
      return false;
    }
#pragma unroll
    for (int j = 0; j < kBatch<kRanks>; ++j) {
      if (r0 + j < n) {
        const unsigned bits = (row & 1U) != 0 ? values[0][j].y : values[0][j].x;
        scales[r0 + j] = r0 + j == t.rank ? own_lse : __uint_as_float(bits);
      }
    }
  }
  const float merged_lse = merge_scales(scales, n, a.base);
  WeightedSum<T> sum;
  for (int r0 = 0; r0 < n; r0 += kBatch<kRanks>) {
    if (kRanks == 0 && !ll_receive<kRanks>(t, c, r0, {words + row / 2, i}, values, patience)) {
      return false;  // more ranks than one batch: the words are there already, read them again
    }
#pragma unroll
    for (int j = 0; j < kBatch<kRanks>; ++j) {
      if (r0 + j < n) {
        sum.add(scales[r0 + j], r0 + j == t.rank ? own : values[1][j]);
      }
    }
  }
  store_as(a.merged.row(b, h) + byte, sum.result(), a.merged.aligned);
  if (byte == 0 && a.merged_lse.base != nullptr) {
    *a.merged_lse.at(b, h) = merged_lse;
  }
  return true;
}

/// Lane: `words` words of payload, then the LSEs, two a word.
template <int kRanks, class T>
__global__ void __launch_bounds__(kLlThreads)
    merge_ll_kernel(const __grid_constant__ PeerTable t, const __grid_constant__ MergeArgs a,
                    FastDiv words_per_row, std::uint32_t words, std::uint32_t used) {
  Call c;
  Patience patience;
  begin();
  const std::uint32_t first = blockIdx.x * blockDim.x + threadIdx.x;
  const std::uint32_t step = gridDim.x * blockDim.x;
  const auto load = [&](int p, std::uint32_t i) {
    const std::uint32_t row = words_per_row.divide(i);
    const std::uint32_t byte = 8 * (i - row * words_per_row.divisor);
    const std::uint32_t b = a.heads.divide(row);
    const std::uint32_t h = row - b * a.heads.divisor;
    return load_as<uint2>(a.out.row(b, static_cast<std::uint32_t>(p) * a.heads.divisor + h) + byte,
                          a.out.aligned);
  };
  const Ahead<kRanks> ahead(t, first < words, [&](int p) { return load(p, first); });
  if (!read_epoch(t, c)) {
    return;
  }
  // LSEs first: every word of a row needs them. The one word of an empty call is sent here too.
  for (std::uint32_t i = first; i < used - words; i += step) {
#pragma unroll
    for (int p = 0; p < ranks_of<kRanks>(t); ++p) {
      if (p != t.rank) {
        unsigned bits[2] = {0, 0};
#pragma unroll
        for (std::uint32_t k = 0; k < 2; ++k) {
          const std::uint32_t row = 2 * i + k;
          if (row < a.rows) {
            const std::uint32_t b = a.heads.divide(row);
            const std::uint32_t h =
                static_cast<std::uint32_t>(p) * a.heads.divisor + row - b * a.heads.divisor;
            bits[k] = __float_as_uint(*a.lse.at(b, h));
          }
        }
        ll_store(ll_lane(t, p, c.slot, t.rank), words + i, make_uint2(bits[0], bits[1]), c.flag);
      }
    }
  }
  for (std::uint32_t i = first; i < words; i += step) {
#pragma unroll
    for (int p = 0; p < ranks_of<kRanks>(t); ++p) {
      if (p != t.rank) {
        const uint2 value = ahead.get(p, i == first, [&](int to) { return load(to, i); });
        ll_store(ll_lane(t, p, c.slot, t.rank), i, value, c.flag);
      }
    }
  }
  advance_epoch(t, c, used);
  delay_point(t, c, 1);
  for (std::uint32_t i = first; i < words; i += step) {
    const std::uint32_t row = words_per_row.divide(i);
    const std::uint32_t byte = 8 * (i - row * words_per_row.divisor);
    if (!merge_word<kRanks, T>(t, c, a, i, row, byte, words, patience)) {
      return;
    }
  }
  if (words == 0 && first == 0) {  // an empty call still waits for every peer
    for (int r0 = 0; r0 < ranks_of<kRanks>(t); r0 += kBatch<kRanks>) {
      uint2 values[1][kBatch<kRanks>];
      if (!ll_receive<kRanks>(t, c, r0, {0}, values, patience)) {
        return;
      }
    }
  }
}

/// A block's chunks: number k is k * gridDim + blockIdx.
struct Chunks {
  std::uint32_t rows_each;
  std::uint32_t count;
};

/// Lane of one (source, destination): [rows] payload, then [rows] LSEs at `lse_offset`.
struct BulkArgs {
  FastDiv vectors_per_row;
  Chunks chunks;
  std::uint32_t lse_offset;
  bool pull;
};

/// Puts the rows [begin, end) that rank p merges where rank p will read them.
__device__ __forceinline__ void deposit_rows(const PeerTable& t, const Call& c, const MergeArgs& a,
                                             const BulkArgs& bulk, int p, std::uint32_t begin,
                                             std::uint32_t end) {
  constexpr int kUnroll = kChunkUnroll;
  std::byte* lane = bulk.pull ? bulk_lane(t, t.rank, c.slot, p) : bulk_lane(t, p, c.slot, t.rank);
  const std::uint32_t first_head = static_cast<std::uint32_t>(p) * a.heads.divisor;
  const std::uint32_t last = end * bulk.vectors_per_row.divisor;
  for (std::uint32_t base = begin * bulk.vectors_per_row.divisor + threadIdx.x; base < last;
       base += kUnroll * blockDim.x) {
    uint4 values[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const std::uint32_t i = base + static_cast<std::uint32_t>(u) * blockDim.x;
      if (i < last) {
        const std::uint32_t row = bulk.vectors_per_row.divide(i);
        const std::uint32_t b = a.heads.divide(row);
        const std::uint32_t h = first_head + row - b * a.heads.divisor;
        values[u] = load_as<uint4>(a.out.row(b, h) + 16 * (i - row * bulk.vectors_per_row.divisor),
                                   a.out.aligned);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const std::uint32_t i = base + static_cast<std::uint32_t>(u) * blockDim.x;
      if (i < last) {
        reinterpret_cast<uint4*>(lane)[i] = values[u];
      }
    }
  }
  const std::uint32_t row = begin + threadIdx.x;
  if (row < end) {
    const std::uint32_t b = a.heads.divide(row);
    const std::uint32_t h = first_head + row - b * a.heads.divisor;
    reinterpret_cast<float*>(lane + bulk.lse_offset)[row] = *a.lse.at(b, h);
  }
}

/// Scales of a chunk's rows, computed once a row. Ends with __syncthreads().
template <int kRanks>
__device__ __forceinline__ void scale_rows(const PeerTable& t, const Call& c, const MergeArgs& a,
                                           const BulkArgs& bulk, std::uint32_t begin,
                                           std::uint32_t end, float* scales) {
  constexpr int kMost = kRanks > 0 ? kRanks : kMaxPeers;
  const int n = ranks_of<kRanks>(t);
  const std::uint32_t row = begin + threadIdx.x;
  if (row < end) {
    const std::uint32_t b = a.heads.divide(row);
    const std::uint32_t h = row - b * a.heads.divisor;
    float lses[kMost];
#pragma unroll
    for (int r = 0; r < n; ++r) {
      const std::byte* lane =
          bulk.pull ? bulk_lane(t, r, c.slot, t.rank) : bulk_lane(t, t.rank, c.slot, r);
      lses[r] = r == t.rank ? *a.lse.at(b, static_cast<std::uint32_t>(t.rank) * a.heads.divisor + h)
                            : reinterpret_cast<const float*>(lane + bulk.lse_offset)[row];
    }
    const float merged_lse = merge_scales(lses, n, a.base);
    if (a.merged_lse.base != nullptr) {
      *a.merged_lse.at(b, h) = merged_lse;
    }
#pragma unroll
    for (int r = 0; r < n; ++r) {
      scales[threadIdx.x * kMost + static_cast<unsigned>(r)] = lses[r];
    }
  }
  __syncthreads();
}

/// Merges the rows [begin, end) of this rank's heads.
template <int kRanks, class T>
__device__ __forceinline__ void merge_rows(const PeerTable& t, const Call& c, const MergeArgs& a,
                                           const BulkArgs& bulk, std::uint32_t begin,
                                           std::uint32_t end, const float* scales) {
  constexpr int kMost = kRanks > 0 ? kRanks : kMaxPeers;
  const int n = ranks_of<kRanks>(t);
  const std::uint32_t last = end * bulk.vectors_per_row.divisor;
  for (std::uint32_t i = begin * bulk.vectors_per_row.divisor + threadIdx.x; i < last;
       i += blockDim.x) {
    const std::uint32_t row = bulk.vectors_per_row.divide(i);
    const std::uint32_t byte = 16 * (i - row * bulk.vectors_per_row.divisor);
    const std::uint32_t b = a.heads.divide(row);
    const std::uint32_t h = row - b * a.heads.divisor;
    const float* scale = scales + (row - begin) * kMost;
    const std::uint32_t own_h = static_cast<std::uint32_t>(t.rank) * a.heads.divisor + h;
    WeightedSum<T> sums[2];
    for (int r0 = 0; r0 < n; r0 += kBatch<kRanks>) {
      uint4 values[kBatch<kRanks>];
#pragma unroll
      for (int j = 0; j < kBatch<kRanks>; ++j) {
        const int r = r0 + j;
        if (r < n) {
          const std::byte* lane =
              bulk.pull ? bulk_lane(t, r, c.slot, t.rank) : bulk_lane(t, t.rank, c.slot, r);
          values[j] = r == t.rank ? load_as<uint4>(a.out.row(b, own_h) + byte, a.out.aligned)
                                  : reinterpret_cast<const uint4*>(lane)[i];
        }
      }
#pragma unroll
      for (int j = 0; j < kBatch<kRanks>; ++j) {
        if (r0 + j < n) {
          sums[0].add(scale[r0 + j], low(values[j]));
          sums[1].add(scale[r0 + j], high(values[j]));
        }
      }
    }
    store_as(a.merged.row(b, h) + byte, join(sums[0].result(), sums[1].result()), a.merged.aligned);
  }
}

/// One chunk ahead: while a block waits for and merges chunk k, its chunk k+1 is under way.
template <int kRanks, class T>
__global__ void __launch_bounds__(kBulkThreads, kBulkBlocksPerSm)
    merge_bulk_kernel(const __grid_constant__ PeerTable t, const __grid_constant__ MergeArgs a,
                      const __grid_constant__ BulkArgs bulk) {
  __shared__ float scales[kMaxChunkRows * (kRanks > 0 ? kRanks : kMaxPeers)];
  Call c;
  Patience patience;
  begin();
  if (!read_epoch(t, c)) {
    return;
  }
  const Chunks chunks = bulk.chunks;
  const auto deposit = [&](std::uint32_t chunk) {
    const std::uint32_t begin = chunk * chunks.rows_each;
    const std::uint32_t end = min(begin + chunks.rows_each, a.rows);
    for (int k = 1; k < ranks_of<kRanks>(t); ++k) {
      const int p = t.rank + k;  // each rank starts with another peer
      deposit_rows(t, c, a, bulk, p < t.size ? p : p - t.size, begin, end);
    }
  };
  if (blockIdx.x < chunks.count) {
    deposit(blockIdx.x);
  }
  signal_chunk(t, c, 0);  // also with nothing to send
  advance_epoch(t, c, 0);
  std::uint32_t k = 0;
  for (std::uint32_t chunk = blockIdx.x; chunk < chunks.count || k == 0; chunk += gridDim.x, ++k) {
    if (chunk + gridDim.x < chunks.count) {
      deposit(chunk + gridDim.x);
      signal_chunk(t, c, k + 1);
    }
    delay_point(t, c, 1 + k);
    if (!wait_chunk(t, c, k, patience)) {  // its barrier also frees `scales`
      return;
    }
    if (chunk < chunks.count) {
      const std::uint32_t begin = chunk * chunks.rows_each;
      const std::uint32_t end = min(begin + chunks.rows_each, a.rows);
      scale_rows<kRanks>(t, c, a, bulk, begin, end, scales);
      merge_rows<kRanks, T>(t, c, a, bulk, begin, end, scales);
    }
  }
}

// bench/results/own_kernels/nvidia-h200-2cards.json: two H200s, NVLink, 2 ranks, H=128 D=512 bf16,
// graph replay. Flag words took 3.2 and 4.3 us at B=1 and 4 (64 and 257 KiB sent) against 4.6 and
// 5.4 for push, and 6.9 against 6.2 at B=8 (514 KiB). Pull through the own inbox was slower than
// push at every size.
constexpr PathRow kMergePaths[] = {{320 << 10, PeerPath::flag_word}, {INT64_MAX, PeerPath::push}};

std::int64_t payload_bytes(const MergeShape& s, int n) {
  return s.batch * (s.heads / n) * s.dim * static_cast<std::int64_t>(size_of(s.dtype));
}

MergeArgs args_of(const PeerTable& t, const MergeShape& s, const Partial& partial,
                  const Merged& merged) {
  const std::size_t element = size_of(s.dtype);
  const std::int64_t heads = s.heads / t.size;
  return {
      .out = Rows(partial.out, partial.out_batch_stride, partial.out_head_stride, element),
      .lse = {const_cast<float*>(partial.lse), partial.lse_batch_stride, partial.lse_head_stride},
      .merged = Rows(merged.out, merged.out_batch_stride, merged.out_head_stride, element),
      .merged_lse = {merged.lse, merged.lse_batch_stride, merged.lse_head_stride},
      .heads = FastDiv(heads),
      .rows = static_cast<std::uint32_t>(s.batch * heads),
      .row_bytes = static_cast<std::uint32_t>(s.dim * static_cast<std::int64_t>(element)),
      .base = s.base};
}

void merge_ll(const PeerTable& t, const MergeShape& s, const MergeArgs& a, cudaStream_t stream) {
  const std::int64_t words = payload_bytes(s, t.size) / 8;
  const std::int64_t used = std::max<std::int64_t>(words + ceil_div(a.rows, 2), 1);
  check_ll_words(t, used, "peer_merge");
  const Grid grid = ll_grid(used, t.max_blocks);
  with_float_type(s.dtype, "dtype", [&]<class T>(T*) {
    with_ranks(t.size, [&](auto n) {
      launch(merge_ll_kernel<n(), T>, grid.blocks, grid.threads, stream, t, a,
             FastDiv(a.row_bytes / 8), static_cast<std::uint32_t>(words),
             static_cast<std::uint32_t>(used));
    });
  });
}

void merge_bulk(const PeerTable& t, const MergeShape& s, const MergeArgs& a, bool pull,
                cudaStream_t stream) {
  const std::int64_t needed = merge_lane_bytes(s, t.size, PeerPath::push);
  require(needed <= t.layout.bulk_lane_bytes, "peer_merge",
          fmt::format("needs {} bytes of bulk a peer, the inbox has {}", needed,
                      t.layout.bulk_lane_bytes));
  const std::int64_t most = std::clamp<std::int64_t>(kChunkBytes / a.row_bytes, 1, kMaxChunkRows);
  BulkArgs bulk{};
  bulk.vectors_per_row = FastDiv(a.row_bytes / 16);
  bulk.chunks.rows_each = static_cast<std::uint32_t>(
      std::clamp<std::int64_t>(ceil_div(a.rows, bulk_blocks(t)), 1, most));
  bulk.chunks.count = static_cast<std::uint32_t>(ceil_div(a.rows, bulk.chunks.rows_each));
  bulk.lse_offset = a.rows * a.row_bytes;
  bulk.pull = pull;
  require(ceil_div(bulk.chunks.count, bulk_blocks(t)) < 65535, "peer_merge", "too many chunks");
  const int blocks =
      static_cast<int>(std::clamp<std::int64_t>(bulk.chunks.count, 1, bulk_blocks(t)));
  with_float_type(s.dtype, "dtype", [&]<class T>(T*) {
    with_ranks(t.size, [&](auto n) {
      launch(merge_bulk_kernel<n(), T>, blocks, kBulkThreads, stream, t, a, bulk);
    });
  });
}

}  // namespace

void report_merge(int n, std::vector<KernelInfo>& report) {
  with_ranks(n, [&](auto r) {
    report.push_back(
        describe("merge flag_word bf16", merge_ll_kernel<r(), __nv_bfloat16>, kLlThreads));
    report.push_back(
        describe("merge bulk bf16", merge_bulk_kernel<r(), __nv_bfloat16>, kBulkThreads));
  });
}

}  // namespace detail

using namespace detail;

std::span<const PathRow> merge_path_table() noexcept { return kMergePaths; }

std::string_view to_string(PeerPath path) noexcept {
  switch (path) {
    case PeerPath::automatic:
      return "automatic";
    case PeerPath::flag_word:
      return "flag_word";
    case PeerPath::push:
      return "push";
    case PeerPath::pull:
      return "pull";
  }
  return "unknown";
}

std::int64_t merge_lane_bytes(const MergeShape& shape, int n, PeerPath path) {
  check_merge_shape(shape, n);
  const std::int64_t rows = shape.batch * (shape.heads / n);
  const std::int64_t payload = payload_bytes(shape, n);
  return path == PeerPath::flag_word ? std::max<std::int64_t>(payload + (rows + 1) / 2 * 8, 8)
                                     : payload + rows * 4;
}

PeerPath choose_merge_path(const InboxLayout& layout, const MergeShape& shape) {
  const std::int64_t ll = merge_lane_bytes(shape, layout.ranks, PeerPath::flag_word);
  const std::int64_t bulk = merge_lane_bytes(shape, layout.ranks, PeerPath::push);
  const bool ll_fits = ll <= layout.ll_words * 8;
  const bool bulk_fits = bulk <= layout.bulk_lane_bytes;
  require(ll_fits || bulk_fits, "peer_merge",
          fmt::format("needs {} bytes a peer, the inbox has {} of flag words and {} of bulk", bulk,
                      layout.ll_words * 8, layout.bulk_lane_bytes));
  for (const PathRow& row : kMergePaths) {
    if (bulk * (layout.ranks - 1) <= row.max_bytes_sent) {
      const bool fits = row.path == PeerPath::flag_word ? ll_fits : bulk_fits;
      return fits ? row.path : (bulk_fits ? PeerPath::push : PeerPath::flag_word);
    }
  }
  return bulk_fits ? PeerPath::push : PeerPath::flag_word;
}

void peer_merge(const PeerTable& table, const MergeShape& shape, const Partial& partial,
                const Merged& merged, cudaStream_t stream, PeerPath path) {
  check_table(table);
  check_merge_shape(shape, table.size);
  require(shape.batch == 0 ||
              (partial.out != nullptr && partial.lse != nullptr && merged.out != nullptr),
          "partial, merged", "null pointer");
  const MergeArgs args = args_of(table, shape, partial, merged);
  const PeerPath chosen =
      path == PeerPath::automatic ? choose_merge_path(table.layout, shape) : path;
  if (chosen == PeerPath::flag_word) {
    merge_ll(table, shape, args, stream);
  } else {
    merge_bulk(table, shape, args, chosen == PeerPath::pull, stream);
  }
}

}  // namespace cohort::cuda
