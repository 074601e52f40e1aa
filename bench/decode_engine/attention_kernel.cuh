// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>

#include "attention_results.cuh"
#include "attention_work.cuh"

/// \file
/// Attention's kernel.

namespace decode_engine::kernels {

/// Registers of a thread that weighs or adds up; all begin with 168.
constexpr int kWeighing = 184;
constexpr int kAdding = 160;
static_assert(kWeighing + 2 * kAdding <= 3 * 168);

constexpr int kWeighingBarrier = 1;

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
  __device__ __forceinline__ void next(const Attention& a, const Maps& maps, const Work<S>& work) {
    const unsigned lane = threadIdx.x % 32;
    const unsigned block = lane * S::kCopyBlocks;
    const unsigned arrival = work.fetched(place, block / S::kChunkBlocks);
    if (lane < S::kChunks) {
      wgmma::expect(work.fetched(place, lane), S::kChunkBlocks * kBlockBytes);
    }
    __syncwarp();
    const int row = first_row + tile * kTile;
    const int column = S::kWholeBlocks ? 0 : static_cast<int>(block) * wgmma::kBlockColumns;
    const int plane = S::kWholeBlocks ? static_cast<int>(block) : 0;
    const unsigned to = work.tile(place) + block * kBlockBytes;
    const Sharing sharing(a);
    const unsigned turn = (lane + static_cast<unsigned>(tile)) % sharing.count;
    if (lane < S::kCopies && sharing.first + turn == wgmma::block_in_cluster()) {
      if (sharing.count == 1) {
        wgmma::copy_box(to, maps.rows, column, row, plane, arrival);
      } else {
        wgmma::copy_box_to(static_cast<std::uint16_t>(3 << sharing.first), to, maps.rows, column,
                           row, plane, arrival);
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
                                      const Work<S>& work) {
  work.keep_count();
  wgmma::wait_for_kernel_before();
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
    work.release({kPlaces - 1}, 2, Sharing(a));
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
      const int left = work.kept_count() - (work.end - 1) * kTile;  // tokens
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
  const Share share(a, splits);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = static_cast<int>(upper_head()) + 8 * half;
    const float sum = over_quad(total[half], false);
    if (first_column() == 0) {
      wgmma::store(work.sum(static_cast<unsigned>(head)), sum);
      const float lse =
          sum > 0 ? largest[half] * static_cast<float>(a.scale) + logf(sum) : -CUDART_INF_F;
      if (splits.together) {
        wgmma::store(work.lse(static_cast<unsigned>(head)), lse);
      } else if (head < share.heads) {
        (splits.count == 1 ? a.lse : splits.lses)[share.result(a, head)] = lse;
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
  // The first product is of the first tokens and the queries. The kernel before made the latter.
  const bool any = fetches && work.first < work.end;
  if (any) {
    fetching.next(a, maps, work);
  }
  wgmma::wait_for_kernel_before();
  if (any) {
    fetching.queries(a, splits, maps, work);
    while (fetching.tile < min(work.first + kPlaces - 1, work.end)) {
      fetching.next(a, maps, work);
    }
  }
  float out[kElements] = {};
  Place place;
  for (int tile = work.first; tile < work.end; ++tile) {
    if (fetches && fetching.tile < work.end) {
      // As soon as there is room, but nothing waits for it.
      while (!__all_sync(0xffffffff, wgmma::ended(work.weighed(place), place.phase))) {
        if (fetching.tile < work.end && fetching.ready(work)) {
          fetching.next(a, maps, work);
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
      fetching.next(a, maps, work);
    }
    wgmma::finish();
    wgmma::pin(out);
    work.release(place, 1, Sharing(a));
    place.advance();
  }
  __syncthreads();  // sums are there, and nobody reads tiles
  if (S::kHalves || static_cast<int>(threadIdx.x) < 2 * kGroup) {
    write_results(a, splits, work, out, own);
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, 1)
    attend_kernel(const __grid_constant__ Attention a, const __grid_constant__ Splits splits,
                  const __grid_constant__ Maps maps, float scale) {
  extern __shared__ __align__(1024) std::uint8_t shared[];
  Work<S> work(shared);
  const Share share(a, splits);
  const int tokens = a.counts[share.sequence];  // on its way meanwhile
  if (threadIdx.x == 0) {
    wgmma::fetch_map(maps.rows);
    wgmma::fetch_map(maps.queries);
    work.set_up(Sharing(a).count);
  }
  wgmma::wait_for_cluster();
  work.find(share, splits, tokens);
  if (a.next_waits || (splits.count > 1 && !splits.together)) {
    wgmma::launch_next_kernel();
  }
  if (threadIdx.x < kGroup) {
    wgmma::take_registers<kWeighing>();
    weigh(a, splits, scale, work);
  } else {
    wgmma::give_registers<kAdding>();
    add_up(a, splits, maps, work);
  }
  if (splits.together) {
    combine_in_cluster(a, splits, work);
  }
  // Another block of the cluster may still count, or read, here.
  wgmma::wait_for_cluster();
}

}  // namespace decode_engine::kernels
