// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>
#include <math_constants.h>

#include "attention_layout.hpp"
#include "cuda_kernels.hpp"
#include "wgmma.cuh"

/// \file
/// What a block of attention has to do, and where its threads find it.

namespace decode_engine::kernels {

constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kThreads = 3 * kGroup;

/// Where queries and rows are fetched from.
struct Maps {
  CUtensorMap queries;  ///< [heads, batch, row]
  CUtensorMap rows;     ///< [blocks, batch * capacity, 64 columns], or [1, batch * capacity, row]
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
  /// Of a head's results among those of all parts.
  [[nodiscard]] __device__ __forceinline__ std::int64_t result(const Attention& a, int head) const {
    return (split * a.batch + sequence) * a.heads + first_head + head;
  }
};

/// Blocks of a cluster that work on the same tokens: `count` from `first` on.
struct Sharing {
  unsigned count, first;

  __device__ __forceinline__ explicit Sharing(const Attention& a)
      : count(static_cast<unsigned>(sharing_blocks(a.heads))),
        first(wgmma::block_in_cluster() / count * count) {}
};

/// How much there is to do, and where it lies in shared memory.
template <class S>
struct Work {
  unsigned begin;
  int first = 0, end = 0;  ///< tiles
  int count = 0;           ///< tokens of the sequence

  __device__ __forceinline__ explicit Work(const std::uint8_t* shared)
      : begin(static_cast<unsigned>(__cvta_generic_to_shared(shared))) {}
  __device__ __forceinline__ void find(const Share& share, const Splits& splits, int tokens) {
    count = tokens;
    first = share.split * splits.tiles;
    end = min(first + splits.tiles, (count + kTile - 1) / kTile);
  }
  [[nodiscard]] __device__ __forceinline__ unsigned tile(Place place) const {
    return begin + S::tile(place.index);
  }
  [[nodiscard]] __device__ __forceinline__ unsigned weights(Place place) const {
    return begin + S::weights(place.index);
  }
  /// Whose address a lane gives. In front of all tiles they lie where the last one will.
  [[nodiscard]] __device__ __forceinline__ unsigned queries(int step) const {
    return begin + S::tile(kPlaces - 1) + static_cast<unsigned>(step) / 4 * kBlockBytes +
           place_of_part(static_cast<unsigned>(step) % 4);
  }
  /// Of queries.
  [[nodiscard]] __device__ __forceinline__ unsigned rotated() const { return begin + S::kRotated; }
  [[nodiscard]] __device__ __forceinline__ unsigned apart() const { return begin + S::kApart; }
  /// Of heads: how much sums shrink.
  [[nodiscard]] __device__ __forceinline__ unsigned numbers(Place place) const {
    return begin + S::numbers(place.index);
  }
  [[nodiscard]] __device__ __forceinline__ unsigned sum(unsigned head) const {
    return begin + S::kSums + 4 * head;
  }
  [[nodiscard]] __device__ __forceinline__ unsigned lse(unsigned head) const {
    return begin + S::kLses + 4 * head;
  }
  /// Of a head, from a column on, in elements of so many bytes.
  [[nodiscard]] __device__ __forceinline__ unsigned result(unsigned head, unsigned column,
                                                           unsigned element) const {
    return begin + head * S::result_row(element) + column * element;
  }
  /// Of the sequence, as the same warp left it with a first call.
  __device__ __forceinline__ void keep_count() const {
    wgmma::store(begin + S::kCounts + threadIdx.x / 32 * 4, __int_as_float(count));
    __syncwarp();
  }
  [[nodiscard]] __device__ __forceinline__ int kept_count() const {
    return __float_as_int(wgmma::load(begin + S::kCounts + wgmma::thread() / 32 * 4));
  }
  // Arrivals: rows, their weights, the end of their use, and queries.
  [[nodiscard]] __device__ __forceinline__ unsigned fetched(Place place, unsigned chunk) const {
    return begin + S::fetched(place.index, chunk);
  }
  [[nodiscard]] __device__ __forceinline__ unsigned weighed(Place place) const {
    return begin + S::weighed(place.index);
  }
  [[nodiscard]] __device__ __forceinline__ unsigned released(Place place) const {
    return begin + S::released(place.index);
  }
  [[nodiscard]] __device__ __forceinline__ unsigned queried() const { return begin + S::kQueried; }
  __device__ void set_up(unsigned blocks) const {
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
  __device__ __forceinline__ void release(Place place, unsigned parts,
                                          const Sharing& sharing) const {
    __syncwarp();
    if (const unsigned block = threadIdx.x % 32; block < sharing.count) {
      wgmma::arrive_in(sharing.first + block, released(place), parts);
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

}  // namespace decode_engine::kernels
