// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "cohort/cuda/block_budget.hpp"
#include "cohort/cuda/kernels.hpp"
#include "cohort/cuda/shapes.hpp"
#include "launch.cuh"
#include "peer_lines.cuh"
#include "require.hpp"

// The host's side of peer kernels: checks of tables and sizes, paths and grids.

namespace cohort::cuda::detail {

inline void check_table(const PeerTable& table) {
  require(table.size >= 1 && table.size <= kMaxPeers && table.rank >= 0 &&
              table.rank < table.size && table.layout.ranks == table.size &&
              table.layout.max_blocks >= 1,
          "table",
          "expected a rank of 1 to {} and an inbox for all of them, got rank {} of {} "
          "(inbox of {}) with {} blocks",
          kMaxPeers, table.rank, table.size, table.layout.ranks, table.layout.max_blocks);
}

inline void check_ll_words(const PeerTable& table, std::int64_t words, const char* call) {
  require(words <= table.layout.ll_words, call,
          "needs {} bytes of flag words a peer, the inbox has {}", words * 8,
          table.layout.flag_word_capacity());
}

inline void check_lines(const PeerTable& table, std::int64_t words, const char* call) {
  require(words * 8 <= table.layout.flag_line_capacity(), call,
          "needs {} bytes of flag lines a peer, the inbox has {}", words * 8,
          table.layout.flag_line_capacity());
}

/// What a call asks of an inbox by either path, and what is there: payload bytes a peer.
struct PathNeeds {
  std::int64_t sent = 0;  ///< To all peers together.
  std::int64_t words_needed = 0;
  std::int64_t words_there = 0;
  std::int64_t lines_needed = 0;
  std::int64_t lines_there = 0;
};

/// The table's path, or the other one where the inbox has room for that alone.
inline PeerPath choose_path(std::span<const PathRow> table, const char* call,
                            const PathNeeds& needs) {
  const bool words_fit = needs.words_needed <= needs.words_there;
  const bool lines_fit = needs.lines_needed <= needs.lines_there;
  require(words_fit || lines_fit, call,
          "needs {} bytes a peer, the inbox has {} of flag words and {} of flag lines",
          needs.lines_needed, needs.words_there, needs.lines_there);
  const auto row = std::find_if(table.begin(), table.end(), [&](const PathRow& candidate) {
    return needs.sent <= candidate.max_bytes_sent;
  });
  const bool wants_words = row != table.end() && row->path == PeerPath::flag_word;
  return (wants_words ? words_fit : !lines_fit) ? PeerPath::flag_word : PeerPath::flag_line;
}

/// The same for a call that needs `bytes` a peer by either path.
inline PeerPath choose_path(std::span<const PathRow> table, const char* call,
                            const InboxLayout& layout, std::int64_t bytes) {
  return choose_path(table, call,
                     {.sent = bytes * (layout.ranks - 1),
                      .words_needed = bytes,
                      .words_there = layout.flag_word_capacity(),
                      .lines_needed = bytes,
                      .lines_there = layout.flag_line_capacity()});
}

/// The path that a call of so many words a peer takes, for which the inbox has room: the one given,
/// but flag words where there are none, because an empty call signals nevertheless.
inline PeerPath checked_path(const PeerTable& table, PeerPath path, std::int64_t words,
                             const char* call) {
  if (path == PeerPath::flag_word || words == 0) {
    check_ll_words(table, std::max<std::int64_t>(words, 1), call);
    return PeerPath::flag_word;
  }
  check_lines(table, words, call);
  return PeerPath::flag_line;
}

inline int blocks_of(const PeerTable& table) {
  return limited_blocks(table.layout.max_blocks, table.block_limit);
}

struct Grid {
  int blocks;
  int threads;  ///< With the last warp.
};

/// Grid of a flag-word kernel: a word a worker while the blocks last, in small blocks first.
inline constexpr int kLlThreads = 512 + kWarp;
inline Grid ll_grid(std::int64_t words, const PeerTable& table) {
  const std::int64_t most = blocks_of(table);
  int threads = words <= 64 ? 64 : 128;
  while (threads < 512 && ceil_div(words, threads) > most) {
    threads *= 2;
  }
  return {static_cast<int>(std::clamp<std::int64_t>(ceil_div(words, threads), 1, most)),
          threads + static_cast<int>(kWarp)};
}

/// Grid of a flag-line kernel: a group of lines a warp while the warps last, spread over all
/// blocks first.
template <int kRanks>
inline constexpr int kLineThreads = kRanks >= 1 && kRanks <= 4 ? 1024 : 512;
template <int kRanks>
Grid line_grid(std::int64_t words, const PeerTable& table) {
  const std::int64_t groups = ceil_div(words, kGroupWords);
  const auto blocks = std::clamp<std::int64_t>(groups, 1, blocks_of(table));
  constexpr std::int64_t kMostWarps = kLineThreads<kRanks> / kWarp - 1;
  const auto warps = std::clamp<std::int64_t>(ceil_div(groups, blocks), 1, kMostWarps);
  return {static_cast<int>(blocks), static_cast<int>((warps + 1) * kWarp)};
}

}  // namespace cohort::cuda::detail
