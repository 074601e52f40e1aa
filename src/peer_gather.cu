// SPDX-License-Identifier: Apache-2.0
#include "byte_view.cuh"
#include "cohort/cuda/shapes.hpp"
#include "peer_enter.cuh"
#include "peer_launch.cuh"
#include "peer_lines.cuh"

// All-gather and query gather through flag words or lines, and the barrier.

namespace cohort::cuda {
namespace detail {
namespace {

/// Each thread meets one peer, through the first half of a flag word. The release covers what this
/// rank's stream has written before, and the acquire what the peer's had.
__global__ void __launch_bounds__(2 * kWarp) barrier_kernel(const __grid_constant__ Group<0> g) {
  Call c;
  Patience patience;
  const Found found = begin(g);
  if (!enter(g, found, c, 1)) {
    return;
  }
  const int k = static_cast<int>(threadIdx.x);
  if (k == 0 || k >= g.size()) {
    return;
  }
  // What would be payload has the whole signature: the flag has room for a part of it. Both halves
  // are written, because barriers alone would leave the other one to grow old.
  const std::uint64_t mine = (std::uint64_t{c.flag} << 32) | g.signature.word;
  std::byte* const to = g.peers[k] + ll_own_place(g, c, 0);
  asm volatile("st.release.sys.global.u64 [%0],%1;" ::"l"(to), "l"(mine) : "memory");
  asm volatile("st.volatile.global.u64 [%0],%1;" ::"l"(to + 8), "l"(mine) : "memory");
  delay_point(g, c, 1);
  const std::byte* word = g.own() + ll_place(g, c, g.rank_at(k), 0);
  await(g, c, patience, [&] {
    std::uint64_t theirs;
    asm volatile("ld.acquire.sys.global.u64 %0,[%1];" : "=l"(theirs) : "l"(word) : "memory");
    return theirs != mine ? 1U << g.rank_at(k) : 0U;
  });
}

template <int kRanks, class View>
__global__ void __launch_bounds__(kLlThreads, 1)
    all_gather_kernel(const __grid_constant__ Group<kRanks> g, const __grid_constant__ View in,
                      const __grid_constant__ View out, std::uint32_t words) {
  Call c;
  Patience patience;
  const std::uint32_t first = worker_number();
  const std::uint32_t step = worker_count();
  const bool has_first = sends_ahead<kRanks>(words);
  const WordAt<View> source(in, first);
  const FirstPlaces<kRanks> places(g, first);
  const Found found = begin(g);
  const uint2 value = source.load_if(has_first);  // while the epoch is on its way
  const auto send_first = [&](bool wanted) {
#pragma unroll
    for (int k = 1; k < kRanks; ++k) {
      places.store_if(wanted && has_first, c, k, value);
    }
  };
  if (!enter(g, found, c, words, send_first)) {
    return;
  }
  if (has_first) {
    store_word(out, first, value, g.rank);
  }
#pragma unroll 1
  for (std::uint32_t i = second_word<kRanks>(); i < words; i += step) {
    const uint2 next = load_word(in, i);
    ll_send_all(g, c, i, next);
    store_word(out, i, next, g.rank);
  }
  delay_point(g, c, 1);
#pragma unroll 1
  for (std::uint32_t i = first; i < words; i += step) {
    const WordAt<View> peer_part(out, i, g.rank ^ 1);  // the only one's of two ranks
    for (int r0 = 0; r0 < g.size(); r0 += kBatch<kRanks>) {
      uint2 values[kBatch<kRanks>];
      if (!ll_receive(g, c, r0, i, values, patience)) {
        return;
      }
      if constexpr (kRanks == 2) {
        peer_part.store(values[0]);
      } else {
#pragma unroll
        for (int j = 0; j < kBatch<kRanks>; ++j) {
          if (is_peer(g, r0 + j)) {
            store_word(out, i, values[j], r0 + j);
          }
        }
      }
    }
  }
}

/// The packed query of this rank, and the gathered query [B,n*h,row], word by word. kAligned: every
/// row starts on 16 bytes.
template <bool kAligned>
struct QueryArgs {
  Rows nope;
  Rows pe;
  Rows out;
  FastDiv heads;  ///< Of one rank.
  FastDiv words_per_row;
  std::uint32_t nope_bytes;
  std::uint32_t words;
  bool successor_waits;

  __device__ __forceinline__ uint2 load(std::uint32_t word) const {
    const std::uint32_t row = words_per_row.divide(word);
    const std::uint32_t byte = 8 * (word - row * words_per_row.divisor);
    const std::uint32_t b = heads.divide(row);
    const std::uint32_t h = row - b * heads.divisor;
    return byte < nope_bytes
               ? load_as<uint2>(nope.row(b, h) + byte, kAligned || nope.aligned)
               : load_as<uint2>(pe.row(b, h) + (byte - nope_bytes), kAligned || pe.aligned);
  }
  /// Where a word of a rank's goes, worked out now.
  struct Target {
    std::byte* to;
    bool aligned;

    __device__ __forceinline__ void store(uint2 value) const {
      store_settled(to, value, kAligned || aligned);
    }
  };
  __device__ __forceinline__ Target target(int rank, std::uint32_t word) const {
    const std::uint32_t row = words_per_row.divide(word);
    const std::uint32_t byte = 8 * (word - row * words_per_row.divisor);
    const std::uint32_t b = heads.divide(row);
    const std::uint32_t h = row - b * heads.divisor;
    return {settled(out.row(b, static_cast<std::uint32_t>(rank) * heads.divisor + h) + byte),
            out.aligned};
  }
  __device__ __forceinline__ void store(int rank, std::uint32_t word, uint2 value) const {
    target(rank, word).store(value);
  }
};

/// Kernels for a constant number of ranks take aligned rows; the general one, which speaks the same
/// protocol, takes any. So a rank's alignment is its own affair.
template <int kRanks>
using QueryFor = QueryArgs<(kRanks > 0)>;

template <int kRanks>
__global__ void __launch_bounds__(kLlThreads, 1)
    query_word_kernel(const __grid_constant__ Group<kRanks> g,
                      const __grid_constant__ QueryFor<kRanks> q, std::uint32_t used) {
  Call c;
  Patience patience;
  const std::uint32_t first = worker_number();
  const std::uint32_t step = worker_count();
  // `used` is `words`, or 1 in an empty call, which signals nevertheless.
  const bool has_first = sends_ahead<kRanks>(used);
  const FirstPlaces<kRanks> places(g, first);
  if (q.successor_waits) {
    launch_successor();
  }
  const Found found = begin(g);
  // Loaded while the epoch is on its way.
  const uint2 value = has_first && first < q.words ? q.load(first) : make_uint2(0, 0);
  const auto send_first = [&](bool wanted) {
#pragma unroll
    for (int k = 1; k < kRanks; ++k) {
      places.store_if(wanted && has_first, c, k, value);
    }
  };
  if (!enter(g, found, c, used, send_first)) {
    return;
  }
  if (has_first && first < q.words) {
    q.store(g.rank, first, value);
  }
#pragma unroll 1
  for (std::uint32_t i = second_word<kRanks>(); i < used; i += step) {
    const uint2 next = i < q.words ? q.load(i) : make_uint2(0, 0);
    ll_send_all(g, c, i, next);
    if (i < q.words) {
      q.store(g.rank, i, next);
    }
  }
  delay_point(g, c, 1);
#pragma unroll 1
  for (std::uint32_t i = first; i < used; i += step) {
    const auto peer_part = q.target(g.rank ^ 1, i);  // the only one's of two ranks
    for (int r0 = 0; r0 < g.size(); r0 += kBatch<kRanks>) {
      uint2 values[kBatch<kRanks>];
      if (!ll_receive(g, c, r0, i, values, patience)) {
        return;
      }
      if constexpr (kRanks == 2) {
        if (i < q.words) {
          peer_part.store(values[0]);
        }
      } else {
#pragma unroll
        for (int j = 0; j < kBatch<kRanks>; ++j) {
          if (i < q.words && is_peer(g, r0 + j)) {
            q.store(r0 + j, i, values[j]);
          }
        }
      }
    }
  }
}

/// The share of this rank, and every rank's, word by word.
template <class View>
struct ShareArgs {
  View in;
  View out;
  std::uint32_t words;
  static constexpr bool successor_waits = false;

  __device__ __forceinline__ uint2 load(std::uint32_t word) const { return load_word(in, word); }
  __device__ __forceinline__ WordAt<View> target(int rank, std::uint32_t word) const {
    return {out, word, rank};
  }
  __device__ __forceinline__ void store(int rank, std::uint32_t word, uint2 value) const {
    store_word(out, word, value, rank);
  }
};

template <class Args>
__device__ __forceinline__ LineWords<1> load_lines(const Args& a, std::uint32_t group) {
  return load_for_all(a.words, group, [&](std::uint32_t word) { return a.load(word); });
}

/// Polls for the same group of lines of every peer and stores it. Returns as `poll_in_warp`.
template <int kRanks, class Args>
__device__ __forceinline__ bool collect_lines(const Group<kRanks>& g, const Call& c, const Args& a,
                                              std::uint32_t group, std::uint32_t& missing) {
  const LinePart part(group);
  const bool any = part.line * kLineWords < a.words;
  if constexpr (kRanks == 2) {
    const int peer = g.rank ^ 1;
    const auto first = a.target(peer, part.word);
    const auto second = a.target(peer, part.word + 1);
    uint4 values[kBatch<kRanks>];
    if (!receive_lines(g, c, 0, part, any, values, missing)) {
      return false;
    }
    if (part.word < a.words) {
      first.store(low(values[0]));
    }
    if (!part.flag && part.word + 1 < a.words) {
      second.store(high(values[0]));
    }
  } else {
    for (int r0 = 0; r0 < g.size(); r0 += kBatch<kRanks>) {
      uint4 values[kBatch<kRanks>] = {};
      if (!receive_lines(g, c, r0, part, any, values, missing)) {
        return false;
      }
#pragma unroll
      for (int j = 0; j < kBatch<kRanks>; ++j) {
        if (is_peer(g, r0 + j)) {
          if (part.word < a.words) {
            a.store(r0 + j, part.word, low(values[j]));
          }
          if (!part.flag && part.word + 1 < a.words) {
            a.store(r0 + j, part.word + 1, high(values[j]));
          }
        }
      }
    }
  }
  return true;
}

/// The all-gather and the query gather.
template <int kRanks, class Args>
__global__ void __launch_bounds__(kLineThreads<kRanks>, 1)
    gather_line_kernel(const __grid_constant__ Group<kRanks> g, const __grid_constant__ Args a) {
  Call c;
  const LineRole role(a.words);
  const auto load = [&](std::uint32_t group) { return load_lines(a, group); };
  const FirstLines<kRanks> lines(g, role.leads(), role.first, a.words);
  if (a.successor_waits) {
    launch_successor();
  }
  const Found found = begin(g);
  const LineWords<1> first = load(role.ahead());  // while the epoch is on its way
  const auto send_ahead = [&](bool wanted) { lines.send(wanted, c, first); };
  if (!enter(g, found, c, 0, send_ahead)) {
    return;
  }
  const auto keep = [&](std::uint32_t group, const LineWords<1>& loaded) {
    store_lines(a.words, group, loaded,
                [&](std::uint32_t word, uint2 value) { a.store(g.rank, word, value); });
  };
  const auto send = [&](std::uint32_t group, const LineWords<1>& loaded) {
    send_to_all(g, c, a.words, group, group, loaded);
    keep(group, loaded);
  };
  const auto send_first = [&] {
    if constexpr (kRanks > 0) {
      keep(role.first, first);  // it is on its way
    } else {
      send(role.first, first);
    }
  };
  exchange_lines(g, c, role, send_first, load, send,
                 [&](std::uint32_t group, std::uint32_t& missing) {
                   return collect_lines(g, c, a, group, missing);
                 });
}

// bench/results/own_kernels/nvidia-h200-2cards-attention.json: two H200s, NVLink, 2 ranks, graph
// replay. Flag words took 2.13 and 2.36 us at 37 and 72 KiB sent against 2.09 and 2.23 for lines,
// and lines were faster at every batch beyond.
constexpr PathRow kQueryPaths[] = {{32 << 10, PeerPath::flag_word},
                                   {INT64_MAX, PeerPath::flag_line}};

// bench/results/own_kernels/nvidia-h100-2cards.json: all-gathers and reduce-scatters in flag words
// took 2.18 and 2.21 us at 64 KiB sent against 2.29 and 2.34 in lines, 2.67 and 2.70 at 128 KiB
// against 2.53 and 2.54, and lines were faster at every size beyond.
constexpr PathRow kSharePaths[] = {{96 << 10, PeerPath::flag_word},
                                   {INT64_MAX, PeerPath::flag_line}};

std::int64_t query_bytes(const Query& q) {
  return q.batch * q.heads * (q.nope_dim + q.pe_dim) * static_cast<std::int64_t>(size_of(q.dtype));
}

void check_query(const Query& q) {
  if (const std::string obstacle = query_obstacle(q); !obstacle.empty()) {
    throw UsageError(obstacle);
  }
  require(query_bytes(q) == 0 || (q.nope != nullptr && (q.pe_dim == 0 || q.pe != nullptr)), "query",
          "null pointer");
}

template <bool kAligned>
QueryArgs<kAligned> args_of(const Query& q, const Rows& out) {
  const auto element = size_of(q.dtype);
  const auto row = (q.nope_dim + q.pe_dim) * static_cast<std::int64_t>(element);
  return {.nope = Rows(q.nope, q.nope_batch_stride, q.nope_head_stride, element),
          .pe = Rows(q.pe, q.pe_batch_stride, q.pe_head_stride, element),
          .out = out,
          .heads = FastDiv(q.heads),
          .words_per_row = FastDiv(row / 8),
          .nope_bytes = static_cast<std::uint32_t>(q.nope_dim * static_cast<std::int64_t>(element)),
          .words = static_cast<std::uint32_t>(query_bytes(q) / 8),
          .successor_waits = q.successor_waits};
}

void gather_query(const PeerTable& t, const Query& query, const Rows& out, PeerPath path,
                  cudaStream_t stream) {
  const auto any = args_of<false>(query, out);
  const bool aligned = any.nope.aligned && (query.pe_dim == 0 || any.pe.aligned) && out.aligned;
  const std::uint32_t used = std::max(any.words, 1U);  // an empty call signals nevertheless
  const CallSignature signature = signature_of(query, blocks_of(t));
  const bool words = checked_path(t, path, any.words, "peer_gather_query") == PeerPath::flag_word;
  with_ranks(aligned ? t.size : 0, [&](auto n) {
    const auto args = args_of<(n() > 0)>(query, out);
    if (words) {
      const Grid grid = ll_grid(used, t);
      launch(query_word_kernel<n()>, grid.blocks, grid.threads, stream, Group<n()>(t, signature),
             args, used);
    } else {
      const Grid grid = line_grid<n()>(args.words, t);
      launch(gather_line_kernel<n(), QueryFor<n()>>, grid.blocks, grid.threads, stream,
             Group<n()>(t, signature), args);
    }
  });
}

}  // namespace

void load_gather(int n) {
  load(barrier_kernel);
  with_ranks(n, [](auto r) {
    load(all_gather_kernel<r(), FlatView>);
    load(all_gather_kernel<r(), ByteView>);
    load(query_word_kernel<r()>);
    load(gather_line_kernel<r(), QueryFor<r()>>);
    load(gather_line_kernel<r(), ShareArgs<FlatView>>);
  });
  load(gather_line_kernel<0, ShareArgs<ByteView>>);
}

void report_gather(int n, std::vector<KernelInfo>& report) {
  report.push_back(describe("barrier", barrier_kernel, 2 * kWarp));
  with_ranks(n, [&](auto r) {
    report.push_back(describe("all_gather", all_gather_kernel<r(), FlatView>, kLlThreads));
    report.push_back(describe("all_gather, gaps", all_gather_kernel<r(), ByteView>, kLlThreads));
    report.push_back(describe("gather_query flag_word", query_word_kernel<r()>, kLlThreads));
    report.push_back(describe("gather_query flag_line", gather_line_kernel<r(), QueryFor<r()>>,
                              kLineThreads<r()>));
    report.push_back(describe("all_gather flag_line", gather_line_kernel<r(), ShareArgs<FlatView>>,
                              kLineThreads<r()>));
  });
}

}  // namespace detail

using namespace detail;

std::span<const PathRow> query_path_table() noexcept { return kQueryPaths; }
std::span<const PathRow> share_path_table() noexcept { return kSharePaths; }

std::int64_t query_lane_bytes(const Query& query, PeerPath path) {
  check_query(query);
  const std::int64_t bytes = query_bytes(query);
  return path == PeerPath::flag_word ? std::max<std::int64_t>(bytes, 8) : bytes;
}

PeerPath choose_query_path(const InboxLayout& layout, const Query& query) {
  return choose_path(kQueryPaths, "peer_gather_query", layout,
                     query_lane_bytes(query, PeerPath::flag_word));
}

PeerPath choose_share_path(const InboxLayout& layout, std::int64_t share_bytes) {
  return choose_path(kSharePaths, "all_gather or reduce_scatter", layout,
                     std::max<std::int64_t>(words_of(share_bytes), 1) * 8);
}

void peer_barrier(const PeerTable& table, cudaStream_t stream) {
  check_table(table);
  launch(barrier_kernel, 1, 2 * kWarp, stream,
         Group<0>(table, signature_of(PeerCall::barrier, DType::u8, 0, blocks_of(table))));
}

void peer_meet(const PeerTable& table, CallSignature call, cudaStream_t stream) {
  check_table(table);
  launch_as(false, barrier_kernel, 1, 2 * kWarp, stream, Group<0>(table, call));
}

void peer_all_gather(const PeerTable& table, const AlongDim& dims, const void* in, void* out,
                     cudaStream_t stream, PeerPath path) {
  check_table(table);
  const std::int64_t bytes = dims.outer * dims.inner_bytes;
  require(dims.outer >= 0 && dims.inner_bytes >= 0, "dims", "negative extent");
  require(bytes == 0 || (in != nullptr && out != nullptr), "in, out", "null pointer");
  const ByteView from(in, dims.outer, dims.inner_bytes, dims.share_outer_stride, 0);
  const ByteView to(out, dims.outer, dims.inner_bytes, dims.full_outer_stride,
                    dims.full_rank_stride);
  const std::int64_t words = words_of(bytes);
  const CallSignature signature =
      signature_of(PeerCall::all_gather, DType::u8, dims, blocks_of(table));
  const PeerPath chosen =
      path == PeerPath::automatic ? choose_share_path(table.layout, bytes) : path;
  if (checked_path(table, chosen, words, "peer_all_gather") == PeerPath::flag_line) {
    with_views(from, to, [&]<class View>(const View& source, const View& target) {
      const ShareArgs<View> args{source, target, static_cast<std::uint32_t>(words)};
      with_line_ranks<View>(table.size, [&](auto n) {
        const Grid grid = line_grid<n()>(words, table);
        launch(gather_line_kernel<n(), ShareArgs<View>>, grid.blocks, grid.threads, stream,
               Group<n()>(table, signature), args);
      });
    });
    return;
  }
  const std::int64_t used = std::max<std::int64_t>(words, 1);  // an empty call signals nevertheless
  const Grid grid = ll_grid(used, table);
  with_views(from, to, [&]<class View>(const View& source, const View& target) {
    with_ranks(table.size, [&](auto n) {
      launch(all_gather_kernel<n(), View>, grid.blocks, grid.threads, stream,
             Group<n()>(table, signature), source, target, static_cast<std::uint32_t>(used));
    });
  });
}

void peer_gather_query(const PeerTable& table, const Query& query, void* out,
                       std::int64_t out_batch_stride, std::int64_t out_head_stride,
                       cudaStream_t stream, PeerPath path) {
  check_table(table);
  check_query(query);
  require(query_bytes(query) == 0 || out != nullptr, "out", "null pointer");
  const PeerPath chosen =
      path == PeerPath::automatic ? choose_query_path(table.layout, query) : path;
  const Rows rows(out, out_batch_stride, out_head_stride, size_of(query.dtype));
  gather_query(table, query, rows, chosen, stream);
}

}  // namespace cohort::cuda
