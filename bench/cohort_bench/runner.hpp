// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "lane.hpp"
#include "rows.hpp"

/// \file
/// Measures ways of doing the same thing side by side.

namespace cohort::bench {

/// One way of doing a call, and how its result is judged.
struct Variant {
  std::string path{kNone};
  std::string plan{kNone};
  Mode mode = Mode::eager;
  Lane* lane = nullptr;             ///< Whose arena a capture concerns, or null.
  std::function<void()> call = {};  ///< Enqueues one call.
  /// The writing of inputs that `call` begins with, alone. Its time is measured in the same rounds
  /// and taken off. May be empty.
  std::function<void()> writing = {};
  std::function<double()> sample = {};        ///< Takes a sample by itself, us of a call; or empty.
  std::function<void()> poison = {};          ///< Overwrites the result with NaN; may be empty.
  std::function<std::int64_t()> wrong = {};   ///< Wrong elements on this rank; may be empty.
  std::function<void()> before_capture = {};  ///< Collective; may be empty.
  std::function<void()> after_sample = {};    ///< Collective, not timed; may be empty.
  bool hidden = false;                        ///< Measured for `subtract` alone: no row.
  std::optional<std::size_t> subtract = {};   ///< Variant whose time is taken off, round by round.
  std::optional<std::int64_t> kv_bytes_per_rank = {};
};

/// Ways that do the same work on the same payload.
struct Case {
  std::string bench;
  std::string dtype{kNone};
  std::int64_t bytes = 0;
  std::int64_t batch = 0;
  double bus_factor = 0;          ///< 0: the row has no bandwidths.
  std::int64_t most_calls = 100;  ///< Of one sample.
  std::int64_t least_calls = 1;   ///< And at least so many.
  double parts_per_call = 1;      ///< What a call repeats within itself; rows give the time of one.
  std::optional<int> iters = {};  ///< At most so many samples.
  std::optional<int> warmup = {};  ///< At most so many calls before them.
  std::vector<Variant> variants = {};
};

/// Where rows go: kept on every rank; written on the first to the table and the result file.
class RowSink {
 public:
  RowSink() = default;
  RowSink(const RowSink&) = delete;
  RowSink& operator=(const RowSink&) = delete;
  virtual ~RowSink() = default;

  virtual void add(const Row& row) = 0;
  [[nodiscard]] virtual const std::vector<Row>& rows() const noexcept = 0;
  /// A remark, such as why a row is missing; the same one is made once.
  virtual void note(const std::string& text) = 0;
  /// Text among the rows.
  virtual void print(const std::string& text) = 0;
  virtual void progress(const std::string& text) = 0;
};

/// Set by signals. The ranks agree on it between rounds.
[[nodiscard]] bool interrupted() noexcept;
void interrupt() noexcept;

/// Collective: every rank runs the same cases.
class Runner {
 public:
  Runner(const Options& options, Bed& bed, ControlPlane& world, Lanes& lanes, RowSink& sink)
      : options_(options), bed_(bed), world_(world), lanes_(lanes), sink_(sink) {}

  /// Measures a case and adds its rows. Does nothing once stopped, nor for a payload that has been
  /// measured: rounding to whole shares can make two sizes one.
  void run(Case& work);

  /// Whether some rank was interrupted; equal on all ranks.
  [[nodiscard]] bool stopped() const noexcept { return stopped_; }
  /// Wrong elements so far, summed over ranks; equal on all ranks.
  [[nodiscard]] std::int64_t wrong() const noexcept { return wrong_; }

 private:
  struct State;

  [[nodiscard]] bool is_measured(const Case& work) const;
  void align();
  [[nodiscard]] std::int64_t check(const Variant& variant, const std::function<void()>& once);
  [[nodiscard]] std::int64_t choose_calls(const Case& work, std::vector<State>& states);
  [[nodiscard]] std::unique_ptr<ExecutableGraph> capture(const Variant& variant,
                                                         const std::function<void()>& work,
                                                         std::int64_t calls);
  [[nodiscard]] bool another_round(double started, int round);
  void finish(const Case& work, const std::vector<State>& states, std::int64_t calls);

  const Options& options_;
  Bed& bed_;
  ControlPlane& world_;
  Lanes& lanes_;
  RowSink& sink_;
  std::int64_t wrong_ = 0;
  bool stopped_ = false;
};

/// What every benchmark gets.
struct Session {
  const Options& options;
  Bed& bed;
  ControlPlane& world;
  Lanes& lanes;
  RawLibrary& raw;
  RawLibrary* loop;  ///< Or null.
  RowSink& sink;
  Runner& runner;

  [[nodiscard]] int ranks() const noexcept { return world.size(); }
  [[nodiscard]] int rank() const noexcept { return world.rank(); }
};

}  // namespace cohort::bench
