// SPDX-License-Identifier: Apache-2.0
#include "peer_launch.cuh"
#include "peer_sums.cuh"

// Reduce-scatter through flag words or lines.

namespace cohort::cuda {
namespace detail {
namespace {

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

template <int kRanks, class View, class T>
__global__ void __launch_bounds__(kLineThreads<kRanks>, 1)
    reduce_scatter_line_kernel(const __grid_constant__ Group<kRanks> g,
                               const __grid_constant__ View in, const __grid_constant__ View out,
                               std::uint32_t words) {
  Call c;
  const LineRole role(words);
  const auto word_for = [&](int rank, std::uint32_t word) { return load_word(in, word, rank); };
  const auto load = [&](std::uint32_t group) { return load_for_peers(g, words, group, word_for); };
  const FirstLines<kRanks> lines(g, role.leads(), role.first, words);
  const Found found = begin(g);
  const PeerLineWords<kRanks> first = load(role.ahead());  // while the epoch is on its way
  const auto send_ahead = [&](bool wanted) { lines.send(wanted, c, first); };
  if (!enter(g, found, c, 0, send_ahead)) {
    return;
  }
  const auto send = [&](std::uint32_t group, const PeerLineWords<kRanks>& loaded) {
    send_to_peers(g, c, words, group, loaded, word_for);
  };
  const auto send_first = [&] {
    if constexpr (kRanks == 0) {
      send(role.first, first);
    }
  };
  exchange_lines(
      g, c, role, send_first, load, send, [&](std::uint32_t group, std::uint32_t& missing) {
        LineWords<1> sum;
        const auto own = [&](std::uint32_t word) { return load_word(in, word, g.rank); };
        if (!sum_lines<T>(g, c, words, group, own, sum, missing)) {
          return false;
        }
        store_lines(words, group, sum,
                    [&](std::uint32_t word, uint2 value) { store_word(out, word, value); });
        return true;
      });
}

}  // namespace

void load_reduce(int n) {
  const auto load_for = [n]<class T>(T*) {
    with_ranks(n, []<class Ranks>(Ranks) {
      constexpr int kRanks = Ranks::value;
      load(reduce_scatter_kernel<kRanks, FlatView, T>);
      load(reduce_scatter_kernel<kRanks, ByteView, T>);
      load(reduce_scatter_line_kernel<kRanks, FlatView, T>);
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

}  // namespace cohort::cuda
