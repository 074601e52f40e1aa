// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cohort/symmetric_policy.hpp"
#include "rows.hpp"

/// \file
/// The project's speed goals as data, and what a run's rows say about them. Pure.

namespace cohort::bench {

struct Goal {
  std::string what;
  double value = 0;
  double limit = 0;
  bool at_least = false;  ///< The value must reach the limit instead of staying under it.

  [[nodiscard]] bool met() const noexcept { return at_least ? value >= limit : value <= limit; }
};

namespace detail {

/// Built in place: g++ 12 takes the move of a temporary with a long text for an access out of
/// bounds.
inline void add(std::vector<Goal>& goals, std::string_view what, double value, double limit) {
  Goal& goal = goals.emplace_back();
  goal.what = what;
  goal.value = value;
  goal.limit = limit;
}

inline constexpr std::int64_t kAnything = std::numeric_limits<std::int64_t>::max();

/// Rows of one way, at most `limit` times as slow as those of another, in a range of payloads and
/// batches.
struct RatioGoal {
  std::string_view bench;
  std::string_view path;
  std::string_view plan;
  std::string_view mode;
  std::string_view base_path;
  std::array<std::string_view, 2> base_plans;  ///< The first that the run has.
  std::int64_t min_bytes;
  std::int64_t max_bytes;
  std::int64_t min_batch;
  std::int64_t max_batch;
  double limit;
};

inline constexpr std::int64_t kKiB = 1 << 10;
inline constexpr std::int64_t kMiB = 1 << 20;

/// A collective of any batch: `path` over `base_path` for payloads in [min_bytes, max_bytes].
[[nodiscard]] constexpr RatioGoal collective_goal(std::string_view bench, std::string_view path,
                                                  std::string_view base_path, std::string_view mode,
                                                  std::int64_t min_bytes, std::int64_t max_bytes,
                                                  double limit) {
  return {bench, path, "-", mode, base_path, {"-"}, min_bytes, max_bytes, 0, kAnything, limit};
}

/// A step of the decode of any payload, by the library's own kernels, for batches in
/// [min_batch, max_batch].
[[nodiscard]] constexpr RatioGoal decode_goal(std::string_view bench, std::string_view plan,
                                              std::string_view mode, std::string_view base_path,
                                              std::array<std::string_view, 2> base_plans,
                                              std::int64_t min_batch, std::int64_t max_batch,
                                              double limit) {
  return {bench, "own",     plan,      mode,      base_path, base_plans,
          0,     kAnything, min_batch, max_batch, limit};
}

/// The bare library is whichever MPI the program was built with. Where the loop over shared memory
/// copies, adds and waits no more than must be, nothing is gained over it for large payloads.
inline constexpr std::array kHostRatios = {
    collective_goal("all_gather", "symmetric", "raw", "eager", 2 * kKiB, 4 * kMiB, 0.5),
    collective_goal("reduce_scatter", "symmetric", "raw", "eager", 2 * kKiB, 8 * kKiB - 1, 0.5),
    collective_goal("reduce_scatter", "symmetric", "raw", "eager", 8 * kKiB, 4 * kMiB, 0.2),
    collective_goal("all_reduce", "symmetric", "raw", "eager", 2 * kKiB, 4 * kMiB, 0.5),
    collective_goal("all_gather", "symmetric", "shared_loop", "eager", 2 * kKiB, 4 * kMiB, 1.0),
    collective_goal("reduce_scatter", "symmetric", "shared_loop", "eager", 2 * kKiB, 4 * kMiB, 1.0),
    collective_goal("all_reduce", "symmetric", "shared_loop", "eager", 2 * kKiB, 4 * kMiB, 1.0),
    decode_goal("dcp_merge", "one_kernel", "eager", "raw", {"staged", "staged_fp32"}, 0, kAnything,
                0.4),
    collective_goal("all_gather", "plain", "raw", "eager", 64 * kKiB, 64 * kKiB, 1.05),
    collective_goal("reduce_scatter", "plain", "raw", "eager", 64 * kKiB, 64 * kKiB, 1.05),
    collective_goal("all_reduce", "plain", "raw", "eager", 64 * kKiB, 64 * kKiB, 1.05),
};

inline constexpr std::array kCudaRatios = {
    collective_goal("all_gather", "own", "raw_symmetric", "graph", 2 * kKiB, 256 * kKiB, 0.45),
    collective_goal("reduce_scatter", "own", "raw_symmetric", "graph", 2 * kKiB, 256 * kKiB, 0.40),
    collective_goal("all_reduce", "own", "raw_symmetric", "graph", 2 * kKiB, 256 * kKiB, 0.60),
    // Of the best of NCCL, on registered buffers or not.
    collective_goal("all_reduce", "own", "raw", "graph", 512 * kKiB, kMiB, 0.40),
    collective_goal("all_reduce", "own", "raw", "graph", 2 * kMiB, 2 * kMiB, 0.45),
    collective_goal("all_reduce", "own", "raw", "graph", 8 * kMiB, 8 * kMiB, 0.60),
    collective_goal("all_reduce", "own", "raw_symmetric", "graph", 512 * kKiB, kMiB, 0.40),
    collective_goal("all_reduce", "own", "raw_symmetric", "graph", 2 * kMiB, 2 * kMiB, 0.45),
    collective_goal("all_reduce", "own", "raw_symmetric", "graph", 8 * kMiB, 8 * kMiB, 0.60),
    decode_goal("dcp_merge", "one_kernel", "graph", "raw_symmetric", {"staged"}, 1, 8, 0.30),
    decode_goal("dcp_merge", "one_kernel", "graph", "raw_symmetric", {"staged"}, 16, 128, 0.45),
    decode_goal("gather_query", "-", "graph", "raw_symmetric", {"-"}, 1, 128, 0.45),
    collective_goal("all_gather", "plain", "raw", "graph", 0, kAnything, 1.02),
    collective_goal("reduce_scatter", "plain", "raw", "graph", 0, kAnything, 1.02),
    collective_goal("all_reduce", "plain", "raw", "graph", 0, kAnything, 1.02),
};

[[nodiscard]] inline bool is(const Row& row, std::string_view bench, std::string_view path,
                             std::string_view plan, std::string_view mode) {
  return row.bench == bench && row.path == path && row.plan == plan && row.mode == mode;
}

/// The row of another way with the payload of `like`, or null.
[[nodiscard]] inline const Row* partner(std::span<const Row> rows, const Row& like,
                                        std::string_view path, std::string_view plan) {
  for (const Row& row : rows) {
    if (is(row, like.bench, path, plan, like.mode) && row.dtype == like.dtype &&
        row.bytes == like.bytes && row.batch == like.batch) {
      return &row;
    }
  }
  return nullptr;
}

/// "64 KiB", "3 MiB", "100 B".
[[nodiscard]] inline std::string readable_bytes(std::int64_t bytes) {
  if (bytes >= kMiB && bytes % kMiB == 0) {
    return fmt::format("{} MiB", bytes / kMiB);
  }
  return bytes >= kKiB && bytes % kKiB == 0 ? fmt::format("{} KiB", bytes / kKiB)
                                            : fmt::format("{} B", bytes);
}

[[nodiscard]] inline std::string way(const Row& row) {
  return row.plan == kNone ? row.path : fmt::format("{} {}", row.path, row.plan);
}

inline void add_ratios(std::span<const RatioGoal> wanted, std::span<const Row> rows,
                       std::vector<Goal>& goals) {
  for (const RatioGoal& goal : wanted) {
    for (const Row& row : rows) {
      const bool inside = row.bytes >= goal.min_bytes && row.bytes <= goal.max_bytes &&
                          row.batch >= goal.min_batch && row.batch <= goal.max_batch;
      if (!inside || !is(row, goal.bench, goal.path, goal.plan, goal.mode)) {
        continue;
      }
      const Row* base = nullptr;
      for (const auto plan : goal.base_plans) {
        base = base != nullptr || plan.empty() ? base : partner(rows, row, goal.base_path, plan);
      }
      if (base == nullptr || base->us.p50 <= 0) {
        continue;
      }
      const std::string size =
          row.batch > 0 ? fmt::format("B={}", row.batch) : readable_bytes(row.bytes);
      goals.push_back({fmt::format("{} {} {} {}: {} / {}", row.bench, row.dtype, row.mode, size,
                                   way(row), way(*base)),
                       row.us.p50 / base->us.p50, goal.limit, false});
    }
  }
}

/// Nanoseconds of the arena, the scope and the flight recorder.
inline void add_local_costs(std::span<const Row> rows, std::vector<Goal>& goals) {
  for (const Row& row : rows) {
    if (row.bench == "scope") {
      add(goals, "scope entry and exit, ns", row.us.p50 * 1e3, 20);
    } else if (row.bench == "recorder") {
      add(goals, "a call's record, ns", row.us.p50 * 1e3, 50);
    } else if (row.bench == "recorded_call" && row.plan == "record") {
      add(goals, "what its record adds to a call, ns", row.us.p50 * 1e3, 50);
    } else if (row.bench == "arena" && row.batch >= 10'000) {
      goals.push_back({fmt::format("arena allocate and free with {} live blocks, ns", row.batch),
                       row.us.p50 * 1e3, 150, false});
    }
  }
}

/// What the physical ceilings of the run leave to a merge, and what Cohort adds to an eager call.
inline void add_cuda_limits(std::span<const Row> rows, std::vector<Goal>& goals) {
  double peer_bandwidth = 0;
  double barrier_us = 0;
  for (const Row& row : rows) {
    if (row.bench == "ceiling" && row.mode == "graph") {
      if (row.path == "barrier") {
        barrier_us = row.us.p50;
      } else {
        peer_bandwidth = std::max(peer_bandwidth, row.busbw);
      }
    }
  }
  for (const Row& row : rows) {
    if (is(row, "dcp_merge", "own", "one_kernel", "graph")) {
      if (row.batch == 1 && barrier_us > 0) {
        add(goals, "dcp_merge B=1: own one_kernel / a barrier kernel alone",
            row.us.p50 / barrier_us, 1.1);
      } else if (row.batch == 128 && peer_bandwidth > 0) {
        add(goals, "dcp_merge B=128: busbw / the best peer bandwidth", row.busbw / peer_bandwidth,
            0.9);
        goals.back().at_least = true;
      }
    }
    const bool collective =
        row.bench == "all_gather" || row.bench == "reduce_scatter" || row.bench == "all_reduce";
    if (collective && is(row, row.bench, "own", "-", "issue")) {
      goals.push_back({fmt::format("{} {} {}: own, us to enqueue a call", row.bench, row.dtype,
                                   readable_bytes(row.bytes)),
                       row.us.p50, 1.5, false});
    }
    if (collective && is(row, row.bench, "plain", "-", "eager")) {
      if (const Row* base = partner(rows, row, "raw", "-")) {
        goals.push_back({fmt::format("{} {} eager {}: plain - raw, us a call", row.bench, row.dtype,
                                     readable_bytes(row.bytes)),
                         row.us.p50 - base->us.p50, 0.3, false});
      }
    }
  }
}

}  // namespace detail

/// Every goal that the rows say something about.
[[nodiscard]] inline std::vector<Goal> goals_of(BackendKind backend, std::span<const Row> rows) {
  std::vector<Goal> goals;
  if (backend == BackendKind::host) {
    detail::add_ratios(detail::kHostRatios, rows, goals);
  } else {
    detail::add_ratios(detail::kCudaRatios, rows, goals);
    detail::add_cuda_limits(rows, goals);
  }
  detail::add_local_costs(rows, goals);
  return goals;
}

/// A line for each goal, then how many were met.
[[nodiscard]] inline std::string goals_table(std::span<const Goal> goals) {
  std::string text = fmt::format("{:<72}{:>10}{:>10}  {}\n", "goal", "reached", "limit", "");
  int met = 0;
  for (const Goal& goal : goals) {
    met += goal.met() ? 1 : 0;
    text += fmt::format("{:<72}{:>10.3f}{:>10}  {}\n", goal.what, goal.value,
                        fmt::format("{}{:g}", goal.at_least ? ">=" : "<=", goal.limit),
                        goal.met() ? "met" : "UNMET");
  }
  return text + fmt::format("{} of {} goals met\n", met, goals.size());
}

}  // namespace cohort::bench
