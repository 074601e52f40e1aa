// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "cohort/control_plane.hpp"
#include "cohort/merge_plan.hpp"
#include "cohort/stream.hpp"
#include "cohort/tensor.hpp"
#include "device.hpp"
#include "sizes.hpp"

/// \file
/// The communication of a decode, by one way. Every rank of the world makes the same calls, except
/// for the hand-over between stages. All are enqueued on the device's stream.

namespace decode_engine {

/// What a buffer that peers get from or send to is for.
enum class Use : std::uint8_t { attention, sums, logits, stages };

/// Partial products of a row-parallel layer and the residual stream that they go into.
struct Addition {
  cohort::TensorView sums;       ///< [B, hidden] of `Exchange::sum_type`.
  cohort::TensorView hidden;     ///< [B, hidden]
  cohort::ConstTensorView gain;  ///< [hidden]
  cohort::TensorView y;          ///< [B, hidden]: for the next layer.
};

class Exchange {
 public:
  Exchange() = default;
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;
  virtual ~Exchange() = default;

  /// Collective. Room for the largest step, before any of the calls below.
  virtual void reserve(std::int64_t batch) = 0;
  /// Collective.
  [[nodiscard]] virtual cohort::Tensor allocate(Use use, const cohort::Dims& shape,
                                                cohort::DType dtype) = 0;

  /// q [H, B, row] of the DCP group from this rank's [h, B, row].
  virtual void gather_query(const cohort::TensorView& q, const cohort::TensorView& own) = 0;
  /// This rank's heads [h, B, latent] from the partial attentions out [H, B, latent] and lse [B,
  /// H].
  virtual void merge(const cohort::TensorView& merged, const cohort::TensorView& out,
                     const cohort::TensorView& lse) = 0;
  /// Whether what it enqueues waits for the kernel in front, where that lets the next one be
  /// launched early.
  [[nodiscard]] virtual bool waits() const { return false; }
  /// In which partial products are added up over the ranks.
  [[nodiscard]] virtual cohort::DType sum_type() const = 0;
  /// Adds the sums up over the ranks, in place. True where the way does in the same call what
  /// `Device::add_and_normalize` does with them: then `sums` hold anything afterwards.
  [[nodiscard]] virtual bool reduce(const Addition& addition) = 0;
  /// logits [B, tp * share], of which the vocabulary counts, from this rank's [B, share].
  virtual void gather_logits(const cohort::TensorView& logits, const cohort::TensorView& own) = 0;
  virtual void receive(const cohort::TensorView& hidden) = 0;
  virtual void send(const cohort::TensorView& hidden) = 0;
  /// From the last stage to all.
  virtual void share(const cohort::TensorView& tokens) = 0;

  /// What `record` enqueues as a graph; the function that comes back launches it.
  [[nodiscard]] virtual std::function<void()> capture(const std::function<void()>& record) = 0;
  /// Waits for the stream, watching the peers where the library can.
  virtual void synchronize() = 0;
  /// Collective; nothing is called afterwards.
  virtual void close() = 0;
};

/// `Exchange::capture` for calls of which nothing but their stream has to know.
[[nodiscard]] inline std::function<void()> captured_on(cohort::StreamRef stream,
                                                       const std::function<void()>& record) {
  stream.driver().begin_capture(stream.native());
  record();
  return [stream, graph = std::shared_ptr<cohort::ExecutableGraph>(
                      stream.driver().end_capture(stream.native()))] { graph->launch(stream); };
}

/// The world's groups by Cohort.
[[nodiscard]] std::unique_ptr<Exchange> make_cohort_exchange(cohort::ControlPlane& world,
                                                             Device& device, const Sizes& sizes,
                                                             const Place& place,
                                                             cohort::MergePlan plan);

/// The bare library: the merge as engines run it, by gathered LSEs, a correction and a
/// reduce-scatter. MPI on the host.
[[nodiscard]] std::unique_ptr<Exchange> make_mpi_exchange(Device& device, const Sizes& sizes,
                                                          const Place& place);
/// NCCL on cards, in registered buffers where it has windows. Throws `cohort::ConfigError` where
/// the program was built without CUDA.
[[nodiscard]] std::unique_ptr<Exchange> make_nccl_exchange(cohort::ControlPlane& world,
                                                           Device& device, const Sizes& sizes,
                                                           const Place& place);

}  // namespace decode_engine
