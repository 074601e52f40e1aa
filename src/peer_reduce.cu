#include "byte_view.cuh"
#include "peer_device.cuh"

// Reduce-scatter and all-reduce through flag words.

namespace cohort::cuda {
namespace detail {
namespace {

template <int kRanks, class T>
__global__ void __launch_bounds__(kLlThreads)
    reduce_scatter_kernel(const __grid_constant__ PeerTable t, const __grid_constant__ ByteView in,
                          const __grid_constant__ ByteView out, std::int64_t rank_stride,
                          std::uint32_t words) {
  Call c;
  Patience patience;
  begin();
  const std::uint32_t first = blockIdx.x * blockDim.x + threadIdx.x;
  const std::uint32_t step = gridDim.x * blockDim.x;
  const Ahead<kRanks> ahead(t, first < words,
                            [&](int p) { return load_word(in, first, p * rank_stride); });
  if (!read_epoch(t, c)) {
    return;
  }
  for (std::uint32_t i = first; i < words; i += step) {
#pragma unroll
    for (int p = 0; p < ranks_of<kRanks>(t); ++p) {
      if (p != t.rank) {
        const uint2 value =
            ahead.get(p, i == first, [&](int to) { return load_word(in, i, to * rank_stride); });
        ll_store(ll_lane(t, p, c.slot, t.rank), i, value, c.flag);
      }
    }
  }
  advance_epoch(t, c, words);
  delay_point(t, c, 1);
  for (std::uint32_t i = first; i < words; i += step) {
    const uint2 own = load_word(in, i, t.rank * rank_stride);
    Sum<T> sum;
    for (int r0 = 0; r0 < ranks_of<kRanks>(t); r0 += kBatch<kRanks>) {
      uint2 values[1][kBatch<kRanks>];
      if (!ll_receive<kRanks>(t, c, r0, {i}, values, patience)) {
        return;
      }
#pragma unroll
      for (int j = 0; j < kBatch<kRanks>; ++j) {
        if (r0 + j < ranks_of<kRanks>(t)) {
          sum.add(r0 + j == t.rank ? own : values[0][j]);
        }
      }
    }
    store_word(out, i, sum.result());
  }
}

/// Everyone sends everything to everyone and reduces it all: one flight.
template <int kRanks, class T>
__global__ void __launch_bounds__(kLlThreads)
    all_reduce_kernel(const __grid_constant__ PeerTable t, const __grid_constant__ ByteView in,
                      const __grid_constant__ ByteView out, std::uint32_t words) {
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
    ll_send_all<kRanks>(t, c, i, i == first ? ahead : load_word(in, i));
  }
  advance_epoch(t, c, words);
  delay_point(t, c, 1);
  for (std::uint32_t i = first; i < words; i += step) {
    const uint2 own = load_word(in, i);  // before the store: `out` may be `in`
    Sum<T> sum;
    for (int r0 = 0; r0 < ranks_of<kRanks>(t); r0 += kBatch<kRanks>) {
      uint2 values[1][kBatch<kRanks>];
      if (!ll_receive<kRanks>(t, c, r0, {i}, values, patience)) {
        return;
      }
#pragma unroll
      for (int j = 0; j < kBatch<kRanks>; ++j) {
        if (r0 + j < ranks_of<kRanks>(t)) {
          sum.add(r0 + j == t.rank ? own : values[0][j]);
        }
      }
    }
    store_word(out, i, sum.result());
  }
}

/// Reduce-scatter, then all-gather, in one launch: two flights, 2/n of the bytes. Words of the
/// second step follow the first's in each lane. A thread passes on the very word that it has
/// reduced, so no block waits for another of its launch.
template <int kRanks, class T>
__global__ void __launch_bounds__(kLlThreads)
    all_reduce_two_step_kernel(const __grid_constant__ PeerTable t,
                               const __grid_constant__ ByteView in,
                               const __grid_constant__ ByteView out, std::uint32_t share) {
  Call c;
  Patience patience;
  begin();
  const std::uint32_t first = blockIdx.x * blockDim.x + threadIdx.x;
  const std::uint32_t step = gridDim.x * blockDim.x;
  const auto own_share = static_cast<std::uint32_t>(t.rank) * share;
  const auto load = [&](int p, std::uint32_t i) {
    return load_word(in, static_cast<std::uint32_t>(p) * share + i);
  };
  const Ahead<kRanks> ahead(t, first < share, [&](int p) { return load(p, first); });
  if (!read_epoch(t, c)) {
    return;
  }
  for (std::uint32_t i = first; i < share; i += step) {
#pragma unroll
    for (int p = 0; p < ranks_of<kRanks>(t); ++p) {
      if (p != t.rank) {
        const uint2 value = ahead.get(p, i == first, [&](int to) { return load(to, i); });
        ll_store(ll_lane(t, p, c.slot, t.rank), i, value, c.flag);
      }
    }
  }
  advance_epoch(t, c, 2 * share);
  delay_point(t, c, 1);
  for (std::uint32_t i = first; i < share; i += step) {
    const uint2 own = load_word(in, own_share + i);
    Sum<T> sum;
    for (int r0 = 0; r0 < ranks_of<kRanks>(t); r0 += kBatch<kRanks>) {
      uint2 values[1][kBatch<kRanks>];
      if (!ll_receive<kRanks>(t, c, r0, {i}, values, patience)) {
        return;
      }
#pragma unroll
      for (int j = 0; j < kBatch<kRanks>; ++j) {
        if (r0 + j < ranks_of<kRanks>(t)) {
          sum.add(r0 + j == t.rank ? own : values[0][j]);
        }
      }
    }
    ll_send_all<kRanks>(t, c, share + i, sum.result());
    store_word(out, own_share + i, sum.result());
  }
  delay_point(t, c, 2);
  for (std::uint32_t i = first; i < share; i += step) {
    for (int r0 = 0; r0 < ranks_of<kRanks>(t); r0 += kBatch<kRanks>) {
      uint2 values[1][kBatch<kRanks>];
      if (!ll_receive<kRanks>(t, c, r0, {share + i}, values, patience)) {
        return;
      }
#pragma unroll
      for (int j = 0; j < kBatch<kRanks>; ++j) {
        if (r0 + j < ranks_of<kRanks>(t) && r0 + j != t.rank) {
          store_word(out, static_cast<std::uint32_t>(r0 + j) * share + i, values[0][j]);
        }
      }
    }
  }
}

/// Bytes that a rank may send to all peers in one step before two steps are taken. One flight costs
/// about a microsecond and a link carries some 350 bytes a nanosecond with flag words taking half
/// (peer writes 365-398 GB/s between two H200s), so a second flight pays from about
/// 1 us * 180 B/ns saved.
constexpr std::int64_t kOneStepBytesSent = 192 << 10;

void check_sum_view(DType dtype, const void* in, const void* out, std::int64_t bytes) {
  require(dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16, "dtype",
          fmt::format("expected f32, f16 or bf16, got {}", to_string(dtype)));
  const auto element = size_of(dtype);
  require(bytes == 0 || (in != nullptr && out != nullptr), "in, out", "null pointer");
  require(reinterpret_cast<std::uintptr_t>(in) % element == 0 &&
              reinterpret_cast<std::uintptr_t>(out) % element == 0 &&
              bytes % static_cast<std::int64_t>(element) == 0,
          "in, out", "expected whole, aligned elements");
}

}  // namespace

void report_reduce(int n, std::vector<KernelInfo>& report) {
  with_ranks(n, [&](auto r) {
    report.push_back(
        describe("reduce_scatter bf16", reduce_scatter_kernel<r(), __nv_bfloat16>, kLlThreads));
    report.push_back(
        describe("all_reduce one step bf16", all_reduce_kernel<r(), __nv_bfloat16>, kLlThreads));
    report.push_back(describe("all_reduce two steps bf16",
                              all_reduce_two_step_kernel<r(), __nv_bfloat16>, kLlThreads));
  });
}

}  // namespace detail

using namespace detail;

void peer_reduce_scatter(const PeerTable& table, const AlongDim& dims, DType dtype, const void* in,
                         void* out, cudaStream_t stream) {
  check_table(table);
  require(dims.outer >= 0 && dims.inner_bytes >= 0, "dims", "negative extent");
  const std::int64_t bytes = dims.outer * dims.inner_bytes;
  check_sum_view(dtype, in, out, bytes);
  const std::int64_t words = std::max<std::int64_t>(words_of(bytes), 1);
  check_ll_words(table, words, "peer_reduce_scatter");
  const ByteView from(in, dims.outer, dims.inner_bytes, dims.full_outer_stride,
                      dims.full_rank_stride);
  const ByteView to(out, dims.outer, dims.inner_bytes, dims.share_outer_stride, 0);
  const Grid grid = ll_grid(words, table.max_blocks);
  with_float_type(dtype, "dtype", [&]<class T>(T*) {
    with_ranks(table.size, [&](auto n) {
      launch(reduce_scatter_kernel<n(), T>, grid.blocks, grid.threads, stream, table, from, to,
             dims.full_rank_stride, static_cast<std::uint32_t>(words));
    });
  });
}

void peer_all_reduce(const PeerTable& table, std::int64_t count, DType dtype, const void* in,
                     void* out, cudaStream_t stream) {
  check_table(table);
  require(count >= 0, "count", "negative");
  const std::int64_t bytes = count * static_cast<std::int64_t>(size_of(dtype));
  check_sum_view(dtype, in, out, bytes);
  const std::int64_t words = std::max<std::int64_t>(words_of(bytes), 1);
  const std::int64_t share = ceil_div(words, table.size);
  const bool one_step =
      table.size <= 2 || words < table.size || words * 8 * (table.size - 1) <= kOneStepBytesSent;
  const bool one = one_step && words <= table.layout.ll_words;
  check_ll_words(table, one ? words : 2 * share, "peer_all_reduce");
  const ByteView from(in, 1, bytes, bytes, 0);
  const ByteView to(out, 1, bytes, bytes, 0);
  const Grid grid = ll_grid(one ? words : share, table.max_blocks);
  with_float_type(dtype, "dtype", [&]<class T>(T*) {
    with_ranks(table.size, [&](auto n) {
      if (one) {
        launch(all_reduce_kernel<n(), T>, grid.blocks, grid.threads, stream, table, from, to,
               static_cast<std::uint32_t>(words));
      } else {
        launch(all_reduce_two_step_kernel<n(), T>, grid.blocks, grid.threads, stream, table, from,
               to, static_cast<std::uint32_t>(share));
      }
    });
  });
}

}  // namespace cohort::cuda
