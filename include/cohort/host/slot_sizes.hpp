// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>

/// \file
/// Which payloads of ranks on one machine pass their inbox slots, and which peers read where they
/// lie. Pure.
///
/// A window spares a copy. What it costs: a second signal, so that the caller may write to the
/// tensor again; and whoever then does waits for lines that the peers hold, each by itself, where
/// the copy into a slot takes them over (slot_copy.hpp). Measured with two processes on a Zen 5
/// EPYC, each writing its input before each call: as long as tensors fit the processors' caches the
/// slots are faster (bench/README.md, "The host beside its peers"). More ranks are taken to be
/// alike.

namespace cohort::host {

/// From so many bytes of each rank on, tensors of which every rank reads all are read in windows.
inline constexpr std::size_t kWindowBytes = std::size_t{8} << 20;

/// A tensor of which every rank reads all (all-gather, broadcast, queries), in bytes of one rank.
/// @param window_bytes  `HostOptions::window_bytes`.
[[nodiscard]] constexpr bool is_read_in_window(std::size_t bytes,
                                               std::size_t window_bytes) noexcept {
  return bytes >= window_bytes;
}

/// One of which every other rank reads a part of its own (reduce-scatter, merges), in bytes of all
/// those parts; and an all-reduce's, in bytes of the tensor.
[[nodiscard]] constexpr bool are_parts_read_in_window(std::size_t bytes,
                                                      std::size_t window_bytes) noexcept {
  return bytes / 2 >= window_bytes;
}

/// The parts of an all-to-all, which are mostly pieces that copies have put there, as of a packed
/// merge: a copy of much memory waits for no lines, so what a window costs is the signal alone.
[[nodiscard]] constexpr bool are_pieces_read_in_window(std::size_t bytes) noexcept {
  return bytes >= std::size_t{2} << 10;
}

/// Longer messages go through the slots in pieces of this size: of a MiB an all-gather of 4 MiB
/// takes 1.1 of the time, of 256 KiB an all-reduce of 512 KiB 1.3.
[[nodiscard]] constexpr std::size_t piece_in_slot(std::size_t slot_bytes) noexcept {
  return std::min(slot_bytes, std::size_t{512} << 10);
}

/// Whether each rank reduces all of an all-reduce's tensor, with one signal for three. Two ranks
/// send each other as many bytes that way as in parts; more of them send fewer in parts.
[[nodiscard]] constexpr bool is_reduced_by_all(std::size_t bytes, int ranks,
                                               std::size_t piece_bytes) noexcept {
  return bytes <= (ranks == 2 ? piece_bytes : std::min(piece_bytes, std::size_t{4} << 10));
}

}  // namespace cohort::host
