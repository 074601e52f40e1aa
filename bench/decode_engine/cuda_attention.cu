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
// memory once, as keys and as values, in one of three places. Its first warpgroup, which holds the
// queries in registers, works out the weights of tokens, and puts them where the rotated part of
// their keys was, which nobody reads any more. The two others add up half of the values each; a
// warp of theirs fetches. Two blocks with heads of one sequence are a cluster, each of which
// fetches half of the tokens for both.
//
// What bounds this are the tensor cores, for which a tile is 2176 cycles of work, and shared
// memory, of which its products read 160 KiB at 128 bytes a cycle; queries from there would be 64
// KiB more. So that tensor cores have work while the first warpgroup is at its exponentials, values
// are added up behind the scores of the next tokens, and not beside them.

namespace decode_engine::kernels {

namespace {

constexpr int kTile = kAttentionTile;  // heads of a block, and tokens at a time
constexpr int kPlaces = 3;             // for tokens
constexpr int kGroup = 128;            // threads of a warpgroup
constexpr int kThreads = 3 * kGroup;
constexpr unsigned kBlockBytes = kTile * wgmma::kBlockRowBytes;

/// Registers of a thread that weighs or adds up; all begin with 168.
constexpr int kWeighing = 184;
constexpr int kAdding = 160;
static_assert(kWeighing + 2 * kAdding <= 3 * 168);

constexpr int kWeighingBarrier = 1;

/// Blocks of a cluster at most.
constexpr unsigned kMostBlocks = 2;

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
  static_assert(kLatentOf % wgmma::kBlockColumns == 0 && kRopeOf <= wgmma::kBlockColumns);
  static constexpr unsigned kTileBytes = kBlocks * kBlockBytes;
  /// Of a product of values. Where a warpgroup's half would be less, both do the same.
  static constexpr bool kHalves = kLatentOf == 512;
  static constexpr int kColumns = kHalves ? 256 : 64;
  /// Of the 16 columns of queries that a product of scores takes, those without the rotated ones:
  /// as many as registers hold, and at most one more.
  static constexpr int kSteps = (kBlocks - 1) * 4;
  static constexpr int kHeld = kSteps < 31 ? kSteps : 31;
  static_assert(kSteps - kHeld <= 1);
  /// Parts of a tile that arrive by themselves.
  static constexpr int kChunks = kBlocks % 3 == 0 ? 3 : 1;
  static constexpr int kChunkBlocks = kBlocks / kChunks;
  /// Where the columns of a step begin.
  static constexpr unsigned step(int number) {
    return static_cast<unsigned>(number) / 4 * kBlockBytes + static_cast<unsigned>(number) % 4 * 32;
  }
  /// Tiles of rows; of queries the rotated part and what registers do not hold; numbers of heads;
  /// arrivals.
  static constexpr unsigned kApartBytes = kTile * 32;
  static constexpr unsigned kShared = kPlaces * kTileBytes + kBlockBytes + kApartBytes +
                                      kPlaces * kTile * 4 + ((2 + kChunks) * kPlaces + 1) * 8;
};

__device__ __forceinline__ float over_quad(float value, bool largest) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const float other = __shfl_xor_sync(0xffffffff, value, step);
    value = largest ? fmaxf(value, other) : value + other;
  }
  return value;
}

/// A tile's place, and how often it was used before: an even number of times, or an odd one.
struct Place {
  unsigned index = 0, phase = 0;
  __device__ __forceinline__ void advance() {
    if (++index == kPlaces) {
      index = 0;
      phase ^= 1;
    }
  }
  [[nodiscard]] __device__ __forceinline__ Place last() const {
    return {index == 0 ? kPlaces - 1 : index - 1, 0};
  }
};

/// The first of two heads that a thread has elements of; the other is 8 below.
__device__ __forceinline__ unsigned upper_head() {
  return wgmma::thread() % kGroup / 32 * 16 + wgmma::thread() % 32 / 4;
}
/// The first of two neighbouring columns that it has of each 8.
__device__ __forceinline__ unsigned first_column() { return wgmma::thread() % 4 * 2; }
/// Where the row of 16 columns begins, in a block of 64, whose address a lane gives.
__device__ __forceinline__ unsigned place_of_part(unsigned columns16) {
  const unsigned thread = wgmma::thread() % kGroup;
  return wgmma::place_of(thread / 32 * 16 + thread % 16, thread % 32 / 16) ^ columns16 * 32;
}

/// A block's sequence, heads and split.
struct Share {
  std::int64_t sequence;
  int first_head, heads, split;

  __device__ __forceinline__ Share(const Attention& a, const Splits& splits) {
    const int place = static_cast<int>(wgmma::block());
    const int groups = (static_cast<int>(a.heads) + kTile - 1) / kTile;
    first_head = place % groups * kTile;
    heads = min(kTile, static_cast<int>(a.heads) - first_head);
    split = place / groups % splits.count;
    sequence = place / groups / splits.count;
  }
  /// Of a head's results among those of all splits.
  [[nodiscard]] __device__ __forceinline__ std::int64_t result(const Attention& a, int head) const {
    return (split * a.batch + sequence) * a.heads + first_head + head;
  }
};

/// How much there is to do, and where it lies in shared memory.
template <class S>
struct Work {
  unsigned tiles;
  int first, end;  ///< tiles
  int count;       ///< tokens of the sequence

  __device__ __forceinline__ Work(const Attention& a, const Splits& splits,
                                  const std::uint8_t* shared) {
    tiles = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    const Share share(a, splits);
    count = a.counts[share.sequence];
    first = share.split * splits.tiles;
    end = min(first + splits.tiles, (count + kTile - 1) / kTile);
  }
  [[nodiscard]] __device__ __forceinline__ unsigned tile(Place place) const {
    return tiles + place.index * S::kTileBytes;
  }
  /// Where those of a tile lie, in the place of its last columns.
  [[nodiscard]] __device__ __forceinline__ unsigned weights(Place place) const {
    return tile(place) + (S::kBlocks - 1) * kBlockBytes;
  }
  /// Whose address a lane gives, in front of all tiles.
  [[nodiscard]] __device__ __forceinline__ unsigned queries(int step) const {
    return tile({kPlaces - 1}) + static_cast<unsigned>(step) / 4 * kBlockBytes +
           place_of_part(static_cast<unsigned>(step) % 4);
  }
  /// Of queries.
  [[nodiscard]] __device__ __forceinline__ unsigned rotated() const {
    return tiles + kPlaces * S::kTileBytes;
  }
  [[nodiscard]] __device__ __forceinline__ unsigned apart() const {
    return rotated() + kBlockBytes;
  }
  /// Of heads: how much sums shrink, at the end the sum of weights.
  [[nodiscard]] __device__ __forceinline__ unsigned numbers(Place place) const {
    return apart() + S::kApartBytes + place.index * kTile * 4;
  }
  // Arrivals: rows, their weights, the end of their use, and queries.
  [[nodiscard]] __device__ __forceinline__ unsigned weighed(Place place) const {
    return numbers({}) + kPlaces * kTile * 4 + place.index * 8;
  }
  [[nodiscard]] __device__ __forceinline__ unsigned released(Place place) const {
    return weighed(place) + kPlaces * 8;
  }
  [[nodiscard]] __device__ __forceinline__ unsigned queried() const {
    return weighed({}) + 2 * kPlaces * 8;
  }
  [[nodiscard]] __device__ __forceinline__ unsigned fetched(Place place, unsigned chunk) const {
    return queried() + 8 + (place.index * S::kChunks + chunk) * 8;
  }
  __device__ void set_up() const {
    const unsigned blocks = wgmma::blocks_of_cluster();
    for (Place place; place.phase == 0; place.advance()) {
      for (unsigned chunk = 0; chunk < S::kChunks; ++chunk) {
        wgmma::set_up_arrival(fetched(place, chunk), 1);
      }
      wgmma::set_up_arrival(weighed(place), 4);
      wgmma::set_up_arrival(released(place), 8 * blocks);
    }
    wgmma::set_up_arrival(queried(), 1);
    wgmma::publish_arrivals();
  }
  /// Of a warp, which has done with a place: so many parts of those that a warpgroup has.
  __device__ __forceinline__ void release(Place place, unsigned parts) const {
    __syncwarp();
    if (const unsigned block = threadIdx.x % 32; block < wgmma::blocks_of_cluster()) {
      wgmma::arrive_in(block, released(place), parts);
    }
    __syncwarp();
  }
};

/// A power of two, by the hardware.
__device__ __forceinline__ float power(float exponent) {
  float result = 0;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(exponent));
  return result;
}

/// What the warp that fetches does next.
template <class S>
struct Fetching {
  Place place;
  int tile;
  int first_row;

  __device__ __forceinline__ Fetching(const Attention& a, const Splits& splits, const Work<S>& work)
      : tile(work.first), first_row(static_cast<int>(Share(a, splits).sequence * a.capacity)) {}
  [[nodiscard]] __device__ __forceinline__ bool ready(const Work<S>& work) const {
    return __all_sync(0xffffffff, wgmma::ended(work.released(place), phase())) != 0;
  }
  __device__ __forceinline__ void wait(const Work<S>& work) const {
    wgmma::wait_for(work.released(place), phase());
  }
  /// Queries lie where the third tile will. A lane copies 64 columns.
  __device__ __forceinline__ void queries(const Attention& a, const Splits& splits,
                                          const Maps& maps, const Work<S>& work) const {
    const Share share(a, splits);
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (lane == 0) {
      wgmma::expect(work.queried(), S::kTileBytes);
    }
    __syncwarp();
    if (lane < S::kBlocks) {
      wgmma::copy_box(lane + 1 < S::kBlocks
                          ? work.tile({kPlaces - 1}) + static_cast<unsigned>(lane) * kBlockBytes
                          : work.rotated(),
                      maps.queries, lane * wgmma::kBlockColumns, static_cast<int>(share.sequence),
                      share.first_head, work.queried());
    }
    __syncwarp();
  }
  __device__ __forceinline__ void next(const Maps& maps, const Work<S>& work) {
    const unsigned lane = threadIdx.x % 32;
    const unsigned arrival = work.fetched(place, lane / S::kChunkBlocks);
    if (lane < S::kChunks) {
      wgmma::expect(work.fetched(place, lane), S::kChunkBlocks * kBlockBytes);
    }
    __syncwarp();
    const int row = first_row + tile * kTile;
    const int column = static_cast<int>(lane) * wgmma::kBlockColumns;
    const unsigned to = work.tile(place) + lane * kBlockBytes;
    const unsigned blocks = wgmma::blocks_of_cluster();
    if (lane < S::kBlocks && lane % blocks == wgmma::block_in_cluster()) {
      if (blocks == 1) {
        wgmma::copy_box(to, maps.rows, column, row, arrival);
      } else {
        wgmma::copy_box_to(3, to, maps.rows, column, row, arrival);
      }
    }
    __syncwarp();
    ++tile;
    place.advance();
  }

 private:
  /// The last place was used by the queries before.
  [[nodiscard]] __device__ __forceinline__ unsigned phase() const {
    return place.index == kPlaces - 1 ? place.phase : place.phase ^ 1;
  }
};

/// The first warpgroup: weighs the tokens.
template <class S>
__device__ __forceinline__ void weigh(const Attention& a, const Splits& splits, float scale,
                                      const std::uint8_t* shared, const Work<S>& work) {
  float largest[2] = {-CUDART_INF_F, -CUDART_INF_F};
  float total[2] = {0, 0};
  unsigned queries[S::kHeld][4];
  if (work.first < work.end) {
    wgmma::wait_for(work.queried(), 0);
#pragma unroll
    for (int step = 0; step < S::kHeld; ++step) {
      wgmma::load_parts(queries[step], work.queries(step));
    }
    if constexpr (S::kHeld < S::kSteps) {
      unsigned apart[4];
      wgmma::load_parts(apart, work.queries(S::kHeld));
      wgmma::store_parts(
          work.apart() + wgmma::place_of_32(wgmma::thread() / 32 * 16 + wgmma::thread() % 16,
                                            wgmma::thread() % 32 / 16),
          apart);
      wgmma::publish();
      wgmma::wait_at<kWeighingBarrier, kGroup>();
    }
    work.release({kPlaces - 1}, 2);
  }
  float scores[32] = {};
  Place place;
  bool waits = false;  // weights
  for (int tiles = work.end - work.first; tiles > 0; --tiles) {
    const std::uint64_t keys = wgmma::along_rows(work.tile(place));
    const std::uint64_t rotated = wgmma::along_rows(work.rotated());
    wgmma::pin(scores);
#pragma unroll
    for (int step = 0; step < S::kSteps + 4; ++step) {
      if (step % (4 * S::kChunkBlocks) == 0) {
        const unsigned arrival = work.fetched(place, step / (4 * S::kChunkBlocks));
        // Where the next tokens are not there yet, those before are not kept waiting.
        if (waits && !__all_sync(0xffffffff, wgmma::ended(arrival, place.phase))) {
          if (wgmma::thread() % 32 == 0) {
            wgmma::arrive(work.weighed(place.last()));
          }
          __syncwarp();
          waits = false;
        }
        wgmma::wait_for(arrival, place.phase);
        wgmma::begin();
      }
      if (step < S::kHeld) {
        wgmma::multiply_async(scores, queries[step], wgmma::behind(keys, S::step(step)), step > 0);
      } else if (step < S::kSteps) {
        wgmma::multiply_async(scores, wgmma::along_rows_of_32(work.apart()),
                              wgmma::behind(keys, S::step(step)));
      } else {
        wgmma::multiply_async(scores, wgmma::behind(rotated, (step - S::kSteps) * 32),
                              wgmma::behind(keys, S::step(step)));
      }
      if (step == S::kHeld - 1 || step + 1 == S::kSteps + 4) {
        wgmma::commit();
      }
    }
    wgmma::finish<1>();
    if (waits && wgmma::thread() % 32 == 0) {
      wgmma::arrive(work.weighed(place.last()));
    }
    __syncwarp();
    wgmma::finish();
    wgmma::pin(scores);

    if (tiles == 1) {
      const Work<S> whole(a, splits, shared);
      const int left = whole.count - (whole.end - 1) * kTile;  // tokens
      const int column = static_cast<int>(first_column());
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        scores[i] = i / 4 * 8 + column + i % 2 < left ? scores[i] : -CUDART_INF_F;
      }
    }
    float most[2] = {-CUDART_INF_F, -CUDART_INF_F};
#pragma unroll
    for (int i = 0; i < 32; ++i) {
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
    unsigned weights[4][4];
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
      const int half = i / 2 % 2;
      const float base = largest[half] * scale;
      // Rounded as the product takes them, so that weights and their sum agree.
      const __nv_bfloat162 pair = __floats2bfloat162_rn(power(scores[i] * scale - base),
                                                        power(scores[i + 1] * scale - base));
      total[half] += __low2float(pair) + __high2float(pair);
      weights[i / 8][i / 2 % 4] = reinterpret_cast<const unsigned&>(pair);
    }
    // Nobody multiplies with what lies in the place of weights.
    wgmma::wait_at<kWeighingBarrier, kGroup>();
#pragma unroll
    for (unsigned half = 0; half < 2; ++half) {
      if (first_column() == 0) {
        wgmma::store(work.numbers(place) + 4 * (upper_head() + 8 * half), shrink[half]);
      }
    }
#pragma unroll
    for (int columns = 0; columns < 4; ++columns) {
      wgmma::store_parts(work.weights(place) + place_of_part(columns), weights[columns]);
    }
    wgmma::publish();
    __syncwarp();
    if (wgmma::thread() % 32 == 0 && tiles == 1) {
      wgmma::arrive(work.weighed(place));
    }
    __syncwarp();
    waits = true;
    place.advance();
  }
  __syncthreads();
  const Share share(a, splits);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = static_cast<int>(upper_head()) + 8 * half;
    const float sum = over_quad(total[half], false);
    if (first_column() == 0) {
      wgmma::store(work.numbers({}) + 4 * static_cast<unsigned>(head), sum);
      if (head < share.heads) {
        (splits.count == 1 ? a.lse : splits.lses)[share.result(a, head)] =
            sum > 0 ? largest[half] * static_cast<float>(a.scale) + logf(sum) : -CUDART_INF_F;
      }
    }
  }
  __syncthreads();
}

/// Each of the two others: adds up values. The first of their warps fetches.
template <class S>
__device__ __forceinline__ void add_up(const Attention& a, const Splits& splits, const Maps& maps,
                                       const Work<S>& work) {
  constexpr int kElements = S::kColumns / 2;
  const int own = S::kHalves ? (static_cast<int>(threadIdx.x) / kGroup - 1) * S::kColumns : 0;
  const bool fetches = threadIdx.x / 32 == kGroup / 32;
  Fetching<S> fetching(a, splits, work);
  if (fetches && work.first < work.end) {
    fetching.queries(a, splits, maps, work);
    while (fetching.tile < min(work.first + kPlaces - 1, work.end)) {
      fetching.next(maps, work);
    }
  }
  float out[kElements] = {};
  Place place;
  for (int tile = work.first; tile < work.end; ++tile) {
    if (fetches && fetching.tile < work.end) {
      // As soon as there is room, but nothing waits for it.
      while (!__all_sync(0xffffffff, wgmma::ended(work.weighed(place), place.phase))) {
        if (fetching.tile < work.end && fetching.ready(work)) {
          fetching.next(maps, work);
        }
      }
    }
    wgmma::wait_for(work.weighed(place), place.phase);
    const float shrink[2] = {wgmma::load(work.numbers(place) + 4 * upper_head()),
                             wgmma::load(work.numbers(place) + 4 * (upper_head() + 8))};
    if (__any_sync(0xffffffff, shrink[0] != 1 || shrink[1] != 1)) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        out[i] *= shrink[i / 2 % 2];
      }
    }
    wgmma::pin(out);
    wgmma::begin();
    const std::uint64_t weights = wgmma::along_rows(work.weights(place));
    const std::uint64_t values = wgmma::along_columns(
        work.tile(place) + own / wgmma::kBlockColumns * kBlockBytes, kBlockBytes);
#pragma unroll
    for (unsigned step = 0; step < kTile / 16; ++step) {
      wgmma::multiply_by_columns_async(out, wgmma::behind(weights, step * 32),
                                       wgmma::behind(values, step * 16 * wgmma::kBlockRowBytes));
    }
    wgmma::commit();
    if (fetches && fetching.tile < min(tile + kPlaces, work.end)) {
      fetching.wait(work);
      fetching.next(maps, work);
    }
    wgmma::finish();
    wgmma::pin(out);
    work.release(place, 1);
    place.advance();
  }
  __syncthreads();
  __syncthreads();
  const Share share(a, splits);
  if (!S::kHalves && static_cast<int>(threadIdx.x) >= 2 * kGroup) {
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = static_cast<int>(upper_head()) + 8 * half;
    if (head >= share.heads) {
      continue;
    }
    const float sum = wgmma::load(work.numbers({}) + 4 * static_cast<unsigned>(head));
    const float inverse = sum > 0 ? 1 / sum : 0;
    BFloat16* const to = a.out +
                         ((share.first_head + head) * a.batch + share.sequence) * S::kLatent + own +
                         first_column();
    float* const to_sums = splits.sums + share.result(a, head) * S::kLatent + own + first_column();
#pragma unroll
    for (int i = 0; i < kElements; i += 4) {
      const float x = out[i + 2 * half] * inverse;
      const float y = out[i + 2 * half + 1] * inverse;
      if (splits.count == 1) {
        *reinterpret_cast<__nv_bfloat162*>(to + 2 * i) = __floats2bfloat162_rn(x, y);
      } else {
        *reinterpret_cast<float2*>(to_sums + 2 * i) = make_float2(x, y);
      }
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, 1)
    attend_kernel(const __grid_constant__ Attention a, const __grid_constant__ Splits splits,
                  const __grid_constant__ Maps maps, float scale) {
  extern __shared__ __align__(1024) std::uint8_t shared[];
  const Work<S> work(a, splits, shared);
  if (threadIdx.x == 0) {
    work.set_up();
  }
  wgmma::wait_for_cluster();
  if (threadIdx.x < kGroup) {
    wgmma::take_registers<kWeighing>();
    weigh(a, splits, scale, shared, work);
  } else {
    wgmma::give_registers<kAdding>();
    add_up(a, splits, maps, work);
  }
  // The other block of the cluster may still count here.
  wgmma::wait_for_cluster();
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
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = groups % kMostBlocks == 0 ? kMostBlocks : 1;
    cluster.val.clusterDim.y = 1;
    cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = static_cast<unsigned>(a.batch * groups * splits.count);
    config.blockDim = kThreads;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
    cohort::cuda_check(cudaLaunchKernelEx(&config, kernel, a, splits, maps_of(a),
                                          static_cast<float>(a.scale * 1.4426950408889634)),
                       "kernel launch");
  });
  if (splits.count > 1) {
    combine_kernel<<<static_cast<unsigned>(a.batch * a.heads), kCombining, 0, stream>>>(a, splits);
    cohort::cuda_check(cudaGetLastError(), "kernel launch");
  }
}

}  // namespace decode_engine::kernels
