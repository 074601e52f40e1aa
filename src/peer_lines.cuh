// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "peer_wait.cuh"
#include "peer_words.cuh"

// Flag lines: 120 bytes of payload and their flag in 128.

namespace cohort::cuda::detail {

// A line holds 15 words of 8 bytes and the epoch. A warp moves four lines at a time, a group: 60
// words, of which each thread has two neighbouring ones, and every eighth thread one and the flag.
inline constexpr std::uint32_t kLineWords = kLinePayload / 8;
inline constexpr std::uint32_t kGroupLines = 4;
inline constexpr std::uint32_t kGroupWords = kGroupLines * kLineWords;

/// A thread's part of a group of lines.
struct LinePart {
  std::uint32_t line;    ///< Of the lane.
  std::uint32_t word;    ///< First of the two words.
  std::uint32_t offset;  ///< Bytes into the line.
  bool flag;             ///< Has the flag instead of the second word.

  __device__ __forceinline__ explicit LinePart(std::uint32_t group) {
    const std::uint32_t thread = threadIdx.x & 31U;
    line = group * kGroupLines + (thread >> 3);
    word = line * kLineWords + 2 * (thread & 7U);
    offset = 16 * (thread & 7U);
    flag = (thread & 7U) == 7U;
  }
};

/// Where a thread's part of a line of the lane of `source` lies in every inbox.
template <int kRanks>
__device__ __forceinline__ std::int64_t line_place(const Group<kRanks>& g, const Call& c,
                                                   int source, const LinePart& part) {
  return g.line_first + g.line_lane * source + kLineBytes * part.line + part.offset +
         (c.slot != 0 ? g.line_slot : 0);
}
/// The same in this rank's lane.
template <int kRanks>
__device__ __forceinline__ std::int64_t line_own_place(const Group<kRanks>& g, const Call& c,
                                                       const LinePart& part) {
  return g.line_own + kLineBytes * part.line + part.offset + (c.slot != 0 ? g.line_slot : 0);
}

/// All threads that have a part of the line, in one instruction: see `line_mask`. Lines beyond the
/// payload are left out whole.
__device__ __forceinline__ void line_store(std::byte* to, uint2 first, uint2 second, const Call& c,
                                           const LinePart& part) {
  const auto low = static_cast<std::uint32_t>(c.line_flag);
  const auto high = static_cast<std::uint32_t>(c.line_flag >> 32);
  asm volatile("st.volatile.global.v4.u32 [%0],{%1,%2,%3,%4};" ::"l"(to), "r"(first.x),
               "r"(first.y), "r"(part.flag ? low : second.x), "r"(part.flag ? high : second.y)
               : "memory");
}

/// 0 unless the thread has the flag and it is not the call's.
__device__ __forceinline__ std::uint32_t line_differs(uint4 v, const Call& c,
                                                      const LinePart& part) {
  const auto low = static_cast<std::uint32_t>(c.line_flag);
  const auto high = static_cast<std::uint32_t>(c.line_flag >> 32);
  return part.flag ? (v.z ^ low) | (v.w ^ high) : 0;
}

/// Polls for a warp's part of a line of each of the ranks [first, first + kBatch) but this one;
/// values by rank. `any` is false in threads whose line lies beyond the payload. Returns as
/// `poll_in_warp`.
template <int kRanks>
__device__ __forceinline__ bool receive_lines(const Group<kRanks>& g, const Call& c, int first,
                                              const LinePart& part, bool any,
                                              uint4 (&values)[kBatch<kRanks>],
                                              std::uint32_t& missed) {
  return poll_in_warp(missed, [&] {
    std::uint32_t missing = 0;
#pragma unroll
    for (int j = 0; j < kBatch<kRanks>; ++j) {
      ll_load_if(any && is_peer(g, first + j), g.own() + line_place(g, c, first + j, part),
                 values[j]);
    }
#pragma unroll
    for (int j = 0; j < kBatch<kRanks>; ++j) {
      const bool differs = any && is_peer(g, first + j) && line_differs(values[j], c, part) != 0;
      missing |= differs ? 1U << (first + j) : 0U;
    }
    return missing;
  });
}

/// What a warp does in a call with lines. While every group has a warp of its own, that warp sends
/// the group and then waits for the peers'. Where there are more groups than warps, a quarter of a
/// block's warps send and the others receive: senders wait for the link, and nothing that waits for
/// peers must hold them up. Neighbouring groups are on different multiprocessors.
struct LineRole {
  std::uint32_t groups;
  std::uint32_t first;  ///< Group; then every `step`th.
  std::uint32_t step;
  bool sends;
  bool receives;

  __device__ __forceinline__ explicit LineRole(std::uint32_t words)
      : groups((words + kGroupWords - 1) / kGroupWords) {
    const std::uint32_t warp = threadIdx.x / kWarp;
    const std::uint32_t warps = workers() / kWarp;
    const bool splits = groups > warps * gridDim.x;
    const std::uint32_t senders = splits ? warps / 4 : warps;
    sends = warp < senders;
    receives = !splits || !sends;
    const std::uint32_t place = splits && !sends ? warp - senders : warp;
    first = place * gridDim.x + blockIdx.x;
    step = (splits && !sends ? warps - senders : senders) * gridDim.x;
  }
  /// Whether the warp sends a group at all.
  __device__ __forceinline__ bool leads() const { return sends && first < groups; }
  /// The group to load while the epoch is on its way; one without words in a warp that sends none.
  /// Without a branch: nothing behind one would be under way before the epoch has come.
  __device__ __forceinline__ std::uint32_t ahead() const { return leads() ? first : groups; }
};

/// The threads of the warp whose lines hold payload. Brings the warp together, so that a store of
/// whole lines that follows is one instruction.
__device__ __forceinline__ unsigned line_mask(const LinePart& part, std::uint32_t words) {
  return __ballot_sync(kFullWarp, part.line * kLineWords < words);
}
__device__ __forceinline__ bool is_in(unsigned mask) {
  return (mask >> (threadIdx.x & 31U) & 1U) != 0;
}

/// What a thread sends of a group of lines: two words for each peer, by k, or two for all.
template <int kPairs>
struct LineWords {
  uint2 first[kPairs];
  uint2 second[kPairs];
};

/// Two words for each peer where the number of ranks is a constant; elsewhere they are loaded when
/// they are sent.
template <int kRanks>
using PeerLineWords = LineWords<(kRanks > 0 ? kRanks : 1)>;

/// What differs by peer: `word_for(rank, word)` is a word of what the rank shall have.
template <int kRanks, class WordFor>
__device__ __forceinline__ PeerLineWords<kRanks> load_for_peers(const Group<kRanks>& g,
                                                                std::uint32_t words,
                                                                std::uint32_t group,
                                                                const WordFor& word_for) {
  const LinePart part(group);
  const bool has_second = !part.flag && part.word + 1 < words;
  PeerLineWords<kRanks> loaded = {};
#pragma unroll
  for (int k = 1; k < kRanks; ++k) {
    const int rank = g.rank_at(k);
    loaded.first[k] = part.word < words ? word_for(rank, part.word) : make_uint2(0, 0);
    loaded.second[k] = has_second ? word_for(rank, part.word + 1) : make_uint2(0, 0);
  }
  return loaded;
}

template <int kRanks, class WordFor>
__device__ __forceinline__ void send_to_peers(const Group<kRanks>& g, const Call& c,
                                              std::uint32_t words, std::uint32_t group,
                                              const PeerLineWords<kRanks>& loaded,
                                              const WordFor& word_for) {
  const LinePart part(group);
  const unsigned mask = line_mask(part, words);
  if (!is_in(mask)) {
    return;
  }
  const bool has_second = !part.flag && part.word + 1 < words;
  const std::int64_t place = line_own_place(g, c, part);
#pragma unroll
  for (int k = 1; k < g.size(); ++k) {
    if constexpr (kRanks > 0) {
      line_store(g.peers[k] + place, loaded.first[k], loaded.second[k], c, part);
    } else {
      const int rank = g.rank_at(k);
      const uint2 first = part.word < words ? word_for(rank, part.word) : make_uint2(0, 0);
      const uint2 second = has_second ? word_for(rank, part.word + 1) : make_uint2(0, 0);
      __syncwarp(mask);
      line_store(g.peers[k] + place, first, second, c, part);
    }
  }
}

/// Sends and receives a call's lines as this warp's role says. `load(group)` gives what the thread
/// sends and `send(group, loaded)` sends it; `receive(group, missing)` polls for it and returns as
/// `poll_in_warp`, and is called again while something is missing.
///
/// @param first  What the thread has loaded of the role's first group, if it leads.
template <int kRanks, class Loaded, class Load, class Send, class Receive>
__device__ __forceinline__ void exchange_lines(const Group<kRanks>& g, const Call& c,
                                               const LineRole& role, const Loaded& first,
                                               const Load& load, const Send& send,
                                               const Receive& receive) {
  if (role.leads()) {
    send(role.first, first);
    for (std::uint32_t i = role.first + role.step; i < role.groups; i += role.step) {
      send(i, load(i));
    }
  }
  if (role.receives) {
    delay_point(g, c, 1);
    Patience patience;
    for (std::uint32_t i = role.first; i < role.groups; i += role.step) {
      std::uint32_t missing = 0;
      while (!receive(i, missing)) {
        if (patience.is_over_in_warp(g, c, missing)) {
          return;
        }
      }
    }
  }
}

}  // namespace cohort::cuda::detail
