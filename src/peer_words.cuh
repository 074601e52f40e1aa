// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "elements.cuh"
#include "peer_wait.cuh"

// Flag words: 8 bytes of payload and their flags in 16.

namespace cohort::cuda::detail {

/// Where a word of the lane of `source` lies in every inbox.
template <int kRanks>
__device__ __forceinline__ std::int64_t ll_place(const Group<kRanks>& g, const Call& c, int source,
                                                 std::uint32_t word) {
  return g.ll_first + (std::int64_t{g.ll_words} * source + word) * 16 +
         (c.slot != 0 ? g.ll_slot : 0);
}
/// The same in this rank's lane.
template <int kRanks>
__device__ __forceinline__ std::int64_t ll_own_place(const Group<kRanks>& g, const Call& c,
                                                     std::uint32_t word) {
  return g.ll_own + std::int64_t{16} * word + (c.slot != 0 ? g.ll_slot : 0);
}

__device__ __forceinline__ void ll_store(std::byte* to, uint2 value, std::uint32_t flag) {
  asm volatile("st.volatile.global.v4.u32 [%0],{%1,%2,%3,%4};" ::"l"(to), "r"(value.x), "r"(flag),
               "r"(value.y), "r"(flag)
               : "memory");
}

/// The same where it is wanted, without a branch.
__device__ __forceinline__ void ll_store_if(bool wanted, std::byte* to, uint2 value,
                                            std::uint32_t flag) {
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p,%5,0; @p st.volatile.global.v4.u32 [%0],{%1,%2,%3,%4};}" ::"l"(
          to),
      "r"(value.x), "r"(flag), "r"(value.y), "r"(flag), "r"(static_cast<unsigned>(wanted))
      : "memory");
}

__device__ __forceinline__ uint4 ll_load(const std::byte* from) {
  uint4 v;
  asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}

/// The same where it is wanted; without a branch, so that loads that follow each other are all on
/// their way before the first is looked at.
__device__ __forceinline__ void ll_load_if(bool wanted, const std::byte* from, uint4& v) {
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p,%5,0; @p ld.volatile.global.v4.u32 {%0,%1,%2,%3},[%4];}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(from), "r"(static_cast<unsigned>(wanted))
      : "memory");
}

/// 0 if both halves of a flag word carry the call's flag.
__device__ __forceinline__ std::uint32_t ll_differs(uint4 v, const Call& c) {
  return (v.y ^ c.flag) | (v.w ^ c.flag);
}

/// Where a thread's first word goes in every peer's inbox, worked out before `begin`: what lies
/// between the arrival of the epoch and the first store delays every rank. For a constant number of
/// ranks; where there is none, the first word is sent like all others.
template <int kRanks>
class FirstPlaces {
 public:
  __device__ __forceinline__ FirstPlaces(const Group<kRanks>& g, std::uint32_t word)
      : slot_bytes_(g.ll_slot) {
#pragma unroll
    for (int k = 1; k < kRanks; ++k) {
      at_[k] = settled(g.peers[k] + g.ll_own + std::int64_t{16} * word);
    }
  }
  /// To peers[k], without a branch; so many bytes beyond the place.
  __device__ __forceinline__ void store_if(bool wanted, const Call& c, int k, uint2 value,
                                           std::int64_t beyond = 0) const {
    ll_store_if(wanted, at_[k] + (beyond + (c.slot != 0 ? slot_bytes_ : 0)), value, c.flag);
  }

 private:
  std::int64_t slot_bytes_;
  std::byte* at_[kRanks > 0 ? kRanks : 1];
};

/// Whether a thread sends the first of its `words` words as soon as it has the epoch.
template <int kRanks>
__device__ __forceinline__ bool sends_ahead(std::uint32_t words) {
  return kRanks > 0 && threadIdx.x < workers() && worker_number() < words;
}
/// The first word that it has left to send then.
template <int kRanks>
__device__ __forceinline__ std::uint32_t second_word() {
  return worker_number() + (kRanks > 0 ? worker_count() : 0);
}

/// Ranks that a thread polls at once: all of them where the number is a constant.
template <int kRanks>
inline constexpr int kBatch = kRanks > 0 ? kRanks : 8;

/// Sends one word to the same place of every peer's inbox.
template <int kRanks>
__device__ __forceinline__ void ll_send_all(const Group<kRanks>& g, const Call& c,
                                            std::uint32_t word, uint2 value) {
  const std::int64_t place = ll_own_place(g, c, word);
#pragma unroll
  for (int k = 1; k < g.size(); ++k) {
    ll_store(g.peers[k] + place, value, c.flag);
  }
}

/// Whether it is another rank of the group.
template <int kRanks>
__device__ __forceinline__ bool is_peer(const Group<kRanks>& g, int rank) {
  return rank < g.size() && rank != g.rank;
}

/// Waits for a word of each of the ranks [first, first + kBatch) but this one, and returns their
/// payload by rank; what stands at this one means nothing. All loads of a round are in flight
/// together. False if the wait failed.
template <int kRanks>
__device__ __forceinline__ bool ll_receive(const Group<kRanks>& g, const Call& c, int first,
                                           std::uint32_t word, uint2 (&values)[kBatch<kRanks>],
                                           Patience& patience) {
  if constexpr (kRanks == 2) {  // one peer, one load
    const int peer = g.rank ^ 1;
    const std::byte* from = g.own() + ll_place(g, c, peer, word);
    return await(g, c, patience, [&] {
      const uint4 v = ll_load(from);
      values[0] = values[1] = make_uint2(v.x, v.z);
      return ll_differs(v, c) != 0 ? 1U << peer : 0U;
    });
  }
  const std::byte* lane = g.own() + ll_place(g, c, first, word);
  const std::int64_t lane_bytes = std::int64_t{g.ll_words} * 16;
  uint4 words[kBatch<kRanks>] = {};
  const auto poll = [&] {
    std::uint32_t missing = 0;
#pragma unroll
    for (int j = 0; j < kBatch<kRanks>; ++j) {
      ll_load_if(is_peer(g, first + j), lane + j * lane_bytes, words[j]);
    }
#pragma unroll
    for (int j = 0; j < kBatch<kRanks>; ++j) {
      const bool differs = is_peer(g, first + j) && ll_differs(words[j], c) != 0;
      missing |= differs ? 1U << (first + j) : 0U;
    }
    return missing;
  };
  if (!await(g, c, patience, poll)) {
    return false;
  }
#pragma unroll
  for (int j = 0; j < kBatch<kRanks>; ++j) {
    values[j] = make_uint2(words[j].x, words[j].z);
  }
  return true;
}

}  // namespace cohort::cuda::detail
