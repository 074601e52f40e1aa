// SPDX-License-Identifier: Apache-2.0
#include <cuda_fp8.h>

#include <bit>

#include "peer_launch.cuh"
#include "peer_sums.cuh"

// All-reduce with residual and RMS norm, through flag words or lines in one step, and the norm
// alone.

namespace cohort::cuda {
namespace detail {
namespace {

/// Most threads of a block: a few warps for each scheduler, because what a block does takes as long
/// as it has instructions to issue.
constexpr int kNormThreads = 512;

/// What a norm's kernels are told beside the group.
struct NormTask {
  const std::byte* x;
  std::byte* residual;
  const std::byte* weight;
  std::byte* out;
  const float* scale;  ///< Null for an output in the type of the sum.
  std::int64_t row_bytes;
  std::int64_t out_row_bytes;
  float epsilon;
  float inverse_hidden;
  std::uint32_t rows;
  std::uint32_t hidden;
  std::uint32_t words;    ///< Of a row.
  std::uint32_t groups;   ///< Of a row.
  std::uint32_t cluster;  ///< The blocks of a row, as a power of two: those of a cluster.
  bool aligned;           ///< Rows are whole words, and begin where words may lie.

  NormTask(const Norm& n, int blocks_of_row)
      : x(static_cast<const std::byte*>(n.x)),
        residual(static_cast<std::byte*>(n.residual)),
        weight(static_cast<const std::byte*>(n.weight)),
        out(static_cast<std::byte*>(n.out)),
        scale(n.shape.out_dtype == n.shape.dtype ? nullptr : n.scale),
        row_bytes(n.shape.row_bytes()),
        out_row_bytes(n.shape.hidden * static_cast<std::int64_t>(size_of(n.shape.out_dtype))),
        epsilon(n.epsilon),
        inverse_hidden(1.0F / static_cast<float>(n.shape.hidden)),
        rows(static_cast<std::uint32_t>(n.shape.rows)),
        hidden(static_cast<std::uint32_t>(n.shape.hidden)),
        words(static_cast<std::uint32_t>(n.shape.row_words())),
        groups(static_cast<std::uint32_t>(n.shape.groups())),
        cluster(static_cast<std::uint32_t>(std::countr_zero(static_cast<unsigned>(blocks_of_row)))),
        aligned(row_bytes % 8 == 0 && is_aligned<uint2>(n.x) && is_aligned<uint2>(n.residual) &&
                is_aligned<uint2>(n.weight) &&
                // Eight bytes of the sum are eight of the output, or as many as they have elements.
                reinterpret_cast<std::uintptr_t>(n.out) %
                        (scale == nullptr ? 8 : 8 / size_of(n.shape.dtype)) ==
                    0) {}

  __device__ __forceinline__ bool is_fp8() const { return scale != nullptr; }
  /// Blocks of a row.
  __device__ __forceinline__ std::uint32_t blocks() const { return 1U << cluster; }
};

/// A word of a row of which `bytes` are left from there on. Where the number of ranks is a
/// constant everything is aligned.
template <bool kAligned>
__device__ __forceinline__ uint2 load_norm_word(const NormTask& a, const std::byte* row,
                                                std::uint32_t word) {
  const std::byte* const at = row + std::int64_t{8} * word;
  if (kAligned || a.aligned) {
    return *reinterpret_cast<const uint2*>(at);
  }
  return low(load_unaligned(
      at, static_cast<unsigned>(min(std::int64_t{8}, a.row_bytes - std::int64_t{8} * word))));
}

template <bool kAligned>
__device__ __forceinline__ void store_norm_word(const NormTask& a, std::byte* row,
                                                std::uint32_t word, uint2 value) {
  std::byte* const at = row + std::int64_t{8} * word;
  if (kAligned || a.aligned) {
    *reinterpret_cast<uint2*>(at) = value;
    return;
  }
  store_unaligned(
      at, join(value, make_uint2(0, 0)),
      static_cast<unsigned>(min(std::int64_t{8}, a.row_bytes - std::int64_t{8} * word)));
}

/// A thread's words of a group of a row, zeros beyond it; all zeros unless wanted.
template <bool kAligned>
__device__ __forceinline__ LineWords<1> load_norm_group(const NormTask& a, const std::byte* row,
                                                        std::uint32_t group, bool wanted = true) {
  return load_for_all(wanted ? a.words : 0, group,
                      [&](std::uint32_t word) { return load_norm_word<kAligned>(a, row, word); });
}

template <class T>
__device__ __forceinline__ uint2 add_words(uint2 a, uint2 b) {
  float x[Word<T>::kElements];
  float y[Word<T>::kElements];
  Word<T>::unpack(a, x);
  Word<T>::unpack(b, y);
#pragma unroll
  for (int k = 0; k < Word<T>::kElements; ++k) {
    x[k] = __fadd_rn(x[k], y[k]);
  }
  return Word<T>::pack(x);
}

template <class T>
__device__ __forceinline__ float add_squares(float sum, uint2 word) {
  float x[Word<T>::kElements];
  Word<T>::unpack(word, x);
#pragma unroll
  for (int k = 0; k < Word<T>::kElements; ++k) {
    sum = __fmaf_rn(x[k], x[k], sum);
  }
  return sum;
}

/// Of a warp's values, in all of its threads alike.
__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int distance = static_cast<int>(kWarp) / 2; distance > 0; distance /= 2) {
    value = __fadd_rn(value, __shfl_xor_sync(kFullWarp, value, distance));
  }
  return value;
}

/// To the nearest, within the largest; NaN stays.
__device__ __forceinline__ std::uint16_t to_e4m3(float low, float high) {
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}

/// Stores what a word of the residual becomes.
template <bool kAligned, class T>
__device__ __forceinline__ void store_normed(const NormTask& a, std::byte* row, std::uint32_t word,
                                             uint2 residual, uint2 weight, float factor,
                                             float inverse_scale) {
  constexpr int kElements = Word<T>::kElements;
  float x[kElements];
  float w[kElements];
  Word<T>::unpack(residual, x);
  Word<T>::unpack(weight, w);
#pragma unroll
  for (int k = 0; k < kElements; ++k) {
    x[k] = __fmul_rn(__fmul_rn(x[k], factor), w[k]);
  }
  if (!a.is_fp8()) {
    store_norm_word<kAligned>(a, row, word, Word<T>::pack(x));
    return;
  }
#pragma unroll
  for (int k = 0; k < kElements; ++k) {
    x[k] = __fmul_rn(x[k], inverse_scale);
  }
  std::byte* const at = row + std::int64_t{kElements} * word;
  std::uint32_t bits = to_e4m3(x[0], x[1]);
  if constexpr (kElements == 4) {
    bits |= static_cast<std::uint32_t>(to_e4m3(x[2], x[3])) << 16;
  }
  if (kAligned || a.aligned) {
    if constexpr (kElements == 4) {
      *reinterpret_cast<std::uint32_t*>(at) = bits;
    } else {
      *reinterpret_cast<std::uint16_t*>(at) = static_cast<std::uint16_t>(bits);
    }
    return;
  }
  store_unaligned(at, make_uint4(bits, 0, 0, 0),
                  min(static_cast<unsigned>(kElements), a.hidden - kElements * word));
}

/// The sums of a row's groups in shared memory, each its own copy in every block of the row: a sum
/// and its tag in eight bytes, which whoever needs it awaits. A barrier would wait for all stores
/// that the blocks have under way, those to peers too.
///
/// Rows take one of two places by turns. Whoever is a row ahead has the sums of the row before from
/// all warps, which have then read those of the row before that.
struct NormShared {
  std::uint64_t sums[2][kMostNormGroups];
};

/// Of a sum that a failed wait has kept from coming.
constexpr std::uint32_t kNoSum = ~0U;

/// In a block of the row's cluster, or the only block.
__device__ __forceinline__ void store_in_block(std::uint64_t* own, std::uint32_t block,
                                               std::uint64_t value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .u32 a; mapa.shared::cluster.u32 a,%0,%1; st.relaxed.cluster.shared::cluster.u64 "
      "[a],%2;}" ::"r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(own))),
      "r"(block), "l"(value)
      : "memory");
#else
  *const_cast<volatile std::uint64_t*>(own) = value;
#endif
}

/// In all threads of a block, first of all: no sum is there yet.
__device__ __forceinline__ void open_norm(const NormTask& a, NormShared& shared) {
  for (std::uint32_t i = threadIdx.x; i < 2 * a.groups; i += blockDim.x) {
    shared.sums[i & 1U][i >> 1] = 0;
  }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (a.cluster != 0) {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");  // nothing else is under way
    return;
  }
#endif
  __syncthreads();
}
/// In the threads that go on, before they store in other blocks.
__device__ __forceinline__ void await_opened(const NormTask& a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (a.cluster != 0) {
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
  }
#endif
}

/// By a whole warp: the sum of a group of row `row`, or that there will be none.
__device__ __forceinline__ void publish(const NormTask& a, std::uint64_t* sum, std::uint32_t row,
                                        bool good, float value) {
  const std::uint32_t tag = good ? row + 1 : kNoSum;
  if (threadIdx.x % kWarp < a.blocks()) {
    store_in_block(sum, threadIdx.x % kWarp, (std::uint64_t{tag} << 32) | __float_as_uint(value));
  }
}

/// By a whole warp: waits for all sums of a row, those that will not come as well, because no block
/// may end before all have stored what they store in it. Their sum, in all threads; false if some
/// will not come.
__device__ __forceinline__ bool await_sums(const NormTask& a, const std::uint64_t* sums,
                                           std::uint32_t row, float& total) {
  bool good = true;
  float mine = 0.0F;
#pragma unroll 1
  for (std::uint32_t group = threadIdx.x % kWarp; group < a.groups; group += kWarp) {
    std::uint64_t sum = 0;
    std::uint32_t tag = 0;
    do {
      sum = *const_cast<const volatile std::uint64_t*>(&sums[group]);
      tag = static_cast<std::uint32_t>(sum >> 32);
    } while (tag != row + 1 && tag != kNoSum);
    good = good && tag != kNoSum;
    mine = __fadd_rn(mine, __uint_as_float(static_cast<std::uint32_t>(sum)));
  }
  total = sum_of_warp(mine);
  return __all_sync(kFullWarp, good) != 0;
}

/// Which groups of a row are a warp's.
struct NormPart {
  std::uint32_t first;
  std::uint32_t step;

  __device__ __forceinline__ NormPart(const NormTask& a, std::uint32_t warps)
      : first(((threadIdx.x / kWarp) << a.cluster) + (blockIdx.x & (a.blocks() - 1))),
        step(warps << a.cluster) {}
};

/// What a warp has loaded of its first group of a row, before it has the sum.
struct NormAhead {
  LineWords<1> residual;
  LineWords<1> weight;

  template <bool kAligned>
  static __device__ __forceinline__ NormAhead load(const NormTask& a, std::uint32_t row,
                                                   std::uint32_t group, bool wanted) {
    return {load_norm_group<kAligned>(a, a.residual + row * a.row_bytes, group, wanted),
            load_norm_group<kAligned>(a, a.weight, group, wanted)};
  }
};

/// Adds a warp's part of a row to its residual and norms it. The sums of squares go by `turn`,
/// which alternates from row to row. False in all threads of the row's blocks if the sum of a group
/// failed in any.
///
/// @param sum_at  `sum_at(group, sum)` gives a thread's words of a group of the ranks' sum; false
/// if
///                that failed, alike in a warp.
template <bool kAligned, class T, class SumAt>
__device__ __forceinline__ bool norm_row(const NormTask& a, NormShared& shared, std::uint32_t turn,
                                         std::uint32_t row, const NormPart& part,
                                         const NormAhead& ahead, float inverse_scale,
                                         const SumAt& sum_at) {
  std::byte* const residual = a.residual + row * a.row_bytes;
  std::uint64_t* const sums = shared.sums[turn];
  LineWords<1> kept = {};
#pragma unroll 1
  for (std::uint32_t group = part.first; group < a.groups; group += part.step) {
    LineWords<1> sum = {};
    const bool first = group == part.first;
    const LineWords<1> before =
        first ? ahead.residual : load_norm_group<kAligned>(a, residual, group);
    const bool good = sum_at(group, sum);
    sum.first[0] = add_words<T>(sum.first[0], before.first[0]);
    sum.second[0] = add_words<T>(sum.second[0], before.second[0]);
    publish(a, &sums[group], row, good,
            sum_of_warp(add_squares<T>(add_squares<T>(0.0F, sum.first[0]), sum.second[0])));
    if (good) {
      store_lines(a.words, group, sum, [&](std::uint32_t word, uint2 value) {
        store_norm_word<kAligned>(a, residual, word, value);
      });
    }
    if (first) {
      kept = sum;
    }
  }
  float total = 0.0F;
  if (!await_sums(a, sums, row, total)) {
    return false;
  }
  const float factor = rsqrtf(__fadd_rn(__fmul_rn(total, a.inverse_hidden), a.epsilon));
  std::byte* const out = a.out + row * a.out_row_bytes;
#pragma unroll 1
  for (std::uint32_t group = part.first; group < a.groups; group += part.step) {
    const bool first = group == part.first;
    // What this thread has stored there.
    const LineWords<1> value = first ? kept : load_norm_group<kAligned>(a, residual, group);
    const LineWords<1> weight =
        first ? ahead.weight : load_norm_group<kAligned>(a, a.weight, group);
    const LinePart words(group);
    if (words.word < a.words) {
      store_normed<kAligned, T>(a, out, words.word, value.first[0], weight.first[0], factor,
                                inverse_scale);
    }
    if (!words.flag && words.word + 1 < a.words) {
      store_normed<kAligned, T>(a, out, words.word + 1, value.second[0], weight.second[0], factor,
                                inverse_scale);
    }
  }
  return true;
}

__device__ __forceinline__ float load_inverse_scale(const NormTask& a) {
  return a.is_fp8() ? __frcp_rn(*a.scale) : 1.0F;
}

template <bool kAligned, class T>
__global__ void __launch_bounds__(kNormThreads, 1) norm_kernel(const __grid_constant__ NormTask a) {
  __shared__ NormShared shared;
  open_norm(a, shared);
  const NormPart part(a, blockDim.x / kWarp);
  await_predecessor();
  await_opened(a);
  const float inverse_scale = load_inverse_scale(a);
  const std::uint32_t step = gridDim.x >> a.cluster;
  std::uint32_t turn = 0;
#pragma unroll 1
  for (std::uint32_t row = blockIdx.x >> a.cluster; row < a.rows; row += step, turn ^= 1) {
    const std::byte* const x = a.x + row * a.row_bytes;
    const bool any = part.first < a.groups;
    const LineWords<1> first = load_norm_group<kAligned>(a, x, part.first, any);
    const NormAhead ahead = NormAhead::load<kAligned>(a, row, part.first, any);
    static_cast<void>(norm_row<kAligned, T>(a, shared, turn, row, part, ahead, inverse_scale,
                                            [&](std::uint32_t group, LineWords<1>& sum) {
                                              sum = group == part.first
                                                        ? first
                                                        : load_norm_group<kAligned>(a, x, group);
                                              return true;
                                            }));
  }
}

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
  open_norm(a, shared);
  Call c;
  const NormPart part(a, workers() / kWarp);
  const std::uint32_t first_row = blockIdx.x >> a.cluster;
  const std::uint32_t step = gridDim.x >> a.cluster;
  const bool any = threadIdx.x < workers() && part.first < a.groups;
  const Found found = begin(g);
  // While the epoch is on its way.
  const LineWords<1> own =
      load_norm_group<kAligned>(a, a.x + first_row * a.row_bytes, part.first, any);
  NormAhead ahead = NormAhead::load<kAligned>(a, first_row, part.first, any);
  const float inverse_scale = load_inverse_scale(a);
  bool good = enter(g, found, c, kLines ? 0 : a.rows * a.groups * (2 * kWarp));
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
        send_norm_group<kRanks, kLines>(g, c, row * a.groups + group, x_at(row, group));
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

void check_norm(const Norm& norm) {
  if (auto text = norm_obstacle(norm.shape); !text.empty()) {
    throw UsageError(text);
  }
  require(norm.shape.rows == 0 || (norm.x != nullptr && norm.residual != nullptr &&
                                   norm.weight != nullptr && norm.out != nullptr),
          "x, residual, weight, out", "null pointer");
  require((norm.shape.out_dtype == norm.shape.dtype) == (norm.scale == nullptr), "scale",
          "expected one for an output in f8_e4m3 alone");
  const auto element = size_of(norm.shape.dtype);
  for (const void* const data : {norm.x, static_cast<const void*>(norm.residual), norm.weight}) {
    require(reinterpret_cast<std::uintptr_t>(data) % element == 0, "x, residual, weight",
            "expected aligned elements");
  }
}

/// Threads of a block, with `warps` at most: a warp for each of its groups of a row while there are
/// so many, and as many groups for each of them beyond.
int norm_threads(const NormShape& shape, const NormGrid& grid, int warps) {
  const std::int64_t groups = ceil_div(shape.groups(), grid.blocks_of_row);
  return static_cast<int>(ceil_div(groups, ceil_div(groups, warps)) * kWarp);
}

/// One launch of clusters, one for each row or for some of them.
template <class... Params, class... Args>
void launch_rows(void (*kernel)(Params...), const NormGrid& grid, int threads, cudaStream_t stream,
                 const Args&... args) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(grid.blocks_of_row), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.rows * grid.blocks_of_row));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = grid.blocks_of_row > 1 ? 2 : launches_programmatically() ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...),
             "cudaLaunchKernelEx");
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

void load_local_norm() {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    with_float_type(dtype, "dtype", []<class T>(T*) {
      load(norm_kernel<false, T>);
      load(norm_kernel<true, T>);
    });
  }
}

void report_norm(int n, std::vector<KernelInfo>& report) {
  with_norm_ranks<__nv_bfloat16>(n, [&](auto r) {
    report.push_back(describe("all_reduce_rms_norm bf16",
                              all_reduce_norm_kernel<r(), false, __nv_bfloat16>, kNormThreads));
    report.push_back(describe("all_reduce_rms_norm flag_line bf16",
                              all_reduce_norm_kernel<r(), true, __nv_bfloat16>, kNormThreads));
  });
  report.push_back(describe("rms_norm bf16", norm_kernel<true, __nv_bfloat16>, kNormThreads));
}

}  // namespace detail

using namespace detail;

static_assert(NormShape::kGroupWords == kGroupWords);

void rms_norm(const Norm& norm, cudaStream_t stream) {
  check_norm(norm);
  if (norm.shape.rows == 0) {
    return;
  }
  constexpr std::int64_t kMaxBlocks = 1056;  // several for each multiprocessor of a large card
  constexpr std::int64_t kAtOnce = 128;      // nothing is waited for that is not of the row
  const NormGrid grid =
      norm_grid(norm.shape, kMaxBlocks, launches_programmatically() ? kAtOnce : 0);
  const NormTask task(norm, static_cast<int>(grid.blocks_of_row));
  const int threads = norm_threads(norm.shape, grid, kNormThreads / static_cast<int>(kWarp));
  with_float_type(norm.shape.dtype, "dtype", [&]<class T>(T*) {
    launch_rows(task.aligned ? norm_kernel<true, T> : norm_kernel<false, T>, grid, threads, stream,
                task);
  });
}

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
  const NormGrid grid = norm_grid(norm.shape, most, launches_programmatically() ? most / 2 : 0);
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
