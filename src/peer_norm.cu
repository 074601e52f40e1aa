// SPDX-License-Identifier: Apache-2.0
#include <limits>
#include <type_traits>

#include "cohort/cuda/block_budget.hpp"
#include "norm_launch.cuh"
#include "peer_launch.cuh"
#include "peer_sums.cuh"

// All-reduce with residual and RMS norm, through flag words or lines in one step.

namespace cohort::cuda {
namespace detail {
namespace {

/// Where group `at` of a lane lies in flag words: a thread's first word, and its second behind the
/// warp's first ones, so that a warp's store has no gaps. Threads with one word send a second all
/// the same: a place that a call passes over is not wiped (see `keep_books`).
__device__ __forceinline__ std::uint32_t norm_place(std::uint32_t at) {
  return at * (2 * kWarp) + threadIdx.x % kWarp;
}
constexpr std::int64_t kSecondPlace = std::int64_t{16} * kWarp;

template <int kRanks, bool kLines>
__device__ __forceinline__ void send_norm_group(const Group<kRanks>& g, const Call& c,
                                                std::uint32_t at, const LineWords<1>& loaded) {
  if constexpr (kLines) {
    __syncwarp();
    const LinePart part(at);
    const std::int64_t place = line_own_place(g, c, part);
#pragma unroll
    for (int k = 1; k < g.size(); ++k) {
      line_store(g.peers[k] + place, loaded.first[0], loaded.second[0], c, part);
    }
  } else {
    const std::int64_t place = ll_own_place(g, c, norm_place(at));
#pragma unroll
    for (int k = 1; k < g.size(); ++k) {
      ll_store(g.peers[k] + place, loaded.first[0], c.flag);
      ll_store(g.peers[k] + place + kSecondPlace, loaded.second[0], c.flag);
    }
  }
}

/// Where a warp's first group goes in every peer's inbox, worked out before `begin`.
template <int kRanks, bool kLines>
class FirstNormGroup {
 public:
  /// @param any  Whether the warp has groups.
  /// @param at   The first one's place in each lane.
  __device__ __forceinline__ FirstNormGroup(const Group<kRanks>& g, bool any, std::uint32_t at)
      : any_(any), places_(g, any, at) {}
  /// Sends it as soon as the epoch is there, in a whole warp.
  __device__ __forceinline__ void send(bool wanted, const Call& c,
                                       const LineWords<1>& loaded) const {
    places_.send(wanted && any_, c, loaded);
  }

 private:
  struct InLines : FirstLines<kRanks> {
    __device__ __forceinline__ InLines(const Group<kRanks>& g, bool any, std::uint32_t at)
        : FirstLines<kRanks>(g, any, at, ~0U) {}
  };
  struct InWords : FirstPlaces<kRanks> {
    __device__ __forceinline__ InWords(const Group<kRanks>& g, bool, std::uint32_t at)
        : FirstPlaces<kRanks>(g, norm_place(at)) {}
    __device__ __forceinline__ void send(bool wanted, const Call& c,
                                         const LineWords<1>& loaded) const {
#pragma unroll
      for (int k = 1; k < kRanks; ++k) {
        this->store_if(wanted, c, k, loaded.first[0]);
        this->store_if(wanted, c, k, loaded.second[0], kSecondPlace);
      }
    }
  };
  bool any_;
  std::conditional_t<kLines, InLines, InWords> places_;
};

/// Polls for a warp's part of a group of each of the ranks [first, first + kBatch) but this one.
/// Returns as `poll_in_warp`.
template <int kRanks, bool kLines>
__device__ __forceinline__ bool receive_norm_group(const Group<kRanks>& g, const Call& c, int first,
                                                   std::uint32_t at,
                                                   uint4 (&values)[kBatch<kRanks>],
                                                   std::uint32_t& missed) {
  if constexpr (kRanks == 2) {  // one peer, and registers for one
    const int peer = g.rank ^ 1;
    const LinePart part(at);
    const std::byte* const from =
        g.own() + (kLines ? line_place(g, c, peer, part) : ll_place(g, c, peer, norm_place(at)));
    uint4 value = {};
    uint4 second = {};
    const bool there = poll_in_warp(missed, [&] {
      value = ll_load(from);
      if constexpr (kLines) {
        return line_differs(value, c, part) != 0 ? 1U << peer : 0U;
      }
      second = ll_load(from + kSecondPlace);
      return (ll_differs(value, c) | ll_differs(second, c)) != 0 ? 1U << peer : 0U;
    });
    values[0] = values[1] = kLines ? value : make_uint4(value.x, value.z, second.x, second.z);
    return there;
  } else if constexpr (kLines) {
    return receive_lines(g, c, first, LinePart(at), true, values, missed);
  } else {
    const std::byte* const lane = g.own() + ll_place(g, c, first, norm_place(at));
    const std::int64_t lane_bytes = std::int64_t{g.ll_words} * 16;
    uint4 second[kBatch<kRanks>] = {};
    const bool there = poll_in_warp(missed, [&] {
      std::uint32_t missing = 0;
#pragma unroll
      for (int j = 0; j < kBatch<kRanks>; ++j) {
        ll_load_if(is_peer(g, first + j), lane + j * lane_bytes, values[j]);
        ll_load_if(is_peer(g, first + j), lane + j * lane_bytes + kSecondPlace, second[j]);
      }
#pragma unroll
      for (int j = 0; j < kBatch<kRanks>; ++j) {
        const bool differs =
            is_peer(g, first + j) && (ll_differs(values[j], c) | ll_differs(second[j], c)) != 0;
        missing |= differs ? 1U << (first + j) : 0U;
      }
      return missing;
    });
#pragma unroll
    for (int j = 0; j < kBatch<kRanks>; ++j) {
      values[j] = make_uint4(values[j].x, values[j].z, second[j].x, second[j].z);
    }
    return there;
  }
}

/// A thread's words of the ranks' sum of a group, in rank order. Returns as `poll_in_warp`.
template <int kRanks, bool kLines, class T>
__device__ __forceinline__ bool sum_norm_group(const Group<kRanks>& g, const Call& c,
                                               std::uint32_t at, const LineWords<1>& own,
                                               LineWords<1>& sum, std::uint32_t& missing) {
  const bool flag = LinePart(at).flag;
  Sum<T> first;
  Sum<T> second;
  for (int r0 = 0; r0 < g.size(); r0 += kBatch<kRanks>) {
    uint4 values[kBatch<kRanks>] = {};
    if (!receive_norm_group<kRanks, kLines>(g, c, r0, at, values, missing)) {
      return false;
    }
#pragma unroll
    for (int j = 0; j < kBatch<kRanks>; ++j) {
      if (r0 + j < g.size()) {
        const bool mine = r0 + j == g.rank;
        first.add(mine ? own.first[0] : low(values[j]));
        second.add(mine ? own.second[0] : high(values[j]));
      }
    }
  }
  sum.first[0] = first.result();
  sum.second[0] = flag ? make_uint2(0, 0) : second.result();  // a line has its flag there
  return true;
}

/// Everyone sends all rows to everyone; the blocks that send a row also sum and norm it.
template <int kRanks, bool kLines, class T>
__global__ void __launch_bounds__(kNormThreads, 1)
    all_reduce_norm_kernel(const __grid_constant__ Group<kRanks> g,
                           const __grid_constant__ NormTask a) {
  constexpr bool kAligned = kRanks > 0;
  __shared__ NormShared shared;
  open_norm(a, shared, a.cluster > 1 ? workers() : 0);
  Call c;
  const NormPart part(a, workers() / kWarp);
  const std::uint32_t first_row = blockIdx.x >> a.cluster;
  const std::uint32_t step = gridDim.x >> a.cluster;
  const bool any = threadIdx.x < workers() && part.first < a.groups;
  const FirstNormGroup<kRanks, kLines> first_group(g, any, first_row * a.groups + part.first);
  const Found found = begin(g);
  // While the epoch is on its way.
  const LineWords<1> own =
      load_norm_group<kAligned>(a, a.x + first_row * a.row_bytes, part.first, any);
  NormAhead ahead = NormAhead::load<kAligned>(a, first_row, part.first, any);
  const float inverse_scale = load_inverse_scale(a);
  bool good = enter(g, found, c, kLines ? 0 : a.rows * a.groups * (2 * kWarp),
                    [&](bool wanted) { first_group.send(wanted, c, own); });
  if (threadIdx.x >= workers()) {
    return;
  }
  // From here on no warp leaves before the others of its row: they wait for each other.
  const auto x_at = [&](std::uint32_t row, std::uint32_t group) {
    return row == first_row && group == part.first
               ? own
               : load_norm_group<kAligned>(a, a.x + row * a.row_bytes, group);
  };
  if (good) {
#pragma unroll 1
    for (std::uint32_t row = first_row; row < a.rows; row += step) {
#pragma unroll 1
      for (std::uint32_t group = part.first; group < a.groups; group += part.step) {
        if (kRanks == 0 || row != first_row || group != part.first) {  // it is on its way
          send_norm_group<kRanks, kLines>(g, c, row * a.groups + group, x_at(row, group));
        }
      }
    }
  }
  await_opened(a);
  delay_point(g, c, 1);
  Patience patience;
  std::uint32_t turn = 0;
#pragma unroll 1
  for (std::uint32_t row = first_row; row < a.rows; row += step, turn ^= 1) {
    if (row != first_row) {
      ahead = NormAhead::load<kAligned>(a, row, part.first, any);
    }
    const bool normed = norm_row<kAligned, T>(
        a, shared, turn, row, part, ahead, inverse_scale,
        [&](std::uint32_t group, LineWords<1>& sum) {
          const LineWords<1> mine = x_at(row, group);
          std::uint32_t missing = 0;
          while (good && !sum_norm_group<kRanks, kLines, T>(g, c, row * a.groups + group, mine, sum,
                                                            missing)) {
            good = !patience.is_over_in_warp(g, c, missing);
          }
          return good;
        });
    if (!normed) {
      return;
    }
  }
}

/// Kernels for the numbers of ranks and the types that engines have; one for all others, and for
/// rows that are not aligned, speaks the same protocol.
template <class T, class Call>
void with_norm_ranks(int n, const Call& call) {
  with_card_ranks<!std::is_same_v<T, float>>(n, call);
}

}  // namespace

void load_norm(int n) {
  const auto load_for = [n]<class T>(T*) {
    with_norm_ranks<T>(n, [](auto r) {
      load(all_reduce_norm_kernel<r(), false, T>);
      load(all_reduce_norm_kernel<r(), true, T>);
    });
  };
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    with_float_type(dtype, "dtype", load_for);
  }
}

void report_norm(int n, std::vector<KernelInfo>& report) {
  with_norm_ranks<__nv_bfloat16>(n, [&](auto r) {
    report.push_back(describe("all_reduce_rms_norm bf16",
                              all_reduce_norm_kernel<r(), false, __nv_bfloat16>, kNormThreads));
    report.push_back(describe("all_reduce_rms_norm flag_line bf16",
                              all_reduce_norm_kernel<r(), true, __nv_bfloat16>, kNormThreads));
  });
}

}  // namespace detail

using namespace detail;

ClusterRoom norm_cluster_room(int n) {
  if (!launches_programmatically()) {
    return {};
  }
  constexpr int kAny = std::numeric_limits<int>::max();
  ClusterRoom room{kAny, kAny, kAny};
  const auto look = [&](int ranks) {
    with_norm_ranks<__nv_bfloat16>(ranks, [&](auto r) {
      room = least(room, cluster_room(all_reduce_norm_kernel<r(), false, __nv_bfloat16>));
      room = least(room, cluster_room(all_reduce_norm_kernel<r(), true, __nv_bfloat16>));
    });
  };
  look(n);
  look(0);  // of other types and rows that are not aligned
  return room;
}

static_assert(NormShape::kGroupWords == kGroupWords);

void peer_all_reduce_rms_norm(const PeerTable& table, const Norm& norm, cudaStream_t stream,
                              PeerPath path) {
  check_table(table);
  check_norm(norm);
  require(norm.shape.rows > 0, "rows", "expected at least one");
  const NormPlan plan = choose_norm_plan(table.layout, norm.shape, path);
  require(plan.fits, "peer_all_reduce_rms_norm",
          "needs room for {} flag words or {} flag lines a peer, the inbox has {} and {}",
          norm_words(norm.shape), norm_lines(norm.shape), table.layout.ll_words,
          table.layout.lines);
  const int most = blocks_of(table);
  const NormGrid grid = norm_grid(norm.shape, most, most / 2, table.max_clusters);
  const NormTask task(norm, static_cast<int>(grid.blocks_of_row));
  const CallSignature signature = signature_of(norm.shape, norm.epsilon, most);
  const int threads = norm_threads(norm.shape, grid, kNormThreads / static_cast<int>(kWarp) - 1) +
                      static_cast<int>(kWarp);
  with_float_type(norm.shape.dtype, "dtype", [&]<class T>(T*) {
    with_norm_ranks<T>(task.aligned ? table.size : 0, [&](auto n) {
      launch_rows(
          plan.lines ? all_reduce_norm_kernel<n(), true, T> : all_reduce_norm_kernel<n(), false, T>,
          grid, threads, stream, Group<n()>(table, signature), task);
    });
  });
}

}  // namespace cohort::cuda
