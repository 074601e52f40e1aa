// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "cohort/dcp/kv_shard.hpp"
#include "exchange.hpp"
#include "model.hpp"

/// \file
/// One rank's part of a decode: its weights, its share of the cache, and the step. The step is the
/// same by every way; only its exchange differs.

namespace decode_engine {

/// The weights of a rank. Local.
class Weights {
 public:
  Weights(const Model& model, Device& device, const Place& place);

  struct Layer {
    const BFloat16 *attention_gain, *query_down, *query_gain, *query_up, *kv_down, *kv_gain,
        *key_up, *value_up, *output, *inner_gain, *gate_up, *down;
  };
  [[nodiscard]] const std::vector<Layer>& layers() const noexcept { return layers_; }
  [[nodiscard]] const BFloat16* embedding() const noexcept { return embedding_; }
  [[nodiscard]] const BFloat16* final_gain() const noexcept { return final_gain_; }
  [[nodiscard]] const BFloat16* head() const noexcept { return head_; }

 private:
  std::vector<cohort::Tensor> memory_;
  std::vector<Layer> layers_;
  const BFloat16* embedding_ = nullptr;
  const BFloat16* final_gain_ = nullptr;
  const BFloat16* head_ = nullptr;
};

/// Rows of a rank's tokens: [layers of the stage, batch, capacity, row]. Engines that do not run at
/// the same time can share one.
class Cache {
 public:
  /// Tokens of a sequence have room in multiples of so many.
  static constexpr std::int64_t kBlock = 128;

  /// For sequences of up to `tokens` tokens; full of noise. Local.
  Cache(const Sizes& sizes, Device& device, const Place& place, std::int64_t batch,
        std::int64_t tokens);

  [[nodiscard]] std::int64_t capacity() const noexcept { return memory_.view().size(2); }
  [[nodiscard]] BFloat16* layer(std::int64_t layer) const;

 private:
  cohort::Tensor memory_;
};

class Engine {
 public:
  /// Collective. Reserves whatever steps need.
  Engine(const Sizes& sizes, const Weights& weights, const Cache& cache, Device& device,
         Exchange& exchange, const Place& place, std::int64_t batch);
  Engine(const Engine&) = delete;  // what is captured refers to it
  Engine& operator=(const Engine&) = delete;

  /// Collective. Steps are graphs from here on; `start` is called before the next.
  void capture();
  /// To see that checks see it: from here on the last sum of a step is left out.
  void spoil() noexcept { spoilt_ = true; }

  /// Every sequence has so many tokens from here on, and the next step takes these; the stream is
  /// idle.
  void start(std::int64_t length);
  void set_tokens(std::span<const std::int32_t> tokens);
  /// Collective. Enqueues a step: takes in the tokens, and chooses the next ones, which the step
  /// behind it takes in.
  void enqueue_step() { run(step_, false); }
  /// Collective. Enqueues a step that notes what its time goes into.
  void enqueue_marked_step() { run(marked_step_, true); }
  /// Seconds of the last marked step, by kind. The stream is idle for these.
  [[nodiscard]] std::array<double, kKinds> seconds_by_kind();
  /// Stretches of each kind that a marked step has: each has a mark that takes time itself.
  [[nodiscard]] std::array<double, kKinds> stretches() const;
  [[nodiscard]] std::vector<std::int32_t> tokens();
  /// [batch, hidden] behind the stage's layers: the same on every rank of the TP group.
  [[nodiscard]] std::vector<BFloat16> hidden();
  /// [batch, vocabulary], on the last stage.
  [[nodiscard]] std::vector<float> logits();

  void synchronize() { exchange_.synchronize(); }

 private:
  void run(const std::function<void()>& graph, bool marked);
  void record(bool marked);
  void add_sums(const BFloat16* gain, bool of_all);
  void enqueue_attention(std::size_t layer);
  void enqueue_swiglu(std::size_t layer);
  void enqueue_choice();
  void enter(Kind kind);
  [[nodiscard]] cohort::Tensor ordinary(const cohort::Dims& shape, cohort::DType dtype);
  void multiply(const BFloat16* x, std::int64_t in, const BFloat16* w, const cohort::Tensor& y);
  [[nodiscard]] Turn* turns() const { return static_cast<Turn*>(turns_.data()); }

  Sizes sizes_;
  const Weights& weights_;
  const Cache& cache_;
  Device& device_;
  Exchange& exchange_;
  Place place_;
  std::int64_t batch_, own_heads_, all_heads_;
  cohort::dcp::KvShard shard_;

  cohort::Tensor lengths_;   ///< [B] i32
  cohort::Tensor turns_;     ///< [B, rope / 2] pairs of f32
  cohort::Tensor counts_;    ///< [B] i32: of them on this rank
  cohort::Tensor slots_;     ///< [B, 1] i64
  cohort::Tensor squeezed_;  ///< [B, query_rank], and normalized
  cohort::Tensor query_latent_;
  cohort::Tensor heads_;  ///< [B, h, nope + rope]
  cohort::Tensor kv_;     ///< [B, row]
  cohort::Tensor attention_room_;
  cohort::Tensor out_;                  ///< [H, B, latent]
  cohort::Tensor lse_;                  ///< [B, H]
  cohort::Tensor values_;               ///< [B, h * value]
  cohort::Tensor gate_up_;              ///< [B, 2 * inner of the rank]
  cohort::Tensor gated_;                ///< [B, inner of the rank]
  cohort::Tensor own_query_, query_;    ///< [h, B, row] and [H, B, row]
  cohort::Tensor merged_;               ///< [h, B, latent]
  cohort::Tensor sums_, x_;             ///< [B, hidden]
  cohort::Tensor own_logits_, logits_;  ///< [B, share] and [B, tp * share]
  cohort::Tensor hidden_;               ///< [B, hidden]
  cohort::Tensor tokens_;               ///< [B] i32

  std::function<void()> step_, marked_step_;
  std::vector<Kind> marks_;  ///< of the marked step
  bool marking_ = false;
  bool spoilt_ = false;
};

}  // namespace decode_engine
