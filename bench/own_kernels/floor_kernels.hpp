// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

/// \file
/// As little as a kernel can do that exchanges words with one peer: what bounds the own kernels.

namespace cohort::bench {

enum class Floor : std::uint8_t {
  empty,     ///< Nothing.
  send,      ///< Stores one flag word a thread into the peer's memory.
  exchange,  ///< Sends, and waits for the peer's.
  gather,    ///< Sends what it loads, waits, and stores both shares: an all-gather.
};

/// Memory of a rank and of its peer, kFloorBytes each and zero at first; `in` holds a share, `out`
/// both.
struct FloorRank {
  std::byte* own = nullptr;
  std::byte* peer = nullptr;
  const std::byte* in = nullptr;
  std::byte* out = nullptr;
  int rank = 0;
};

inline constexpr std::int64_t kFloorBytes = std::int64_t{4} << 20;

/// Starts a round of at most 64 calls, so that a replayed graph never waits for flags of the replay
/// before.
void launch_floor_round(const FloorRank& rank, cudaStream_t stream);

/// Call number `call` of the round, 8 bytes a thread, at most 512 KiB a share. A wait that lasts
/// for seconds ends by itself, with a wrong result.
void launch_floor(Floor floor, const FloorRank& rank, std::int64_t share_bytes, std::uint32_t call,
                  cudaStream_t stream);

}  // namespace cohort::bench
