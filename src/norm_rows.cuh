// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "norm_task.cuh"

// A row normed by the warps that have its groups, of one block or of a cluster.

namespace cohort::cuda::detail {

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

/// Where sums lie in shared memory.
__device__ __forceinline__ std::uint32_t place_of(const std::uint64_t* sums) {
  auto place = static_cast<std::uint32_t>(__cvta_generic_to_shared(sums));
  asm volatile("" : "+r"(place));  // worked out here, and not where it is waited for
  return place;
}
/// In a block of the row's cluster, or the only block.
__device__ __forceinline__ void store_in_block(std::uint32_t place, std::uint32_t block,
                                               std::uint64_t value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .u32 a; mapa.shared::cluster.u32 a,%0,%1; st.relaxed.cluster.shared::cluster.u64 "
      "[a],%2;}" ::"r"(place),
      "r"(block), "l"(value)
      : "memory");
#else
  asm volatile("st.volatile.shared.u64 [%0],%1;" ::"r"(place), "l"(value) : "memory");
#endif
}
__device__ __forceinline__ std::uint64_t load_in_block(std::uint32_t place) {
  std::uint64_t value;
  asm volatile("ld.volatile.shared.u64 %0,[%1];" : "=l"(value) : "r"(place) : "memory");
  return value;
}

/// In all threads of a block, first of all: no sum is there yet. In a cluster those that opened see
/// to it, and wait until what they have stored is there; the others are not kept waiting.
__device__ __forceinline__ void open_norm(const NormTask& a, NormShared& shared,
                                          std::uint32_t first_opener) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (a.cluster != 0 && threadIdx.x < first_opener) {
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
    return;
  }
#endif
  const std::uint32_t first = a.cluster != 0 ? first_opener : 0;
  for (std::uint32_t i = threadIdx.x - first; i < 2 * a.groups; i += blockDim.x - first) {
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
__device__ __forceinline__ void publish(const NormTask& a, std::uint32_t place, std::uint32_t row,
                                        bool good, float value) {
  const std::uint32_t tag = good ? row + 1 : kNoSum;
  if (threadIdx.x % kWarp < a.blocks()) {
    store_in_block(place, threadIdx.x % kWarp, (std::uint64_t{tag} << 32) | __float_as_uint(value));
  }
}

/// By a whole warp: waits for all sums of a row, those that will not come as well, because no block
/// may end before all have stored what they store in it. Their sum, in all threads; false if some
/// will not come.
__device__ __forceinline__ bool await_sums(const NormTask& a, std::uint32_t sums, std::uint32_t row,
                                           float& total) {
  bool good = true;
  float mine = 0.0F;
#pragma unroll 1
  for (std::uint32_t group = threadIdx.x % kWarp; group < a.groups; group += kWarp) {
    std::uint64_t sum = 0;
    std::uint32_t tag = 0;
    do {
      sum = load_in_block(sums + 8 * group);
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
  const std::uint32_t sums = place_of(shared.sums[turn]);
  const auto add = [&](std::uint32_t group, const LineWords<1>& before) {
    LineWords<1> sum = {};
    const bool good = sum_at(group, sum);
    sum.first[0] = add_words<T>(sum.first[0], before.first[0]);
    sum.second[0] = add_words<T>(sum.second[0], before.second[0]);
    publish(a, sums + 8 * group, row, good,
            sum_of_warp(add_squares<T>(add_squares<T>(0.0F, sum.first[0]), sum.second[0])));
    if (good) {
      store_lines(a.words, group, sum, [&](std::uint32_t word, uint2 value) {
        store_norm_word<kAligned>(a, residual, word, value);
      });
    }
    return sum;
  };
  // A warp's first group, which is its only one where the row is shared out, by itself: nothing is
  // chosen between what is at hand and what has to be loaded.
  LineWords<1> kept = {};
  if (part.first < a.groups) {
    kept = add(part.first, ahead.residual);
  }
#pragma unroll 1
  for (std::uint32_t group = part.first + part.step; group < a.groups; group += part.step) {
    add(group, load_norm_group<kAligned>(a, residual, group));
  }
  float total = 0.0F;
  if (!await_sums(a, sums, row, total)) {
    return false;
  }
  const float factor = rsqrtf(__fadd_rn(__fmul_rn(total, a.inverse_hidden), a.epsilon));
  std::byte* const out = a.out + row * a.out_row_bytes;
  const auto norm = [&](std::uint32_t group, const LineWords<1>& value,
                        const LineWords<1>& weight) {
    const LinePart words(group);
    if (words.word < a.words) {
      store_normed<kAligned, T>(a, out, words.word, value.first[0], weight.first[0], factor,
                                inverse_scale);
    }
    if (!words.flag && words.word + 1 < a.words) {
      store_normed<kAligned, T>(a, out, words.word + 1, value.second[0], weight.second[0], factor,
                                inverse_scale);
    }
  };
  if (part.first < a.groups) {
    norm(part.first, kept, ahead.weight);
  }
#pragma unroll 1
  for (std::uint32_t group = part.first + part.step; group < a.groups; group += part.step) {
    // What this thread has stored there.
    norm(group, load_norm_group<kAligned>(a, residual, group),
         load_norm_group<kAligned>(a, a.weight, group));
  }
  return true;
}

__device__ __forceinline__ float load_inverse_scale(const NormTask& a) {
  return a.is_fp8() ? __frcp_rn(*a.scale) : 1.0F;
}

}  // namespace cohort::cuda::detail
