// SPDX-License-Identifier: Apache-2.0
#include <cuda.h>
#include <cuda_bf16.h>
#include <fmt/format.h>
#include <math_constants.h>

#include <vector>

#include "attention_splits.hpp"
#include "cohort/cuda/cuda_check.hpp"
#include "cohort/cuda/driver.hpp"
#include "cohort/error.hpp"
#include "cuda_kernels.hpp"
#include "wgmma.cuh"

// Attention of one token of each sequence over the latent cache: scores, an online softmax and
// weighted values in one kernel, split over the tokens, and one that combines the splits (T. Dao et
// al., "Flash-Decoding for long-context inference", 2023).
//
// A block takes 64 heads of a sequence and a range of its tokens, 64 at a time, which lie in shared
// memory once, as keys and as values. Its first warpgroup works out their weights; the two others
// add up half of the values each, while the first is at the next 64 tokens, and fetch those behind.

namespace decode_engine::kernels {

namespace {

constexpr int kTile = kAttentionTile;  // heads of a block, and tokens at a time
constexpr int kGroup = 128;            // threads of a warpgroup
constexpr int kThreads = 3 * kGroup;
constexpr unsigned kBlockBytes = kTile * wgmma::kBlockRowBytes;

// Barriers of a block.
constexpr int kWeighted = 1;  // weights are there
constexpr int kAdded = 2;     // values have been added: weights may be written
constexpr int kReleased = 3;  // of the two warpgroups: nobody reads the tile any more

/// Where queries and rows are fetched from.
struct Maps {
  CUtensorMap queries;  ///< [heads, batch, row]
  CUtensorMap rows;     ///< [batch * capacity, row]
};

template <int kLatentOf, int kRopeOf>
struct Shape {
  static constexpr int kLatent = kLatentOf;
  static constexpr int kRow = kLatentOf + kRopeOf;
  static constexpr int kBlocks = (kRow + wgmma::kBlockColumns - 1) / wgmma::kBlockColumns;
  static constexpr unsigned kTileBytes = kBlocks * kBlockBytes;
  /// Of a product of values. Where a warpgroup's half would be less, both do the same.
  static constexpr int kColumns = 128;
  static constexpr bool kHalves = kLatentOf >= 2 * kColumns;
  static constexpr int kParts = kHalves ? kLatentOf / 2 / kColumns : 1;
  /// Queries, two tiles of rows, weights, a number of each head, three arrivals, and room to align.
  static constexpr unsigned kShared = 3 * kTileBytes + kBlockBytes + kTile * 4 + 3 * 8 + 1024;
};

__device__ __forceinline__ float over_quad(float value, bool largest) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const float other = __shfl_xor_sync(0xffffffff, value, step);
    value = largest ? fmaxf(value, other) : value + other;
  }
  return value;
}

/// What a block works on, and where.
template <class S>
struct Work {
  unsigned queries, tiles, weights, arrivals;  ///< in shared memory; two tiles
  std::uint8_t* weights_at;
  float* of_heads;  ///< [64]: how much sums shrink, at the end the sum of weights
  int first_head, heads, split;
  std::int64_t sequence;
  int count;       ///< tokens of the sequence
  int begin, end;  ///< tiles

  __device__ Work(const Attention& a, const Splits& splits, std::uint8_t* shared) {
    const auto start = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    queries = (start + 1023) / 1024 * 1024;
    tiles = queries + S::kTileBytes;
    weights = tiles + 2 * S::kTileBytes;
    weights_at = shared + (weights - start);
    of_heads = reinterpret_cast<float*>(weights_at + kBlockBytes);
    arrivals = weights + kBlockBytes + kTile * 4;
    const int place = static_cast<int>(blockIdx.x);
    const int groups = (static_cast<int>(a.heads) + kTile - 1) / kTile;
    first_head = place % groups * kTile;
    heads = min(kTile, static_cast<int>(a.heads) - first_head);
    split = place / groups % splits.count;
    sequence = place / groups / splits.count;
    count = a.counts[sequence];
    begin = split * splits.tiles;
    end = min(begin + splits.tiles, (count + kTile - 1) / kTile);
  }
  [[nodiscard]] __device__ unsigned tile(int number) const {
    return tiles + static_cast<unsigned>((number - begin) & 1) * S::kTileBytes;
  }
  /// One thread: queries, in front of everything else.
  __device__ void fetch_queries(const Maps& maps) const {
    wgmma::expect(arrivals + 16, S::kTileBytes);
    for (int columns = 0; columns < S::kBlocks; ++columns) {
      wgmma::copy_box(queries + columns * kBlockBytes, maps.queries, columns * wgmma::kBlockColumns,
                      static_cast<int>(sequence), first_head, arrivals + 16);
    }
  }
  __device__ void fetch(const Attention& a, const Maps& maps, int number) const {
    const unsigned arrival = arrivals + static_cast<unsigned>((number - begin) & 1) * 8;
    wgmma::expect(arrival, S::kTileBytes);
    for (int columns = 0; columns < S::kBlocks; ++columns) {
      wgmma::copy_box(tile(number) + columns * kBlockBytes, maps.rows,
                      columns * wgmma::kBlockColumns,
                      static_cast<int>(sequence * a.capacity) + number * kTile, arrival);
    }
  }
  __device__ void wait_for_queries() const { wgmma::wait_for(arrivals + 16, 0); }
  __device__ void wait_for_tile(int number) const {
    const auto place = static_cast<unsigned>(number - begin);
    wgmma::wait_for(arrivals + (place & 1) * 8, place >> 1 & 1);
  }
  /// Of a head's results among those of all splits.
  [[nodiscard]] __device__ std::int64_t result(const Attention& a, int head) const {
    return (split * a.batch + sequence) * a.heads + first_head + head;
  }
};

/// The first of two heads that a thread has elements of; the other is 8 below.
__device__ __forceinline__ int upper_head() {
  return static_cast<int>(threadIdx.x) % kGroup / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4;
}
/// The first of two neighbouring columns that it has of each 8.
__device__ __forceinline__ int first_column() { return static_cast<int>(threadIdx.x) % 4 * 2; }

/// A power of two, by the hardware.
__device__ __forceinline__ float power(float exponent) {
  float result = 0;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(exponent));
  return result;
}

/// The first warpgroup: weighs the tokens.
template <class S>
__device__ __forceinline__ void weigh(const Attention& a, const Splits& splits,
                                      const Work<S>& work) {
  const float scale = static_cast<float>(a.scale * 1.4426950408889634);  // of base two
  float largest[2] = {-CUDART_INF_F, -CUDART_INF_F};
  float total[2] = {0, 0};
  if (work.begin < work.end) {
    work.wait_for_queries();
  }
  for (int tile = work.begin; tile < work.end; ++tile) {
    work.wait_for_tile(tile);
    float scores[32] = {};
    wgmma::pin(scores);
    wgmma::begin();
#pragma unroll
    for (int columns = 0; columns < S::kBlocks; ++columns) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const unsigned at = columns * kBlockBytes + step * 32;
        wgmma::multiply_async<0>(scores, wgmma::along_rows(work.queries + at),
                                 wgmma::along_rows(work.tile(tile) + at), columns + step > 0);
      }
    }
    wgmma::commit();
    wgmma::finish();
    wgmma::pin(scores);

    const int first = tile * kTile + first_column();
    float most[2] = {-CUDART_INF_F, -CUDART_INF_F};
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      scores[i] = first + i / 4 * 8 + i % 2 < work.count ? scores[i] : -CUDART_INF_F;
      most[i / 2 % 2] = fmaxf(most[i / 2 % 2], scores[i]);
    }
    float shrink[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float now = fmaxf(largest[half], over_quad(most[half], true));
      shrink[half] = power((largest[half] - now) * scale);
      largest[half] = now;
      total[half] *= shrink[half];
    }
    __nv_bfloat162 pairs[16];
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
      const int half = i / 2 % 2;
      const float base = largest[half] * scale;
      // Rounded as the product takes them, so that weights and their sum agree.
      pairs[i / 2] = __floats2bfloat162_rn(power(scores[i] * scale - base),
                                           power(scores[i + 1] * scale - base));
      total[half] += __low2float(pairs[i / 2]) + __high2float(pairs[i / 2]);
    }
    if (tile > work.begin) {
      wgmma::wait_at<kAdded, kThreads>();
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (first_column() == 0) {
        work.of_heads[upper_head() + 8 * half] = shrink[half];
      }
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      *reinterpret_cast<__nv_bfloat162*>(work.weights_at +
                                         wgmma::place_of(upper_head() + 8 * (i % 2), i / 2) +
                                         first_column() * 2) = pairs[i];
    }
    wgmma::publish();
    wgmma::arrive_at<kWeighted, kThreads>();
  }
  if (work.begin < work.end) {
    wgmma::wait_at<kAdded, kThreads>();
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = upper_head() + 8 * half;
    const float sum = over_quad(total[half], false);
    if (first_column() == 0) {
      work.of_heads[head] = sum;
      if (head < work.heads) {
        (splits.count == 1 ? a.lse : splits.lses)[work.result(a, head)] =
            sum > 0 ? largest[half] * static_cast<float>(a.scale) + logf(sum) : -CUDART_INF_F;
      }
    }
  }
  __syncthreads();
}

/// Each of the two others: adds up values. The first of their threads fetches queries and rows.
template <class S>
__device__ __forceinline__ void add_up(const Attention& a, const Splits& splits, const Maps& maps,
                                       const Work<S>& work) {
  const int own = S::kHalves ? (static_cast<int>(threadIdx.x) / kGroup - 1) * S::kParts : 0;
  const bool fetches = static_cast<int>(threadIdx.x) == kGroup && work.begin < work.end;
  if (fetches) {
    work.fetch_queries(maps);
    work.fetch(a, maps, work.begin);
    if (work.begin + 1 < work.end) {
      work.fetch(a, maps, work.begin + 1);
    }
  }
  __syncwarp();
  float out[S::kParts][64] = {};
  for (int tile = work.begin; tile < work.end; ++tile) {
    wgmma::wait_at<kWeighted, kThreads>();
    work.wait_for_tile(tile);
    const float shrink[2] = {work.of_heads[upper_head()], work.of_heads[upper_head() + 8]};
    if (__any_sync(0xffffffff, shrink[0] != 1 || shrink[1] != 1)) {
#pragma unroll
      for (int part = 0; part < S::kParts; ++part) {
#pragma unroll
        for (int i = 0; i < 64; ++i) {
          out[part][i] *= shrink[i / 2 % 2];
        }
      }
    }
#pragma unroll
    for (int part = 0; part < S::kParts; ++part) {
      wgmma::pin(out[part]);
    }
    wgmma::begin();
#pragma unroll
    for (int step = 0; step < kTile / 16; ++step) {
#pragma unroll
      for (int part = 0; part < S::kParts; ++part) {
        const int columns = (own + part) * S::kColumns / wgmma::kBlockColumns;
        wgmma::multiply_async<1>(out[part], wgmma::along_rows(work.weights + step * 32),
                                 wgmma::along_columns(work.tile(tile) + columns * kBlockBytes +
                                                          step * 16 * wgmma::kBlockRowBytes,
                                                      kBlockBytes),
                                 1);
      }
    }
    wgmma::commit();
    wgmma::finish();
#pragma unroll
    for (int part = 0; part < S::kParts; ++part) {
      wgmma::pin(out[part]);
    }
    wgmma::arrive_at<kAdded, kThreads>();
    if (tile + 2 < work.end) {
      wgmma::wait_at<kReleased, kThreads - kGroup>();
      if (fetches) {
        work.fetch(a, maps, tile + 2);
      }
      __syncwarp();
    }
  }
  __syncthreads();
  if (!S::kHalves && static_cast<int>(threadIdx.x) >= 2 * kGroup) {
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = upper_head() + 8 * half;
    if (head >= work.heads) {
      continue;
    }
    const float sum = work.of_heads[head];
    const float inverse = sum > 0 ? 1 / sum : 0;
    BFloat16* const to = a.out + ((work.first_head + head) * a.batch + work.sequence) * S::kLatent;
    float* const to_sums = splits.sums + work.result(a, head) * S::kLatent;
#pragma unroll
    for (int part = 0; part < S::kParts; ++part) {
#pragma unroll
      for (int i = 0; i < 64; i += 4) {
        const int column = (own + part) * S::kColumns + i * 2 + first_column();
        const float x = out[part][i + 2 * half] * inverse;
        const float y = out[part][i + 2 * half + 1] * inverse;
        if (column >= S::kLatent) {
          continue;
        }
        if (splits.count == 1) {
          *reinterpret_cast<__nv_bfloat162*>(to + column) = __floats2bfloat162_rn(x, y);
        } else {
          *reinterpret_cast<float2*>(to_sums + column) = make_float2(x, y);
        }
      }
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, 1)
    attend_kernel(const __grid_constant__ Attention a, const __grid_constant__ Splits splits,
                  const __grid_constant__ Maps maps) {
  extern __shared__ std::uint8_t shared[];
  const Work<S> work(a, splits, shared);
  if (threadIdx.x == 0) {
    for (unsigned i = 0; i < 3; ++i) {
      wgmma::set_up_arrival(work.arrivals + 8 * i);
    }
  }
  __syncthreads();
  if (threadIdx.x < kGroup) {
    weigh(a, splits, work);
  } else {
    add_up(a, splits, maps, work);
  }
}

constexpr int kCombining = 512;  // threads, of which 128 take 4 columns each of every fourth split

__device__ __forceinline__ float over_warp(float value, bool largest) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(0xffffffff, value, step);
    value = largest ? fmaxf(value, other) : value + other;
  }
  return value;
}

/// A block for each head of a sequence.
__global__ void __launch_bounds__(kCombining)
    combine_kernel(const __grid_constant__ Attention a, const __grid_constant__ Splits splits) {
  constexpr int kEach = kMostAttentionSplits / 32;  // of a lane
  constexpr int kSets = kCombining / 128;
  __shared__ float weights[kMostAttentionSplits];
  __shared__ float4 sums[kSets][128];
  const std::int64_t rows = a.batch * a.heads;
  const std::int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < 32) {
    float lses[kEach];
    float largest = -CUDART_INF_F;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int split = thread + 32 * i;
      lses[i] = split < splits.count ? splits.lses[split * rows + row] : -CUDART_INF_F;
      largest = fmaxf(largest, lses[i]);
    }
    largest = over_warp(largest, true);
    float total = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      lses[i] = largest == -CUDART_INF_F ? 0 : exp2f((lses[i] - largest) * 1.44269504F);
      total += lses[i];
    }
    total = over_warp(total, false);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      weights[thread + 32 * i] = total > 0 ? lses[i] / total : 0;
    }
    if (thread == 0) {
      a.lse[row] = total > 0 ? largest + logf(total) : -CUDART_INF_F;
    }
  }
  __syncthreads();
  const std::int64_t b = row / a.heads;
  const std::int64_t h = row % a.heads;
  const int set = thread / 128;
  const int column = thread % 128 * 4;
  float4 sum = make_float4(0, 0, 0, 0);
  if (column < a.latent) {
#pragma unroll 8
    for (int split = set; split < splits.count; split += kSets) {
      const float weight = weights[split];
      const float4 part =
          *reinterpret_cast<const float4*>(splits.sums + (split * rows + row) * a.latent + column);
      sum.x += weight * part.x;
      sum.y += weight * part.y;
      sum.z += weight * part.z;
      sum.w += weight * part.w;
    }
  }
  sums[set][thread % 128] = sum;
  __syncthreads();
  if (set == 0 && column < a.latent) {
#pragma unroll
    for (int other = 1; other < kSets; ++other) {
      const float4 part = sums[other][thread];
      sum.x += part.x;
      sum.y += part.y;
      sum.z += part.z;
      sum.w += part.w;
    }
    auto* const to =
        reinterpret_cast<__nv_bfloat162*>(a.out + (h * a.batch + b) * a.latent + column);
    to[0] = __floats2bfloat162_rn(sum.x, sum.y);
    to[1] = __floats2bfloat162_rn(sum.z, sum.w);
  }
}

/// With the kernel for these widths.
template <class Use>
void with_kernel(std::int64_t latent, std::int64_t rope, Use use) {
  if (latent == 512 && rope == 64) {
    use(attend_kernel<Shape<512, 64>>, Shape<512, 64>::kShared);
  } else if (latent == 64 && rope == 16) {
    use(attend_kernel<Shape<64, 16>>, Shape<64, 16>::kShared);
  } else {
    throw cohort::ConfigError(fmt::format(
        "a latent of {}+{}: attention on cards is there for 512+64 and 64+16", latent, rope));
  }
}

}  // namespace

void prepare_attention(std::int64_t latent, std::int64_t rope) {
  with_kernel(latent, rope, [](auto* kernel, unsigned shared) {
    cohort::cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(shared)),
                       "cudaFuncSetAttribute");
  });
}

namespace {

using Encode = decltype(&::cuTensorMapEncodeTiled);

/// Of bf16, the first extent lying without gaps. A box has 64 columns and 64 of the last extent, in
/// the order that products read.
CUtensorMap map_of(const BFloat16* data, std::vector<cuuint64_t> extents,
                   const std::vector<cuuint64_t>& strides) {
  static const Encode encode = [] {
    Encode found = nullptr;
    cohort::detail::load_driver_function("cuTensorMapEncodeTiled", found);
    return found;
  }();
  const std::vector<cuuint32_t> steps(extents.size(), 1);
  std::vector<cuuint32_t> box(extents.size(), 1);
  box.front() = wgmma::kBlockColumns;
  box.back() = kTile;
  CUtensorMap map{};
  const CUresult code =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, static_cast<cuuint32_t>(extents.size()),
             const_cast<BFloat16*>(data), extents.data(), strides.data(), box.data(), steps.data(),
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (code != CUDA_SUCCESS) {
    throw cohort::TransportError({.call = "cuTensorMapEncodeTiled", .native_code = code},
                                 "attention's rows or queries");
  }
  return map;
}

Maps maps_of(const Attention& a) {
  const auto row = static_cast<cuuint64_t>(a.latent + a.rope);
  const auto batch = static_cast<cuuint64_t>(a.batch);
  return {.queries = map_of(a.q, {row, batch, static_cast<cuuint64_t>(a.heads)},
                            {2 * row, 2 * row * batch}),
          .rows = map_of(a.cache, {row, batch * static_cast<cuuint64_t>(a.capacity)}, {2 * row})};
}

}  // namespace

void attend(const Attention& a, const Splits& splits, cudaStream_t stream) {
  const std::int64_t groups = (a.heads + kTile - 1) / kTile;
  with_kernel(a.latent, a.rope, [&](auto* kernel, unsigned shared) {
    kernel<<<static_cast<unsigned>(a.batch * groups * splits.count), kThreads, shared, stream>>>(
        a, splits, maps_of(a));
    cohort::cuda_check(cudaGetLastError(), "kernel launch");
  });
  if (splits.count > 1) {
    combine_kernel<<<static_cast<unsigned>(a.batch * a.heads), kCombining, 0, stream>>>(a, splits);
    cohort::cuda_check(cudaGetLastError(), "kernel launch");
  }
}

}  // namespace decode_engine::kernels
