// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cohort/trace_file.hpp"
#include "statistics.hpp"

/// \file
/// A row of results, as a line of JSON and as a line of the table. Pure.

namespace cohort::bench {

/// What is not applicable in a row.
inline constexpr std::string_view kNone = "-";

struct Row {
  std::string bench;
  std::string path{kNone};
  std::string plan{kNone};
  std::string mode{kNone};
  std::string dtype{kNone};
  int ranks = 0;
  std::int64_t bytes = 0;  ///< Logical payload, equal across paths and plans.
  std::int64_t batch = 0;
  Summary us = {};
  double algbw = 0;  ///< bytes / us_p50, GB/s
  double busbw = 0;  ///< algbw times the collective's bus factor
  std::optional<std::int64_t> wrong =
      {};                  ///< Summed over ranks; nothing where nothing was compared.
  std::int64_t calls = 1;  ///< Calls that a sample batched.
  std::int64_t samples = 0;
  std::optional<std::int64_t> kv_bytes_per_rank = {};  ///< decode_step alone.
};

/// One line, without its end.
[[nodiscard]] inline std::string to_json(const Row& row) {
  const std::string wrong = row.wrong ? fmt::format("{}", *row.wrong) : "null";
  std::string line = fmt::format(
      R"({{"bench": {}, "path": {}, "plan": {}, "mode": {}, "dtype": {}, "ranks": {}, )"
      R"("bytes": {}, "batch": {}, "us_p50": {:.4f}, "us_p95": {:.4f}, "us_min": {:.4f}, )"
      R"("algbw": {:.3f}, "busbw": {:.3f}, "wrong": {}, "calls": {}, "samples": {})",
      cohort::detail::json_text(row.bench), cohort::detail::json_text(row.path),
      cohort::detail::json_text(row.plan), cohort::detail::json_text(row.mode),
      cohort::detail::json_text(row.dtype), row.ranks, row.bytes, row.batch, row.us.p50, row.us.p95,
      row.us.min, row.algbw, row.busbw, wrong, row.calls, row.samples);
  if (row.kv_bytes_per_rank) {
    line += fmt::format(R"(, "kv_bytes_per_rank": {})", *row.kv_bytes_per_rank);
  }
  return line + "}";
}

[[nodiscard]] inline std::string table_head() {
  return fmt::format(
      "{:<18}{:<15}{:<20}{:<7}{:<9}{:>6}{:>12}{:>7}{:>12}{:>12}{:>12}{:>10}{:>10}{:>8}", "bench",
      "path", "plan", "mode", "dtype", "ranks", "bytes", "batch", "us_p50", "us_p95", "us_min",
      "algbw", "busbw", "wrong");
}

[[nodiscard]] inline std::string table_line(const Row& row) {
  return fmt::format(
      "{:<18}{:<15}{:<20}{:<7}{:<9}{:>6}{:>12}{:>7}{:>12.3f}{:>12.3f}{:>12.3f}{:>10.2f}{:>10.2f}"
      "{:>8}",
      row.bench, row.path, row.plan, row.mode, row.dtype, row.ranks, row.bytes, row.batch,
      row.us.p50, row.us.p95, row.us.min, row.algbw, row.busbw,
      row.wrong ? fmt::format("{}", *row.wrong) : std::string(kNone));
}

/// Facts of the run, in order; each value is a text or a list of texts or a number as text.
class Meta {
 public:
  void text(std::string_view key, std::string_view value) {
    put(key, cohort::detail::json_text(value));
  }
  void number(std::string_view key, std::int64_t value) { put(key, fmt::format("{}", value)); }
  void list(std::string_view key, const std::vector<std::string>& values) {
    std::string out = "[";
    for (const auto& value : values) {
      out += (out.size() > 1 ? ", " : "") + cohort::detail::json_text(value);
    }
    put(key, out + "]");
  }

  /// The first line of a result file.
  [[nodiscard]] std::string to_json() const { return R"({"meta": {)" + body_ + "}}"; }

 private:
  void put(std::string_view key, const std::string& value) {
    body_ +=
        fmt::format("{}{}: {}", body_.empty() ? "" : ", ", cohort::detail::json_text(key), value);
  }

  std::string body_;
};

}  // namespace cohort::bench
