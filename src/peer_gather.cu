#include "byte_view.cuh"
#include "peer_device.cuh"

// All-gather and query gather through flag words, the barrier, and the query gather in bulk.

namespace cohort::cuda {
namespace detail {
namespace {

__global__ void __launch_bounds__(64) barrier_kernel(const __grid_constant__ PeerTable t) {
  Call c;
  Patience patience;
  begin();
  if (!read_epoch(t, c)) {
    return;
  }
  signal_chunk(t, c, 0);
  advance_epoch(t, c, 0);
  wait_chunk(t, c, 0, patience);
}

template <int kRanks>
__global__ void __launch_bounds__(kLlThreads)
    all_gather_kernel(const __grid_constant__ PeerTable t, const __grid_constant__ ByteView in,
                      const __grid_constant__ ByteView out, std::int64_t rank_stride,
                      std::uint32_t words) {
  Call c;
  Patience patience;
  begin();
  const std::uint32_t first = blockIdx.x * blockDim.x + threadIdx.x;
  const std::uint32_t step = gridDim.x * blockDim.x;
  // Loaded while the epoch is on its way.
  const uint2 ahead = first < words ? load_word(in, first) : make_uint2(0, 0);
  if (!read_epoch(t, c)) {
    return;
  }
  for (std::uint32_t i = first; i < words; i += step) {
    const uint2 value = i == first ? ahead : load_word(in, i);
    ll_send_all<kRanks>(t, c, i, value);
    store_word(out, i, value, t.rank * rank_stride);
  }
  advance_epoch(t, c, words);
  delay_point(t, c, 1);
  for (std::uint32_t i = first; i < words; i += step) {
    for (int r0 = 0; r0 < ranks_of<kRanks>(t); r0 += kBatch<kRanks>) {
      uint2 values[1][kBatch<kRanks>];
      if (!ll_receive<kRanks>(t, c, r0, {i}, values, patience)) {
        return;
      }
#pragma unroll
      for (int j = 0; j < kBatch<kRanks>; ++j) {
        if (r0 + j < ranks_of<kRanks>(t) && r0 + j != t.rank) {
          store_word(out, i, values[0][j], (r0 + j) * rank_stride);
        }
      }
    }
  }
}

/// The packed query, addressed by row (b,h) and unit of `Value` within the row.
struct QuerySource {
  Rows nope;
  Rows pe;
  FastDiv heads;
  std::uint32_t nope_bytes;
  std::uint32_t row_bytes;
  std::uint32_t rows;

  template <class Value>
  __device__ __forceinline__ Value load(std::uint32_t row, std::uint32_t byte) const {
    const std::uint32_t b = heads.divide(row);
    const std::uint32_t h = row - b * heads.divisor;
    return byte < nope_bytes ? load_as<Value>(nope.row(b, h) + byte, nope.aligned)
                             : load_as<Value>(pe.row(b, h) + (byte - nope_bytes), pe.aligned);
  }
};

/// The gathered query [B,n*h,row].
struct QueryTarget {
  Rows out;
  FastDiv heads;

  template <class Value>
  __device__ __forceinline__ void store(int rank, std::uint32_t row, std::uint32_t byte,
                                        const Value& value) const {
    const std::uint32_t b = heads.divide(row);
    const std::uint32_t h = row - b * heads.divisor;
    store_as(out.row(b, static_cast<std::uint32_t>(rank) * heads.divisor + h) + byte, value,
             out.aligned);
  }
};

template <int kRanks>
__global__ void __launch_bounds__(kLlThreads)
    query_ll_kernel(const __grid_constant__ PeerTable t, const QuerySource in,
                    const QueryTarget out, FastDiv words_per_row, std::uint32_t words,
                    std::uint32_t used) {
  Call c;
  Patience patience;
  begin();
  const std::uint32_t first = blockIdx.x * blockDim.x + threadIdx.x;
  const std::uint32_t step = gridDim.x * blockDim.x;
  const auto load = [&](std::uint32_t i) {
    const std::uint32_t row = words_per_row.divide(i);
    return in.load<uint2>(row, 8 * (i - row * words_per_row.divisor));
  };
  // Loaded while the epoch is on its way.
  const uint2 ahead = first < words ? load(first) : make_uint2(0, 0);
  if (!read_epoch(t, c)) {
    return;
  }
  for (std::uint32_t i = first; i < used; i += step) {
    uint2 value = make_uint2(0, 0);
    if (i < words) {
      const std::uint32_t row = words_per_row.divide(i);
      const std::uint32_t byte = 8 * (i - row * words_per_row.divisor);
      value = i == first ? ahead : load(i);
      out.store(t.rank, row, byte, value);
    }
    ll_send_all<kRanks>(t, c, i, value);
  }
  advance_epoch(t, c, used);
  delay_point(t, c, 1);
  for (std::uint32_t i = first; i < used; i += step) {
    const std::uint32_t row = words_per_row.divide(i);
    const std::uint32_t byte = 8 * (i - row * words_per_row.divisor);
    for (int r0 = 0; r0 < ranks_of<kRanks>(t); r0 += kBatch<kRanks>) {
      uint2 values[1][kBatch<kRanks>];
      if (!ll_receive<kRanks>(t, c, r0, {i}, values, patience)) {
        return;
      }
#pragma unroll
      for (int j = 0; j < kBatch<kRanks>; ++j) {
        if (i < words && r0 + j < ranks_of<kRanks>(t) && r0 + j != t.rank) {
          out.store(r0 + j, row, byte, values[0][j]);
        }
      }
    }
  }
}

/// Rows per chunk, and chunks; chunk k of block b is number k * gridDim + b.
struct Chunks {
  std::uint32_t rows_each;
  std::uint32_t count;
};

/// Deposits a chunk: once into every peer's inbox, or once into the own one; and into the output.
template <int kRanks>
__device__ __forceinline__ void deposit_query(const PeerTable& t, const Call& c,
                                              const QuerySource& in, const QueryTarget& out,
                                              FastDiv vectors_per_row, std::uint32_t begin,
                                              std::uint32_t end, bool pull) {
  constexpr int kUnroll = kChunkUnroll;
  for (std::uint32_t base = begin + threadIdx.x; base < end; base += kUnroll * blockDim.x) {
    uint4 values[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const std::uint32_t i = base + static_cast<std::uint32_t>(u) * blockDim.x;
      if (i < end) {
        const std::uint32_t row = vectors_per_row.divide(i);
        values[u] = in.load<uint4>(row, 16 * (i - row * vectors_per_row.divisor));
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const std::uint32_t i = base + static_cast<std::uint32_t>(u) * blockDim.x;
      if (i < end) {
        const std::uint32_t row = vectors_per_row.divide(i);
        out.store(t.rank, row, 16 * (i - row * vectors_per_row.divisor), values[u]);
        if (pull) {
          reinterpret_cast<uint4*>(bulk_lane(t, t.rank, c.slot, t.rank))[i] = values[u];
        } else {
#pragma unroll
          for (int p = 0; p < ranks_of<kRanks>(t); ++p) {
            if (p != t.rank) {
              reinterpret_cast<uint4*>(bulk_lane(t, p, c.slot, t.rank))[i] = values[u];
            }
          }
        }
      }
    }
  }
}

template <int kRanks>
__device__ __forceinline__ void collect_query(const PeerTable& t, const Call& c,
                                              const QueryTarget& out, FastDiv vectors_per_row,
                                              std::uint32_t begin, std::uint32_t end, bool pull) {
  for (std::uint32_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const std::uint32_t row = vectors_per_row.divide(i);
    const std::uint32_t byte = 16 * (i - row * vectors_per_row.divisor);
    for (int r0 = 0; r0 < ranks_of<kRanks>(t); r0 += kBatch<kRanks>) {
      uint4 values[kBatch<kRanks>];
#pragma unroll
      for (int j = 0; j < kBatch<kRanks>; ++j) {
        const int r = r0 + j;
        if (r < ranks_of<kRanks>(t) && r != t.rank) {
          const std::byte* lane = bulk_lane(t, pull ? r : t.rank, c.slot, r);
          values[j] = reinterpret_cast<const uint4*>(lane)[i];
        }
      }
#pragma unroll
      for (int j = 0; j < kBatch<kRanks>; ++j) {
        const int r = r0 + j;
        if (r < ranks_of<kRanks>(t) && r != t.rank) {
          out.store(r, row, byte, values[j]);
        }
      }
    }
  }
}

/// One chunk ahead: while a block waits for and copies chunk k, its chunk k+1 is under way.
template <int kRanks>
__global__ void __launch_bounds__(kBulkThreads, kBulkBlocksPerSm)
    query_bulk_kernel(const __grid_constant__ PeerTable t, const QuerySource in,
                      const QueryTarget out, FastDiv vectors_per_row, Chunks chunks, bool pull) {
  Call c;
  Patience patience;
  begin();
  if (!read_epoch(t, c)) {
    return;
  }
  const auto deposit = [&](std::uint32_t chunk) {
    const std::uint32_t row = chunk * chunks.rows_each;
    const std::uint32_t end = min(row + chunks.rows_each, in.rows);
    deposit_query<kRanks>(t, c, in, out, vectors_per_row, row * vectors_per_row.divisor,
                          end * vectors_per_row.divisor, pull);
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
    if (!wait_chunk(t, c, k, patience)) {
      return;
    }
    if (chunk < chunks.count) {
      const std::uint32_t row = chunk * chunks.rows_each;
      const std::uint32_t end = min(row + chunks.rows_each, in.rows);
      collect_query<kRanks>(t, c, out, vectors_per_row, row * vectors_per_row.divisor,
                            end * vectors_per_row.divisor, pull);
    }
  }
}

// bench/results/own_kernels/nvidia-h200-2cards.json: two H200s, NVLink, 2 ranks, 128 heads of
// 512+64 bf16, graph replay. Flag words took 3.2 and 4.8 us at 144 and 288 KiB sent against 4.4 and
// 4.9 for push, and 6.5 against 6.1 at 576 KiB. Pull was slower than push at every size.
constexpr PathRow kQueryPaths[] = {{320 << 10, PeerPath::flag_word}, {INT64_MAX, PeerPath::push}};

void check_query(const Query& q) {
  const auto element = static_cast<std::int64_t>(size_of(q.dtype));
  require(q.batch >= 0 && q.heads >= 1 && q.nope_dim >= 1 && q.nope_dim * element % 16 == 0 &&
              q.pe_dim >= 0 && q.pe_dim * element % 16 == 0,
          "query",
          fmt::format("expected batch >= 0, heads >= 1 and parts of a multiple of 16 bytes, got "
                      "batch={} heads={} nope_dim={} pe_dim={} of {}",
                      q.batch, q.heads, q.nope_dim, q.pe_dim, to_string(q.dtype)));
  require(q.batch == 0 || (q.nope != nullptr && (q.pe_dim == 0 || q.pe != nullptr)), "query",
          "null pointer");
  require(q.batch * q.heads * (q.nope_dim + q.pe_dim) * element < (std::int64_t{1} << 31), "query",
          "a rank's part exceeds 2 GiB");
}

QuerySource source_of(const Query& q) {
  const auto element = size_of(q.dtype);
  const auto bytes = [&](std::int64_t elements) {
    return static_cast<std::uint32_t>(elements * static_cast<std::int64_t>(element));
  };
  return {.nope = Rows(q.nope, q.nope_batch_stride, q.nope_head_stride, element),
          .pe = Rows(q.pe, q.pe_batch_stride, q.pe_head_stride, element),
          .heads = FastDiv(q.heads),
          .nope_bytes = bytes(q.nope_dim),
          .row_bytes = bytes(q.nope_dim + q.pe_dim),
          .rows = static_cast<std::uint32_t>(q.batch * q.heads)};
}

void gather_query_ll(const PeerTable& t, const QuerySource& in, const QueryTarget& out,
                     cudaStream_t stream) {
  const std::int64_t words = std::int64_t{in.rows} * in.row_bytes / 8;
  const std::int64_t used = std::max<std::int64_t>(words, 1);
  check_ll_words(t, used, "peer_gather_query");
  const Grid grid = ll_grid(used, t.max_blocks);
  with_ranks(t.size, [&](auto n) {
    launch(query_ll_kernel<n()>, grid.blocks, grid.threads, stream, t, in, out,
           FastDiv(in.row_bytes / 8), static_cast<std::uint32_t>(words),
           static_cast<std::uint32_t>(used));
  });
}

void gather_query_bulk(const PeerTable& t, const QuerySource& in, const QueryTarget& out, bool pull,
                       cudaStream_t stream) {
  const std::int64_t bytes = std::int64_t{in.rows} * in.row_bytes;
  require(bytes <= t.layout.bulk_lane_bytes, "peer_gather_query",
          fmt::format("needs {} bytes of bulk a peer, the inbox has {}", bytes,
                      t.layout.bulk_lane_bytes));
  Chunks chunks{};
  const std::int64_t most = std::max<std::int64_t>(1, kChunkBytes / in.row_bytes);
  chunks.rows_each = static_cast<std::uint32_t>(
      std::clamp<std::int64_t>(ceil_div(in.rows, bulk_blocks(t)), 1, most));
  chunks.count = static_cast<std::uint32_t>(ceil_div(in.rows, chunks.rows_each));
  require(ceil_div(chunks.count, bulk_blocks(t)) < 65535, "peer_gather_query", "too many chunks");
  const int blocks = static_cast<int>(std::clamp<std::int64_t>(chunks.count, 1, bulk_blocks(t)));
  with_ranks(t.size, [&](auto n) {
    launch(query_bulk_kernel<n()>, blocks, kBulkThreads, stream, t, in, out,
           FastDiv(in.row_bytes / 16), chunks, pull);
  });
}

}  // namespace

void report_gather(int n, std::vector<KernelInfo>& report) {
  report.push_back(describe("barrier", barrier_kernel, 64));
  with_ranks(n, [&](auto ranks) {
    report.push_back(describe("all_gather", all_gather_kernel<ranks()>, kLlThreads));
    report.push_back(describe("gather_query flag_word", query_ll_kernel<ranks()>, kLlThreads));
    report.push_back(describe("gather_query bulk", query_bulk_kernel<ranks()>, kBulkThreads));
  });
}

}  // namespace detail

using namespace detail;

std::span<const PathRow> query_path_table() noexcept { return kQueryPaths; }

std::int64_t query_lane_bytes(const Query& query, PeerPath path) {
  check_query(query);
  const std::int64_t bytes = query.batch * query.heads * (query.nope_dim + query.pe_dim) *
                             static_cast<std::int64_t>(size_of(query.dtype));
  return path == PeerPath::flag_word ? std::max<std::int64_t>(bytes, 8) : bytes;
}

PeerPath choose_query_path(const InboxLayout& layout, const Query& query) {
  const std::int64_t bytes = query_lane_bytes(query, PeerPath::flag_word);
  const bool ll_fits = bytes <= layout.ll_words * 8;
  const bool bulk_fits = query_lane_bytes(query, PeerPath::push) <= layout.bulk_lane_bytes;
  require(ll_fits || bulk_fits, "peer_gather_query",
          fmt::format("needs {} bytes a peer, the inbox has {} of flag words and {} of bulk", bytes,
                      layout.ll_words * 8, layout.bulk_lane_bytes));
  PeerPath path = PeerPath::push;
  for (const PathRow& row : kQueryPaths) {
    if (bytes * (layout.ranks - 1) <= row.max_bytes_sent) {
      path = row.path;
      break;
    }
  }
  if (path == PeerPath::flag_word) {
    return ll_fits ? path : PeerPath::push;
  }
  return bulk_fits ? path : PeerPath::flag_word;
}

void peer_barrier(const PeerTable& table, cudaStream_t stream) {
  check_table(table);
  launch(barrier_kernel, 1, 64, stream, table);
}

void peer_all_gather(const PeerTable& table, const AlongDim& dims, const void* in, void* out,
                     cudaStream_t stream) {
  check_table(table);
  const std::int64_t bytes = dims.outer * dims.inner_bytes;
  require(dims.outer >= 0 && dims.inner_bytes >= 0, "dims", "negative extent");
  require(bytes == 0 || (in != nullptr && out != nullptr), "in, out", "null pointer");
  const std::int64_t words = std::max<std::int64_t>(words_of(bytes), 1);
  check_ll_words(table, words, "peer_all_gather");
  const ByteView from(in, dims.outer, dims.inner_bytes, dims.share_outer_stride, 0);
  const ByteView to(out, dims.outer, dims.inner_bytes, dims.full_outer_stride,
                    dims.full_rank_stride);
  const Grid grid = ll_grid(words, table.max_blocks);
  with_ranks(table.size, [&](auto n) {
    launch(all_gather_kernel<n()>, grid.blocks, grid.threads, stream, table, from, to,
           dims.full_rank_stride, static_cast<std::uint32_t>(words));
  });
}

void peer_gather_query(const PeerTable& table, const Query& query, void* out,
                       std::int64_t out_batch_stride, std::int64_t out_head_stride,
                       cudaStream_t stream, PeerPath path) {
  check_table(table);
  check_query(query);
  require(query.batch == 0 || out != nullptr, "out", "null pointer");
  const PeerPath chosen =
      path == PeerPath::automatic ? choose_query_path(table.layout, query) : path;
  const QuerySource in = source_of(query);
  const QueryTarget to{Rows(out, out_batch_stride, out_head_stride, size_of(query.dtype)),
                       FastDiv(query.heads)};
  if (chosen == PeerPath::flag_word) {
    gather_query_ll(table, in, to, stream);
  } else {
    gather_query_bulk(table, in, to, chosen == PeerPath::pull, stream);
  }
}

}  // namespace cohort::cuda
