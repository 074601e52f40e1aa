// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdio>
#include <set>
#include <string>
#include <vector>

#include "runner.hpp"

/// \file
/// The first rank's output: table, result file, progress line.

namespace cohort::bench {

class Console final : public RowSink {
 public:
  /// @param speaks  Whether this rank writes; the others only keep the rows.
  explicit Console(bool speaks);
  ~Console() override;

  /// Collective. Opens the result file, where there is to be one, and writes the facts of the run.
  /// Throws `ConfigError` on every rank where the first cannot write it.
  void open(const std::string& path, const Meta& meta, ControlPlane& world);

  void add(const Row& row) override;
  [[nodiscard]] const std::vector<Row>& rows() const noexcept override { return rows_; }
  void note(const std::string& text) override;
  void print(const std::string& text) override;
  void progress(const std::string& text) override;

 private:
  void clear_progress();
  void write_line(const std::string& line);

  bool speaks_;
  std::FILE* file_ = nullptr;
  std::FILE* terminal_ = nullptr;
  bool has_progress_ = false;
  std::vector<Row> rows_;
  std::set<std::string> notes_;
};

}  // namespace cohort::bench
