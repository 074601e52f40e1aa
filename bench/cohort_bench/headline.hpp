// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "rows.hpp"

/// \file
/// What decode_step says in words: microseconds per token, ratios, and the trade that DCP makes.
/// Pure.

namespace cohort::bench {

/// The plan of the rows of tensor parallelism without DCP.
inline constexpr std::string_view kTensorParallelOnly = "tp_only";

/// "1.50 GiB".
[[nodiscard]] inline std::string gib(std::int64_t bytes) {
  return fmt::format("{:.2f} GiB", static_cast<double>(bytes) / static_cast<double>(1 << 30));
}

/// The summary of one batch size, from the rows so far. Ratios are to what engines do today: the
/// staged merge over the bare library, in a graph, or eagerly where no graph was measured.
[[nodiscard]] inline std::string headline(std::span<const Row> rows, std::string_view dtype,
                                          std::int64_t batch, std::int64_t layers) {
  std::vector<const Row*> mine;
  const Row* base = nullptr;
  const Row* alone = nullptr;
  for (const Row& row : rows) {
    if (row.bench != "decode_step" || row.dtype != dtype || row.batch != batch) {
      continue;
    }
    if (row.plan == kTensorParallelOnly) {
      alone = alone == nullptr || row.us.p50 < alone->us.p50 ? &row : alone;
      continue;
    }
    mine.push_back(&row);
    const bool staged = row.path == "raw" && row.plan.starts_with("staged");
    if (staged && (base == nullptr || (base->mode != "graph" && row.mode == "graph"))) {
      base = &row;
    }
  }
  if (mine.empty()) {
    return {};
  }
  std::string text = fmt::format(
      "decode_step, batch {}, {}, {} layers: communication of one token\n", batch, dtype, layers);
  for (const Row* row : mine) {
    text += fmt::format("  {:<14}{:<13}{:<6}{:>12.1f} us", row->path, row->plan, row->mode,
                        row->us.p50);
    if (base != nullptr && base->us.p50 > 0) {
      text += fmt::format("{:>9.3f} of {} {} {}", row->us.p50 / base->us.p50, base->path,
                          base->plan, base->mode);
    }
    text += "\n";
  }
  if (alone != nullptr && alone->kv_bytes_per_rank && mine.front()->kv_bytes_per_rank) {
    text += fmt::format(
        "  TP without DCP: KV cache {} a rank; with DCP {} a rank for the times above. Both also "
        "pay the row-parallel reduce, {:.1f} us ({} {})\n",
        gib(*alone->kv_bytes_per_rank), gib(*mine.front()->kv_bytes_per_rank), alone->us.p50,
        alone->path, alone->mode);
  }
  return text;
}

}  // namespace cohort::bench
