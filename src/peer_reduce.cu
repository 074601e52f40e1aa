// SPDX-License-Identifier: Apache-2.0
#include "byte_view.cuh"
#include "cohort/cuda/path_sizes.hpp"
#include "peer_enter.cuh"
#include "peer_launch.cuh"
#include "peer_lines.cuh"

// Reduce-scatter through flag words or lines, and all-reduce through flag words.

namespace cohort::cuda {
namespace detail {
namespace {

/// The ranks' sum of a word, in rank order. False if the wait for a peer's failed.
template <class T, int kRanks>
__device__ __forceinline__ bool sum_word(const Group<kRanks>& g, const Call& c, std::uint32_t word,
                                         uint2 own, uint2& sum, Patience& patience) {
  Sum<T> total;
  for (int r0 = 0; r0 < g.size(); r0 += kBatch<kRanks>) {
    uint2 values[kBatch<kRanks>];
    if (!ll_receive(g, c, r0, word, values, patience)) {
      return false;
    }
#pragma unroll
    for (int j = 0; j < kBatch<kRanks>; ++j) {
      if (r0 + j < g.size()) {
        const bool mine = r0 + j == g.rank;
        total.add(make_uint2(mine ? own.x : values[j].x, mine ? own.y : values[j].y));
      }
    }
  }
  sum = total.result();
  return true;
}

template <int kRanks, class View, class T>
__global__ void __launch_bounds__(kLlThreads, 1)
    reduce_scatter_kernel(const __grid_constant__ Group<kRanks> g, const __grid_constant__ View in,
                          const __grid_constant__ View out, std::uint32_t words) {
  Call c;
  Patience patience;
  const std::uint32_t first = worker_number();
  const std::uint32_t step = worker_count();
  const bool has_first = sends_ahead<kRanks>(words);
  constexpr int kMost = Group<kRanks>::kMost;
  WordAt<View> sources[kMost];
  uint2 outgoing[kMost];
#pragma unroll
  for (int k = 1; k < kRanks; ++k) {
    sources[k] = WordAt<View>(in, first, g.rank_at(k));
  }
  const FirstPlaces<kRanks> places(g, first);
  const Found found = begin(g);
#pragma unroll
  for (int k = 1; k < kRanks; ++k) {
    outgoing[k] = sources[k].load_if(has_first);  // while the epoch is on its way
  }
  const auto send_first = [&](bool wanted) {
#pragma unroll
    for (int k = 1; k < kRanks; ++k) {
      places.store_if(wanted && has_first, c, k, outgoing[k]);
    }
  };
  if (!enter(g, found, c, words, send_first)) {
    return;
  }
#pragma unroll 1
  for (std::uint32_t i = second_word<kRanks>(); i < words; i += step) {
    const std::int64_t place = ll_own_place(g, c, i);
#pragma unroll
    for (int k = 1; k < g.size(); ++k) {
      ll_store(g.peers[k] + place, load_word(in, i, g.rank_at(k)), c.flag);
    }
  }
  delay_point(g, c, 1);
#pragma unroll 1
  for (std::uint32_t i = first; i < words; i += step) {
    const WordAt<View> target(out, i);
    uint2 sum;
    if (!sum_word<T>(g, c, i, load_word(in, i, g.rank), sum, patience)) {
      return;
    }
    target.store(sum);
  }
}

/// Sums a group of lines, in rank order. Returns as `poll_in_warp`.
template <class T, int kRanks, class View>
__device__ __forceinline__ bool sum_lines(const Group<kRanks>& g, const Call& c, const View& in,
                                          const View& out, std::uint32_t words, std::uint32_t group,
                                          std::uint32_t& missing) {
  const LinePart part(group);
  const bool has_first = part.word < words;
  const bool has_second = !part.flag && part.word + 1 < words;
  const uint2 own_first = has_first ? load_word(in, part.word, g.rank) : make_uint2(0, 0);
  const uint2 own_second = has_second ? load_word(in, part.word + 1, g.rank) : make_uint2(0, 0);
  Sum<T> first;
  Sum<T> second;
  for (int r0 = 0; r0 < g.size(); r0 += kBatch<kRanks>) {
    uint4 values[kBatch<kRanks>] = {};
    if (!receive_lines(g, c, r0, part, part.line * kLineWords < words, values, missing)) {
      return false;
    }
#pragma unroll
    for (int j = 0; j < kBatch<kRanks>; ++j) {
      if (r0 + j < g.size()) {
        const bool mine = r0 + j == g.rank;
        first.add(make_uint2(mine ? own_first.x : values[j].x, mine ? own_first.y : values[j].y));
        second.add(
            make_uint2(mine ? own_second.x : values[j].z, mine ? own_second.y : values[j].w));
      }
    }
  }
  if (has_first) {
    store_word(out, part.word, first.result());
  }
  if (has_second) {
    store_word(out, part.word + 1, second.result());
  }
  return true;
}

template <int kRanks, class View, class T>
__global__ void __launch_bounds__(kLineThreads<kRanks>, 1)
    reduce_scatter_line_kernel(const __grid_constant__ Group<kRanks> g,
                               const __grid_constant__ View in, const __grid_constant__ View out,
                               std::uint32_t words) {
  Call c;
  const LineRole role(words);
  const auto word_for = [&](int rank, std::uint32_t word) { return load_word(in, word, rank); };
  const auto load = [&](std::uint32_t group) { return load_for_peers(g, words, group, word_for); };
  const Found found = begin(g);
  const PeerLineWords<kRanks> first = load(role.ahead());  // while the epoch is on its way
  if (!enter(g, found, c, 0)) {
    return;
  }
  exchange_lines(
      g, c, role, first, load,
      [&](std::uint32_t group, const PeerLineWords<kRanks>& loaded) {
        send_to_peers(g, c, words, group, loaded, word_for);
      },
      [&](std::uint32_t group, std::uint32_t& missing) {
        return sum_lines<T>(g, c, in, out, words, group, missing);
      });
}

/// Everyone sends everything to everyone and reduces it all: one flight.
template <int kRanks, class View, class T>
__global__ void __launch_bounds__(kLlThreads, 1)
    all_reduce_kernel(const __grid_constant__ Group<kRanks> g, const __grid_constant__ View in,
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
#pragma unroll 1
  for (std::uint32_t i = second_word<kRanks>(); i < words; i += step) {
    ll_send_all(g, c, i, load_word(in, i));
  }
  delay_point(g, c, 1);
#pragma unroll 1
  for (std::uint32_t i = first; i < words; i += step) {
    const WordAt<View> target(out, i);
    uint2 sum;  // the own word is read before it is written: `out` may be `in`
    if (!sum_word<T>(g, c, i, load_word(in, i), sum, patience)) {
      return;
    }
    target.store(sum);
  }
}

/// Reduce-scatter, then all-gather, in one launch: two flights, 2/n of the bytes. Words of the
/// second step follow the first's in each lane. A thread passes on the very word that it has
/// reduced, so no block waits for another of its launch.
template <int kRanks, class T>
__global__ void __launch_bounds__(kLlThreads, 1)
    all_reduce_two_step_kernel(const __grid_constant__ Group<kRanks> g,
                               const __grid_constant__ ByteView in,
                               const __grid_constant__ ByteView out, std::uint32_t share) {
  Call c;
  Patience patience;
  const Found found = begin(g);
  const std::uint32_t first = worker_number();
  const std::uint32_t step = worker_count();
  const auto own_share = static_cast<std::uint32_t>(g.rank) * share;
  if (!enter(g, found, c, 2 * share)) {
    return;
  }
#pragma unroll 1
  for (std::uint32_t i = first; i < share; i += step) {
    const std::int64_t place = ll_own_place(g, c, i);
#pragma unroll
    for (int k = 1; k < g.size(); ++k) {
      const auto word = static_cast<std::uint32_t>(g.rank_at(k)) * share + i;
      ll_store(g.peers[k] + place, load_word(in, word), c.flag);
    }
  }
  delay_point(g, c, 1);
#pragma unroll 1
  for (std::uint32_t i = first; i < share; i += step) {
    uint2 sum;
    if (!sum_word<T>(g, c, i, load_word(in, own_share + i), sum, patience)) {
      return;
    }
    ll_send_all(g, c, share + i, sum);
    store_word(out, own_share + i, sum);
  }
  delay_point(g, c, 2);
#pragma unroll 1
  for (std::uint32_t i = first; i < share; i += step) {
    for (int r0 = 0; r0 < g.size(); r0 += kBatch<kRanks>) {
      uint2 values[kBatch<kRanks>];
      if (!ll_receive(g, c, r0, share + i, values, patience)) {
        return;
      }
#pragma unroll
      for (int j = 0; j < kBatch<kRanks>; ++j) {
        if (is_peer(g, r0 + j)) {
          store_word(out, static_cast<std::uint32_t>(r0 + j) * share + i, values[j]);
        }
      }
    }
  }
}

void check_sum_view(DType dtype, const void* in, const void* out, std::int64_t bytes) {
  require(dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16, "dtype",
          "expected f32, f16 or bf16, got {}", to_string(dtype));
  const auto element = size_of(dtype);
  require(bytes == 0 || (in != nullptr && out != nullptr), "in, out", "null pointer");
  require(reinterpret_cast<std::uintptr_t>(in) % element == 0 &&
              reinterpret_cast<std::uintptr_t>(out) % element == 0 &&
              bytes % static_cast<std::int64_t>(element) == 0,
          "in, out", "expected whole, aligned elements");
}

}  // namespace

void load_reduce(int n) {
  const auto load_for = [n]<class T>(T*) {
    with_ranks(n, []<class Ranks>(Ranks) {
      constexpr int kRanks = Ranks::value;
      load(reduce_scatter_kernel<kRanks, FlatView, T>);
      load(reduce_scatter_kernel<kRanks, ByteView, T>);
      load(reduce_scatter_line_kernel<kRanks, FlatView, T>);
      load(all_reduce_kernel<kRanks, FlatView, T>);
      load(all_reduce_kernel<kRanks, ByteView, T>);
      load(all_reduce_two_step_kernel<kRanks, T>);
    });
    load(reduce_scatter_line_kernel<0, ByteView, T>);
  };
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    with_float_type(dtype, "dtype", load_for);
  }
}

void report_reduce(int n, std::vector<KernelInfo>& report) {
  with_ranks(n, [&](auto r) {
    report.push_back(describe("reduce_scatter bf16",
                              reduce_scatter_kernel<r(), FlatView, __nv_bfloat16>, kLlThreads));
    report.push_back(describe("reduce_scatter flag_line bf16",
                              reduce_scatter_line_kernel<r(), FlatView, __nv_bfloat16>,
                              kLineThreads<r()>));
    report.push_back(describe("all_reduce one step bf16",
                              all_reduce_kernel<r(), FlatView, __nv_bfloat16>, kLlThreads));
    report.push_back(describe("all_reduce two steps bf16",
                              all_reduce_two_step_kernel<r(), __nv_bfloat16>, kLlThreads));
  });
}

}  // namespace detail

using namespace detail;

void peer_reduce_scatter(const PeerTable& table, const AlongDim& dims, DType dtype, const void* in,
                         void* out, cudaStream_t stream, PeerPath path) {
  check_table(table);
  require(dims.outer >= 0 && dims.inner_bytes >= 0, "dims", "negative extent");
  const std::int64_t bytes = dims.outer * dims.inner_bytes;
  check_sum_view(dtype, in, out, bytes);
  const ByteView from(in, dims.outer, dims.inner_bytes, dims.full_outer_stride,
                      dims.full_rank_stride);
  const ByteView to(out, dims.outer, dims.inner_bytes, dims.share_outer_stride, 0);
  const std::int64_t words = words_of(bytes);
  const CallSignature signature =
      signature_of(PeerCall::reduce_scatter, dtype, dims, blocks_of(table));
  const PeerPath chosen =
      path == PeerPath::automatic ? choose_share_path(table.layout, bytes) : path;
  if (checked_path(table, chosen, words, "peer_reduce_scatter") == PeerPath::flag_line) {
    with_float_type(dtype, "dtype", [&]<class T>(T*) {
      with_views(from, to, [&]<class View>(const View& source, const View& target) {
        with_line_ranks<View>(table.size, [&](auto n) {
          const Grid grid = line_grid<n()>(words, table);
          launch(reduce_scatter_line_kernel<n(), View, T>, grid.blocks, grid.threads, stream,
                 Group<n()>(table, signature), source, target, static_cast<std::uint32_t>(words));
        });
      });
    });
    return;
  }
  const std::int64_t used = std::max<std::int64_t>(words, 1);  // an empty call signals nevertheless
  const Grid grid = ll_grid(used, table);
  with_float_type(dtype, "dtype", [&]<class T>(T*) {
    with_views(from, to, [&]<class View>(const View& source, const View& target) {
      with_ranks(table.size, [&](auto n) {
        launch(reduce_scatter_kernel<n(), View, T>, grid.blocks, grid.threads, stream,
               Group<n()>(table, signature), source, target, static_cast<std::uint32_t>(used));
      });
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
      words < table.size || words * 8 * (table.size - 1) <= path_sizes(table.size).one_step_sent;
  const bool one = one_step && words <= table.layout.ll_words;
  check_ll_words(table, one ? words : 2 * share, "peer_all_reduce");
  const ByteView from(in, 1, bytes, bytes, 0);
  const ByteView to(out, 1, bytes, bytes, 0);
  const Grid grid = ll_grid(one ? words : share, table);
  with_float_type(dtype, "dtype", [&]<class T>(T*) {
    with_ranks(table.size, [&](auto n) {
      const Group<n()> group(table,
                             signature_of(PeerCall::all_reduce, dtype, bytes, blocks_of(table)));
      if (!one) {
        launch(all_reduce_two_step_kernel<n(), T>, grid.blocks, grid.threads, stream, group, from,
               to, static_cast<std::uint32_t>(share));
        return;
      }
      with_views(from, to, [&]<class View>(const View& source, const View& target) {
        launch(all_reduce_kernel<n(), View, T>, grid.blocks, grid.threads, stream, group, source,
               target, static_cast<std::uint32_t>(words));
      });
    });
  });
}

}  // namespace cohort::cuda
