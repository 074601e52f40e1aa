// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "cohort/call_time.hpp"
#include "cohort/cuda/path_sizes.hpp"
#include "cohort/error.hpp"
#include "cohort/transport.hpp"

/// \file
/// How a transport over NCCL is set up. Pure.

namespace cohort {

/// Total bytes up to which the own kernels take a collective that an inbox has room for, where no
/// option says otherwise: those of cuda/path_sizes.hpp. Without flag lines, as over PCIe, every
/// payload travels in flag words, at twice its bytes: until that is measured, only calls whose time
/// is all latency.
[[nodiscard]] constexpr std::size_t default_own_max_bytes(Collective collective, int ranks,
                                                          bool whole_lines) noexcept {
  constexpr std::int64_t kInWords = 64 * 1024;
  const cuda::PathSizes sizes = cuda::path_sizes(ranks);
  const auto total = [&](std::int64_t in_lines) {
    return static_cast<std::size_t>(whole_lines ? in_lines : kInWords);
  };
  switch (collective) {
    case Collective::all_gather:
    case Collective::reduce_scatter:
      return total(sizes.share_total);
    case Collective::all_reduce:
    case Collective::all_reduce_rms_norm:
      return total(sizes.all_reduce_total);
    case Collective::all_to_all:
    case Collective::broadcast:
      return 0;
  }
  return 0;
}

/// How a transport is set up. Equal on all ranks.
struct NcclTransportOptions {
  bool peer_mapping = true;                        ///< Whether to map peers' memory at all.
  std::chrono::milliseconds kernel_limit{60'000};  ///< Of a wait in an own kernel.
  int kernels_at_once = 2;                         ///< Own ones of this rank; see block_budget.hpp.
  int ranks_per_card = 1;                          ///< At least so many; may differ by rank.
  std::optional<std::int64_t> own_max_bytes = {};  ///< Instead of `default_own_max_bytes`; 0: none.
  bool visibility_guard = true;                    ///< `false` is for the guard's own test.
};

/// Throws `ConfigError` for an option that cannot be.
inline void check_options(const NcclTransportOptions& options) {
  if (!is_time_limit(options.kernel_limit)) {
    throw ConfigError(fmt::format("NcclTransportOptions.kernel_limit: expected 1 to {} ms, got {}",
                                  kLongestTimeLimit.count(), options.kernel_limit.count()));
  }
  const auto at_least = [](const char* name, std::int64_t least, std::int64_t value) {
    if (value < least) {
      throw ConfigError(
          fmt::format("NcclTransportOptions.{}: expected at least {}, got {}", name, least, value));
    }
  };
  at_least("kernels_at_once", 1, options.kernels_at_once);
  at_least("ranks_per_card", 1, options.ranks_per_card);
  at_least("own_max_bytes", 0, options.own_max_bytes.value_or(0));
}

}  // namespace cohort
