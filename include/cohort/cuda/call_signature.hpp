// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cstdint>
#include <initializer_list>
#include <string_view>

/// \file
/// What a peer kernel's flags carry beside the epoch: a signature of the call, so that ranks whose
/// calls differ do not take each other's words for their own.
///
///     flag of a word   32 bits: the epoch's lower bits, as many as tell all flags apart that an
///                      inbox can hold at once, and the signature above them, never 0
///     flag of a line   64 bits: 48 of the epoch, and 16 of a signature of their own
///     announcement     64 bits: 40 of the epoch, and the upper 24 of the signature above them; one
///                      for each rank, written and looked at when a wait takes long
///
/// Pure arithmetic, on the host and on the device.

namespace cohort::cuda {

/// The kinds of peer kernels, and of calls over NCCL before which the ranks meet. 0 is no call.
enum class PeerCall : std::uint8_t {
  none,
  barrier,
  all_gather,
  reduce_scatter,
  all_reduce,
  gather_query,
  merge,
  nccl_all_gather,
  nccl_reduce_scatter,
  nccl_all_reduce,
  all_reduce_rms_norm,
};

[[nodiscard]] constexpr bool is_over_nccl(PeerCall call) noexcept {
  return call == PeerCall::nccl_all_gather || call == PeerCall::nccl_reduce_scatter ||
         call == PeerCall::nccl_all_reduce;
}

[[nodiscard]] constexpr std::string_view to_string(PeerCall call) noexcept {
  switch (call) {
    case PeerCall::none:
      return "no call";
    case PeerCall::barrier:
      return "barrier";
    case PeerCall::all_gather:
      return "all_gather";
    case PeerCall::reduce_scatter:
      return "reduce_scatter";
    case PeerCall::all_reduce:
      return "all_reduce";
    case PeerCall::gather_query:
      return "gather_query";
    case PeerCall::merge:
      return "merge_attention";
    case PeerCall::nccl_all_gather:
      return "all_gather over NCCL";
    case PeerCall::nccl_reduce_scatter:
      return "reduce_scatter over NCCL";
    case PeerCall::nccl_all_reduce:
      return "all_reduce over NCCL";
    case PeerCall::all_reduce_rms_norm:
      return "all_reduce_rms_norm";
  }
  return "unknown";
}

/// A call as the ranks must agree on it: its kind in the upper four bits, below them a hash of what
/// else has to be equal.
struct CallSignature {
  std::uint32_t word = 0;

  [[nodiscard]] static constexpr CallSignature make(
      PeerCall call, std::initializer_list<std::int64_t> equal) noexcept {
    std::uint64_t hash = 0x9e3779b97f4a7c15U + static_cast<std::uint64_t>(call);
    for (const std::int64_t value : equal) {
      hash = (hash ^ static_cast<std::uint64_t>(value)) * 0xff51afd7ed558ccdU;
      hash ^= hash >> 32;
    }
    return {(static_cast<std::uint32_t>(call) << kHashBits) |
            (static_cast<std::uint32_t>(hash) & ((1U << kHashBits) - 1))};
  }
  [[nodiscard]] constexpr PeerCall call() const noexcept {
    return static_cast<PeerCall>(word >> kHashBits);
  }
  /// What a rank that waits in this call tells its peers.
  [[nodiscard]] constexpr std::uint64_t announcement(std::uint64_t epoch) const noexcept {
    return (std::uint64_t{word} << 32 & ~kAnnouncedEpoch) | (epoch & kAnnouncedEpoch);
  }
  /// The kind of call in an announcement, and the part of its epoch. An announcement stands until
  /// the next one, so it has more of an epoch than any two calls with waits are apart.
  [[nodiscard]] static constexpr PeerCall announced_call(std::uint64_t announcement) noexcept {
    return static_cast<PeerCall>(announcement >> 60);
  }
  [[nodiscard]] static constexpr std::uint64_t announced_epoch(
      std::uint64_t announcement) noexcept {
    return announcement & kAnnouncedEpoch;
  }
  friend constexpr bool operator==(const CallSignature&, const CallSignature&) = default;

 private:
  static constexpr int kHashBits = 28;
  static constexpr std::uint64_t kAnnouncedEpoch = (std::uint64_t{1} << 40) - 1;
};

/// Bits of an epoch by which all flags differ that lie in an inbox at one time: a word is 0 or at
/// most 2 * `ll_words` calls old (see `keep_books`), where `ll_words` is a power of two.
[[nodiscard]] constexpr int flag_epoch_bits(std::int64_t ll_words) noexcept {
  return static_cast<int>(std::bit_width(static_cast<std::uint64_t>(ll_words))) + 1;
}

/// How the flags of one call are made from its epoch. Kernels work it out while they wait for that:
/// what a launch is told, it has to fetch.
struct FlagCode {
  std::uint32_t epoch_mask = 0;  ///< Of a word's flag.
  std::uint32_t signature = 0;   ///< The rest of it; not 0, or memory never written would match.
  std::uint32_t line = 0;        ///< Of a line's flag, in its upper 16 bits.

  [[nodiscard]] static constexpr FlagCode make(CallSignature call,
                                               std::uint32_t ll_words) noexcept {
    const std::uint32_t mask = 4 * ll_words - 1;  // as `flag_epoch_bits` says
    // Kind and hash fold into what is left.
    const std::uint32_t folded = call.word * 0x9e3779b1U;
    const std::uint32_t rest = folded & ~mask;
    return {.epoch_mask = mask,
            .signature = rest == 0 ? 0x80000000U : rest,
            .line = folded & 0xffff0000U};
  }
  [[nodiscard]] constexpr std::uint32_t word_flag(std::uint64_t epoch) const noexcept {
    return (static_cast<std::uint32_t>(epoch) & epoch_mask) | signature;
  }
  [[nodiscard]] constexpr std::uint64_t line_flag(std::uint64_t epoch) const noexcept {
    return epoch | (std::uint64_t{line} << 32);
  }
};

/// The epoch in a line's flag.
inline constexpr std::uint64_t kLineEpochMask = (std::uint64_t{1} << 48) - 1;

}  // namespace cohort::cuda
