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

/// What a thread sends of a group of lines: two words for each peer, by k, or two for all.
template <int kPairs>
struct LineWords {
  uint2 first[kPairs];
  uint2 second[kPairs];
};

/// Where a thread's part of its warp's first group goes in every peer's inbox, worked out before
/// `begin`, as `FirstPlaces` for words. For a constant number of ranks, where `kAhead`.
template <int kRanks, bool kAhead = (kRanks > 0)>
class FirstLines {
 public:
  /// @param leads  Whether the warp sends lines of `group`, to every peer.
  /// @param words  Of the payload; lines beyond are left out.
  __device__ __forceinline__ FirstLines(const Group<kRanks>& g, bool leads, std::uint32_t group,
                                        std::uint32_t words)
      : part_(group), slot_bytes_(g.line_slot), any_(leads && part_.line * kLineWords < words) {
#pragma unroll
    for (int k = 1; k < (kAhead ? kRanks : 0); ++k) {
      at_[k] = settled(g.peers[k] + g.line_own + kLineBytes * part_.line + part_.offset);
    }
  }
  /// Sends them as soon as the epoch is there, without a branch, in a whole warp: see `line_store`.
  template <int kPairs>
  __device__ __forceinline__ void send(bool wanted, const Call& c,
                                       const LineWords<kPairs>& loaded) const {
    const auto low = static_cast<std::uint32_t>(c.line_flag);
    const auto high = static_cast<std::uint32_t>(c.line_flag >> 32);
    __syncwarp();
#pragma unroll
    for (int k = 1; k < (kAhead ? kRanks : 0); ++k) {
      const uint2 first = loaded.first[kPairs > 1 ? k : 0];
      const uint2 second = loaded.second[kPairs > 1 ? k : 0];
      asm volatile(
          "{.reg .pred p; setp.ne.u32 p,%5,0; @p st.volatile.global.v4.u32 [%0],{%1,%2,%3,%4};}" ::
              "l"(at_[k] + (c.slot != 0 ? slot_bytes_ : 0)),
          "r"(first.x), "r"(first.y), "r"(part_.flag ? low : second.x),
          "r"(part_.flag ? high : second.y), "r"(static_cast<unsigned>(wanted && any_))
          : "memory");
    }
  }

 private:
  LinePart part_;
  std::int64_t slot_bytes_;
  bool any_;
  std::byte* at_[kRanks > 0 ? kRanks : 1];
};

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
  if constexpr (kRanks == 2) {  // one peer, one load
    const int peer = g.rank ^ 1;
    const std::byte* const from = g.own() + line_place(g, c, peer, part);
    uint4 value = {};
    const bool there = poll_in_warp(missed, [&] {
      ll_load_if(any, from, value);
      return any && line_differs(value, c, part) != 0 ? 1U << peer : 0U;
    });
    values[0] = values[1] = value;
    return there;
  } else {
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
}

/// What a warp does in a call with lines. While every group has a warp of its own, that warp sends
/// the group and then waits for the peers'. Where there are more groups than warps, a quarter of a
/// block's warps send and the others receive: senders wait for the link, and nothing that waits for
/// peers must hold them up. Neighbouring groups are on different multiprocessors.
struct LineRole {
  std::uint32_t groups;
  std::uint32_t first;  ///< Group; then every `step`th.
  std::uint32_t step;
  std::uint32_t senders;  ///< Warps of the block that send; its first ones.
  bool splits;            ///< Whether those only send.
  bool sends;
  bool receives;

  __device__ __forceinline__ explicit LineRole(std::uint32_t words)
      : groups((words + kGroupWords - 1) / kGroupWords) {
    const std::uint32_t warp = threadIdx.x / kWarp;
    const std::uint32_t warps = workers() / kWarp;
    splits = groups > warps * gridDim.x;
    senders = splits ? warps / 4 : warps;
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

/// What all peers get alike: `word_at(word)` is a word of it.
template <class WordAt>
__device__ __forceinline__ LineWords<1> load_for_all(std::uint32_t words, std::uint32_t group,
                                                     const WordAt& word_at) {
  const LinePart part(group);
  const bool has_second = !part.flag && part.word + 1 < words;
  return {{part.word < words ? word_at(part.word) : make_uint2(0, 0)},
          {has_second ? word_at(part.word + 1) : make_uint2(0, 0)}};
}

/// Sends a group of lines to every peer, as group `at` of its lanes.
template <int kRanks>
__device__ __forceinline__ void send_to_all(const Group<kRanks>& g, const Call& c,
                                            std::uint32_t words, std::uint32_t group,
                                            std::uint32_t at, const LineWords<1>& loaded) {
  const LinePart part(group);
  if (is_in(line_mask(part, words))) {
    const std::int64_t place = line_own_place(g, c, LinePart(at));
#pragma unroll
    for (int k = 1; k < g.size(); ++k) {
      line_store(g.peers[k] + place, loaded.first[0], loaded.second[0], c, part);
    }
  }
}

/// Has `store(word, value)` store a thread's words of a group of lines.
template <class Store>
__device__ __forceinline__ void store_lines(std::uint32_t words, std::uint32_t group,
                                            const LineWords<1>& loaded, const Store& store) {
  const LinePart part(group);
  if (part.word < words) {
    store(part.word, loaded.first[0]);
  }
  if (!part.flag && part.word + 1 < words) {
    store(part.word + 1, loaded.second[0]);
  }
}

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

/// Which groups of lines a block's sending warps have read, for calls whose result takes the place
/// of their input: a peer's group may come before this rank's own has been read, and what is stored
/// in its place would be sent. Where each warp receives what it has sent, nothing is counted.
///
/// A count is stored behind the warp's stores of the group's lines, which have waited for its
/// loads; that those lines arrive anywhere is not asked, so it is no release, which might wait for
/// that. A receiver's stores depend on the count.
class GroupsRead {
 public:
  /// Most warps of a block that only send.
  static constexpr std::uint32_t kMost = 1024 / kWarp / 4;
  using Counts = std::uint32_t[kMost];

  /// In all threads, before `begin`: `counts` is shared memory of the block.
  __device__ __forceinline__ GroupsRead(Counts& counts, bool in_place, const LineRole& role)
      : counts_(counts), role_(role), counted_(in_place && role.splits) {
    if (counted_) {  // alike in all threads of the launch
      if (threadIdx.x < kMost) {
        counts[threadIdx.x] = 0;
      }
      __syncthreads();
    }
  }
  /// By a warp that has sent a group, one after the other.
  __device__ __forceinline__ void add() {
    if (counted_) {
      __syncwarp();
      ++mine_;
      if ((threadIdx.x & 31U) == 0) {
        *const_cast<volatile std::uint32_t*>(&counts_[threadIdx.x / kWarp]) = mine_;
      }
    }
  }
  /// Whether a group has been read, asked for a while in a whole warp.
  [[nodiscard]] __device__ __forceinline__ bool has(std::uint32_t group) const {
    if (!counted_) {
      return true;
    }
    const std::uint32_t place = group / gridDim.x;  // among the block's
    const volatile std::uint32_t* const count = &counts_[place % role_.senders];
    const std::uint32_t needed = place / role_.senders + 1;
#pragma unroll 1
    for (int i = 0; i < Patience::kPolls; ++i) {
      if (__all_sync(kFullWarp, *count >= needed)) {
        return true;
      }
    }
    return false;
  }

 private:
  Counts& counts_;
  const LineRole& role_;
  std::uint32_t mine_ = 0;
  bool counted_;
};

/// Polls for groups of lines, one after the other, in a whole warp: `receive(group, missing)`
/// returns as `poll_in_warp`, and is called again while something is missing. False if the wait
/// failed.
template <int kRanks, class Receive>
__device__ __forceinline__ bool receive_all(const Group<kRanks>& g, const Call& c,
                                            std::uint32_t first, std::uint32_t step,
                                            std::uint32_t groups, const Receive& receive) {
  Patience patience;
  for (std::uint32_t i = first; i < groups; i += step) {
    std::uint32_t missing = 0;
    while (!receive(i, missing)) {
      if (patience.is_over_in_warp(g, c, missing)) {
        return false;
      }
    }
  }
  return true;
}

/// Sends and receives a call's lines as this warp's role says. `load(group)` gives what the thread
/// sends, `send(group, loaded)` sends it, and `receive` is as in `receive_all`. False if the wait
/// failed.
///
/// @param send_first  Does what is left to do of the role's first group, if the warp leads.
template <int kRanks, class SendFirst, class Load, class Send, class Receive>
__device__ __forceinline__ bool exchange_lines(const Group<kRanks>& g, const Call& c,
                                               const LineRole& role, const SendFirst& send_first,
                                               const Load& load, const Send& send,
                                               const Receive& receive) {
  if (role.leads()) {
    send_first();
    for (std::uint32_t i = role.first + role.step; i < role.groups; i += role.step) {
      send(i, load(i));
    }
  }
  if (!role.receives) {
    return true;
  }
  delay_point(g, c, 1);
  return receive_all(g, c, role.first, role.step, role.groups, receive);
}

}  // namespace cohort::cuda::detail
