// SPDX-License-Identifier: Apache-2.0
#include "cohort/cuda/path_sizes.hpp"
#include "peer_launch.cuh"
#include "peer_sums.cuh"

// All-reduce through flag words or lines, in one step or two.

namespace cohort::cuda {
namespace detail {
namespace {

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

/// In lines, in one step.
template <int kRanks, class View, class T>
__global__ void __launch_bounds__(kLineThreads<kRanks>, 1)
    all_reduce_line_kernel(const __grid_constant__ Group<kRanks> g, const __grid_constant__ View in,
                           const __grid_constant__ View out, std::uint32_t words, bool in_place) {
  __shared__ GroupsRead::Counts counts;
  Call c;
  const LineRole role(words);
  GroupsRead read(counts, in_place, role);
  const auto word_at = [&](std::uint32_t word) { return load_word(in, word); };
  const auto load = [&](std::uint32_t group) { return load_for_all(words, group, word_at); };
  const FirstLines<kRanks> lines(g, role.leads(), role.first, words);
  const Found found = begin(g);
  const LineWords<1> first = load(role.ahead());  // while the epoch is on its way
  const auto send_ahead = [&](bool wanted) { lines.send(wanted, c, first); };
  if (!enter(g, found, c, 0, send_ahead)) {
    return;
  }
  const auto send = [&](std::uint32_t group, const LineWords<1>& loaded) {
    send_to_all(g, c, words, group, group, loaded);
    read.add();
  };
  const auto send_first = [&] {
    if constexpr (kRanks > 0) {
      read.add();  // it is on its way
    } else {
      send(role.first, first);
    }
  };
  exchange_lines(
      g, c, role, send_first, load, send, [&](std::uint32_t group, std::uint32_t& missing) {
        LineWords<1> sum;
        if (!sum_lines<T>(g, c, words, group, word_at, sum, missing) || !read.has(group)) {
          return false;
        }
        store_lines(words, group, sum,
                    [&](std::uint32_t word, uint2 value) { store_word(out, word, value); });
        return true;
      });
}

/// What each rank has of an all-reduce in two steps: words [r*share, (r+1)*share), of which the
/// last ranks' may lie beyond the payload. Those are sent as zeros, and not stored.
template <class View>
struct Shares {
  View in;
  View out;
  std::uint32_t words;
  std::uint32_t share;

  __device__ __forceinline__ uint2 load(int rank, std::uint32_t word) const {
    const std::uint32_t at = static_cast<std::uint32_t>(rank) * share + word;
    return at < words ? load_word(in, at) : make_uint2(0, 0);
  }
  __device__ __forceinline__ void store(int rank, std::uint32_t word, uint2 value) const {
    const std::uint32_t at = static_cast<std::uint32_t>(rank) * share + word;
    if (at < words) {
      store_word(out, at, value);
    }
  }
};

/// Polls for the sums of a group of every peer's share and stores them. Returns as `poll_in_warp`.
template <int kRanks, class View>
__device__ __forceinline__ bool collect_sums(const Group<kRanks>& g, const Call& c,
                                             const Shares<View>& a, std::uint32_t group,
                                             std::uint32_t at, std::uint32_t& missing) {
  const LinePart part(group);
  for (int r0 = 0; r0 < g.size(); r0 += kBatch<kRanks>) {
    uint4 values[kBatch<kRanks>] = {};
    if (!receive_lines(g, c, r0, LinePart(at), part.line * kLineWords < a.share, values, missing)) {
      return false;
    }
#pragma unroll
    for (int j = 0; j < kBatch<kRanks>; ++j) {
      if (is_peer(g, r0 + j)) {
        store_lines(a.share, group, {{low(values[j])}, {high(values[j])}},
                    [&](std::uint32_t word, uint2 value) { a.store(r0 + j, word, value); });
      }
    }
  }
  return true;
}

/// In lines, in two steps. The sums' lines follow those of the first step in each lane. A warp
/// passes on the very group that it has summed, so a block waits for its peers' block of the same
/// number alone. In place no thread overwrites what is still to be sent: a peer's sum of a group
/// has needed this rank's part of it.
template <int kRanks, class View, class T>
__global__ void __launch_bounds__(kLineThreads<kRanks>, 1)
    all_reduce_two_step_line_kernel(const __grid_constant__ Group<kRanks> g,
                                    const __grid_constant__ Shares<View> a) {
  Call c;
  const LineRole role(a.share);
  const auto word_for = [&](int rank, std::uint32_t word) { return a.load(rank, word); };
  const auto load = [&](std::uint32_t group) {
    return load_for_peers(g, a.share, group, word_for);
  };
  const FirstLines<kRanks> lines(g, role.leads(), role.first, a.share);
  const Found found = begin(g);
  const PeerLineWords<kRanks> first = load(role.ahead());  // while the epoch is on its way
  const auto send_ahead = [&](bool wanted) { lines.send(wanted, c, first); };
  if (!enter(g, found, c, 0, send_ahead)) {
    return;
  }
  const auto send = [&](std::uint32_t group, const PeerLineWords<kRanks>& loaded) {
    send_to_peers(g, c, a.share, group, loaded, word_for);
  };
  const auto send_first = [&] {
    if constexpr (kRanks == 0) {
      send(role.first, first);
    }
  };
  const bool summed = exchange_lines(
      g, c, role, send_first, load, send, [&](std::uint32_t group, std::uint32_t& missing) {
        LineWords<1> sum;
        const auto own = [&](std::uint32_t word) { return a.load(g.rank, word); };
        if (!sum_lines<T>(g, c, a.share, group, own, sum, missing)) {
          return false;
        }
        send_to_all(g, c, a.share, group, role.groups + group, sum);
        store_lines(a.share, group, sum,
                    [&](std::uint32_t word, uint2 value) { a.store(g.rank, word, value); });
        return true;
      });
  if (!summed) {
    return;
  }
  delay_point(g, c, 2);
  // Those that have sent help to collect.
  const std::uint32_t warps = workers() / kWarp;
  receive_all(g, c, threadIdx.x / kWarp * gridDim.x + blockIdx.x, warps * gridDim.x, role.groups,
              [&](std::uint32_t group, std::uint32_t& missing) {
                return collect_sums(g, c, a, group, role.groups + group, missing);
              });
}

/// Kernels in lines for the numbers of ranks that cards come in; one for all others, and for other
/// views, speaks the same protocol.
template <class View, class Call>
void with_common_ranks(int n, const Call& call) {
  with_card_ranks<std::is_same_v<View, FlatView>>(n, call);
}

/// The same for two steps, which two ranks never take.
template <class View, class Call>
void with_common_larger_ranks(int n, const Call& call) {
  with_common_ranks<View>(n, [&](auto ranks) {
    if constexpr (ranks() != 2) {
      call(ranks);
    }
  });
}

template <class View, class T>
void load_lines_for(int n) {
  with_common_ranks<View>(n, [](auto r) { load(all_reduce_line_kernel<r(), View, T>); });
  with_common_larger_ranks<View>(
      n, [](auto r) { load(all_reduce_two_step_line_kernel<r(), View, T>); });
}

}  // namespace

void load_all_reduce(int n) {
  const auto load_for = [n]<class T>(T*) {
    with_ranks(n, []<class Ranks>(Ranks) {
      constexpr int kRanks = Ranks::value;
      load(all_reduce_kernel<kRanks, FlatView, T>);
      load(all_reduce_kernel<kRanks, ByteView, T>);
      load(all_reduce_two_step_kernel<kRanks, T>);
    });
    load_lines_for<FlatView, T>(n);
    load_lines_for<ByteView, T>(n);
  };
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    with_float_type(dtype, "dtype", load_for);
  }
}

void report_all_reduce(int n, std::vector<KernelInfo>& report) {
  with_ranks(n, [&](auto r) {
    report.push_back(describe("all_reduce one step bf16",
                              all_reduce_kernel<r(), FlatView, __nv_bfloat16>, kLlThreads));
    report.push_back(describe("all_reduce two steps bf16",
                              all_reduce_two_step_kernel<r(), __nv_bfloat16>, kLlThreads));
  });
  with_common_ranks<FlatView>(n, [&](auto r) {
    report.push_back(describe("all_reduce flag_line bf16",
                              all_reduce_line_kernel<r(), FlatView, __nv_bfloat16>,
                              kLineThreads<r()>));
  });
  with_common_larger_ranks<FlatView>(n, [&](auto r) {
    report.push_back(describe("all_reduce flag_line two steps bf16",
                              all_reduce_two_step_line_kernel<r(), FlatView, __nv_bfloat16>,
                              kLineThreads<r()>));
  });
}

namespace {

bool overlap(const void* a, const void* b, std::int64_t bytes) {
  const auto first = reinterpret_cast<std::uintptr_t>(a);
  const auto second = reinterpret_cast<std::uintptr_t>(b);
  const auto size = static_cast<std::uintptr_t>(bytes);
  return first < second + size && second < first + size;
}

template <class T>
void all_reduce_in_words(const PeerTable& table, CallSignature signature, const ByteView& from,
                         const ByteView& to, std::int64_t words, bool two_steps,
                         cudaStream_t stream) {
  const std::int64_t share = ceil_div(words, table.size);
  const Grid grid = ll_grid(two_steps ? share : words, table);
  with_ranks(table.size, [&](auto n) {
    const Group<n()> group(table, signature);
    if (two_steps) {
      launch(all_reduce_two_step_kernel<n(), T>, grid.blocks, grid.threads, stream, group, from, to,
             static_cast<std::uint32_t>(share));
      return;
    }
    with_views(from, to, [&]<class View>(const View& source, const View& target) {
      launch(all_reduce_kernel<n(), View, T>, grid.blocks, grid.threads, stream, group, source,
             target, static_cast<std::uint32_t>(words));
    });
  });
}

template <class T>
void all_reduce_in_lines(const PeerTable& table, CallSignature signature, const ByteView& from,
                         const ByteView& to, std::int64_t words, bool two_steps,
                         cudaStream_t stream) {
  const bool in_place = overlap(from.base, to.base, from.total);
  with_views(from, to, [&]<class View>(const View& source, const View& target) {
    if (!two_steps) {
      with_common_ranks<View>(table.size, [&](auto n) {
        const Grid grid = line_grid<n()>(words, table);
        launch(all_reduce_line_kernel<n(), View, T>, grid.blocks, grid.threads, stream,
               Group<n()>(table, signature), source, target, static_cast<std::uint32_t>(words),
               in_place);
      });
      return;
    }
    const std::int64_t share = ceil_div(words, table.size);
    const Shares<View> shares{source, target, static_cast<std::uint32_t>(words),
                              static_cast<std::uint32_t>(share)};
    with_common_larger_ranks<View>(table.size, [&](auto n) {
      const Grid grid = line_grid<n()>(share, table);
      launch(all_reduce_two_step_line_kernel<n(), View, T>, grid.blocks, grid.threads, stream,
             Group<n()>(table, signature), shares);
    });
  });
}

}  // namespace

}  // namespace detail

using namespace detail;

static_assert(kLineGroupPayload == 8 * kGroupWords);

void peer_all_reduce(const PeerTable& table, std::int64_t count, DType dtype, const void* in,
                     void* out, cudaStream_t stream, PeerPath path, std::int64_t form) {
  check_table(table);
  require(count >= 0, "count", "negative");
  const std::int64_t bytes = count * static_cast<std::int64_t>(size_of(dtype));
  check_sum_view(dtype, in, out, bytes);
  const AllReducePlan plan = choose_all_reduce_plan(table.layout, bytes, path);
  require(plan.fits, "peer_all_reduce",
          "needs room for {} bytes a peer, or twice a rank's share, the inbox has {} of flag words "
          "and {} of flag lines",
          bytes, table.layout.flag_word_capacity(), table.layout.flag_line_capacity());
  const std::int64_t words = std::max<std::int64_t>(words_of(bytes), 1);
  const ByteView from(in, 1, bytes, bytes, 0);
  const ByteView to(out, 1, bytes, bytes, 0);
  const CallSignature signature =
      signature_of(PeerCall::all_reduce, dtype, bytes, blocks_of(table), form);
  with_float_type(dtype, "dtype", [&]<class T>(T*) {
    if (plan.lines) {
      all_reduce_in_lines<T>(table, signature, from, to, words, plan.two_steps, stream);
    } else {
      all_reduce_in_words<T>(table, signature, from, to, words, plan.two_steps, stream);
    }
  });
}

}  // namespace cohort::cuda
