// SPDX-License-Identifier: Apache-2.0
#include <vector>

#include "cohort/parallel_state.hpp"
#include "exchange.hpp"
#include "rotation.hpp"

namespace decode_engine {

namespace {

using cohort::TensorView;

class CohortExchange final : public Exchange {
 public:
  CohortExchange(cohort::ControlPlane& world, Device& device, const Sizes& sizes,
                 const Place& place, cohort::MergePlan plan)
      : device_(device),
        sizes_(sizes),
        place_(place),
        state_(cohort::ParallelState::create(
            world, {.layout = {.tp = place.tp, .pp = place.pp, .dcp = place.dcp},
                    .backend = device.backend(),
                    .symmetric = {.enabled = true, .selection = cohort::Selection::all()},
                    .merge = {.plan = plan}})) {}

  void reserve(std::int64_t batch) override {
    state_.tp().reserve_for_calls(
        std::vector<cohort::CollectiveShape>{{.collective = cohort::Collective::all_reduce_rms_norm,
                                              .shape = {batch, sizes_.hidden},
                                              .dtype = cohort::DType::bf16}});
    if (place_.dcp > 1) {
      state_.dcp().attention_waits(true);
      state_.dcp().reserve_for({.batch = batch,
                                .heads = place_.own_heads(sizes_) * place_.dcp,
                                .latent = sizes_.latent,
                                .rope = sizes_.rope,
                                .value = sizes_.latent});
    }
  }
  cohort::Tensor allocate(Use use, const cohort::Dims& shape, cohort::DType dtype) override {
    const cohort::SymmetricScope scope(group(use), device_.stream());
    return cohort::empty(shape, dtype);
  }

  void gather_query(const TensorView& q, const TensorView& own) override {
    const TensorView mine = own.transpose(0, 1);
    state_.dcp().gather_query_into(q.transpose(0, 1), mine.slice(2, 0, sizes_.latent),
                                   mine.slice(2, sizes_.latent, sizes_.rope), device_.stream());
  }
  void merge(const TensorView& merged, const TensorView& out, const TensorView& lse) override {
    state_.dcp().merge_attention_into(merged.transpose(0, 1), out.transpose(0, 1), lse,
                                      cohort::LseBase::e, device_.stream());
  }
  bool waits() const override { return true; }
  cohort::DType sum_type() const override { return cohort::DType::bf16; }
  bool reduce(const Addition& a) override {
    state_.tp().all_reduce_rms_norm_into(
        a.y, a.sums,
        {.residual = a.hidden, .weight = a.gain, .epsilon = static_cast<float>(kNormEpsilon)},
        device_.stream());
    return true;
  }
  void gather_logits(const TensorView& logits, const TensorView& own) override {
    state_.tp().gather_vocabulary_into(logits.slice(1, 0, sizes_.vocabulary), own,
                                       sizes_.vocabulary, device_.stream());
  }
  void receive(const TensorView& hidden) override {
    state_.pp().recv(hidden, *state_.pp().prev(), device_.stream());
  }
  void send(const TensorView& hidden) override {
    state_.pp().send(hidden, *state_.pp().next(), device_.stream());
  }
  void share(const TensorView& tokens) override {
    state_.pp().broadcast(tokens, place_.pp - 1, device_.stream());
  }

  std::function<void()> capture(const std::function<void()>& record) override {
    return [this, graph = std::make_shared<cohort::CapturedGraph>(state_.capture(
                      device_.stream(), record))] { graph->launch(device_.stream()); };
  }
  void synchronize() override {
    state_.synchronize(device_.stream(), cohort::kDefaultTimeLimit);
    device_.synchronize();
  }
  void close() override { state_.shutdown(); }

 private:
  [[nodiscard]] cohort::GroupCoordinator& group(Use use) {
    switch (use) {
      case Use::attention:
        return state_.dcp();
      case Use::stages:
        return state_.pp();
      case Use::sums:
      case Use::logits:
        break;
    }
    return state_.tp();
  }

  Device& device_;
  Sizes sizes_;
  Place place_;
  cohort::ParallelState state_;
};

}  // namespace

std::unique_ptr<Exchange> make_cohort_exchange(cohort::ControlPlane& world, Device& device,
                                               const Sizes& sizes, const Place& place,
                                               cohort::MergePlan plan) {
  return std::make_unique<CohortExchange>(world, device, sizes, place, plan);
}

}  // namespace decode_engine
