// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "attention.hpp"
#include "cohort/dcp/kv_shard.hpp"
#include "cohort/parallel_state.hpp"
#include "model.hpp"
#include "options.hpp"
#include "support/machine.hpp"

/// \file
/// One rank's part of a decode: its buffers, its share of the KV cache, and the step.

namespace dcp_decode {

using example::Machine;
using example::Mirrored;

/// What the time of a step goes into.
enum Phase : std::size_t {
  kGather,
  kAttention,
  kMerge,
  kReduce,
  kHandOver,
  kReference,
  kPhases,
};
inline constexpr std::array<std::string_view, kPhases> kPhaseNames = {
    "gather_query",        "attention", "merge_attention",
    "row_parallel_reduce", "hand_over", "reference"};

class Decoder {
 public:
  /// Collective. Reserves all symmetric memory that steps need, fills the caches, and captures a
  /// layer where the options say so; afterwards nothing grows.
  Decoder(const Options& options, cohort::ParallelState& state, Machine& machine);
  Decoder(const Decoder&) = delete;  // what is captured refers to it
  Decoder& operator=(const Decoder&) = delete;

  /// Collective. Decodes one token of every sequence and compares with the reference.
  void step();

  [[nodiscard]] const Deviation& deviation() const { return deviation_; }
  /// Of every merged element of every step so far.
  [[nodiscard]] std::uint64_t output_hash() const { return hash_; }
  [[nodiscard]] const std::array<double, kPhases>& seconds() const { return seconds_; }
  /// Tokens in the cache, all sequences, and how many of them this rank holds.
  [[nodiscard]] std::int64_t tokens() const;
  [[nodiscard]] std::int64_t own_tokens() const;
  /// Sequences of which this rank holds no token.
  [[nodiscard]] std::int64_t empty_shards() const;

 private:
  using Time = std::chrono::steady_clock::time_point;

  [[nodiscard]] cohort::Tensor ordinary(const cohort::Dims& shape, cohort::DType dtype);
  [[nodiscard]] cohort::Tensor symmetric(const cohort::GroupCoordinator& group,
                                         const cohort::Dims& shape, cohort::DType dtype);

  void fill_context();
  void append(std::int64_t sequence, std::span<const BFloat16> row);

  void begin_step();
  void enqueue_layer();
  void attend_locally();
  void project();
  void check_step();
  void finish_step();

  [[nodiscard]] std::span<BFloat16> hidden_of(std::int64_t sequence);
  void mark(std::size_t place);
  void spend(Phase phase, Time since);

  Options options_;
  cohort::ParallelState& state_;
  cohort::StreamRef stream_;
  cohort::dcp::KvShard shard_;
  std::int64_t own_heads_;
  std::int64_t group_heads_;  ///< of the DCP group
  Layer layer_;

  std::vector<std::int64_t> lengths_;
  std::vector<std::vector<BFloat16>> shards_;  ///< rows of this rank's tokens, by sequence
  std::vector<std::vector<BFloat16>> caches_;  ///< all rows, for the reference

  Mirrored<BFloat16> hidden_;                  ///< [B, width]
  Mirrored<std::int64_t> tokens_;              ///< [B]: chosen by the last stage in the step before
  Mirrored<BFloat16> nope_;                    ///< [B, H/tp, latent]
  Mirrored<BFloat16> pe_;                      ///< [B, H/tp, rope]
  Mirrored<BFloat16> out_;                     ///< [B, heads of the DCP group, value]
  Mirrored<float> lse_;                        ///< [B, heads of the DCP group]
  std::optional<Mirrored<BFloat16>> query_;    ///< [B, heads of the DCP group, width], symmetric
  std::optional<Mirrored<BFloat16>> merged_;   ///< [B, H/tp, value], symmetric
  std::optional<Mirrored<float>> merged_lse_;  ///< [B, H/tp], symmetric
  std::optional<Mirrored<float>> projected_;   ///< [B, width]
  std::optional<cohort::CapturedGraph> graph_;  ///< of `enqueue_layer`

  std::array<Time, kReduce + 2> marks_{};
  std::array<double, kPhases> seconds_{};
  Deviation deviation_;
  std::uint64_t hash_ = 0xcbf29ce484222325ULL;
};

}  // namespace dcp_decode
