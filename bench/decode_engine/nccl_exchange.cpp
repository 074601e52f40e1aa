// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>
#include <nccl.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "cohort/cuda.hpp"
#include "cohort/dcp/partials.hpp"
#include "cohort/nccl/communicator.hpp"
#include "cohort/nccl/nccl_check.hpp"
#include "cohort/nccl/nccl_window.hpp"
#include "exchange.hpp"

namespace decode_engine {

namespace {

using cohort::ConstTensorView;
using cohort::DType;
using cohort::nccl_check;
using cohort::TensorView;

/// A communicator of NCCL's own, with memory as an engine registers it.
class NcclGroup {
 public:
  /// Collective over all ranks of `world`. Of one rank it has nothing.
  NcclGroup(cohort::ControlPlane& world, int colour, int key, const char* name,
            cohort::Backend& backend)
      : control_(world.split(colour, key, name)), backend_(backend) {
    if (control_->size() > 1) {
      communicator_ = cohort::Communicator::create(*control_, backend.device().index);
    }
  }

  [[nodiscard]] bool is_alone() const noexcept { return communicator_ == nullptr; }
  [[nodiscard]] ncclComm_t get() const { return communicator_->get(); }

  /// Gives all memory back; none of it is in use.
  void free() noexcept { memory_.clear(); }
  /// Collective. Registered, where NCCL has windows.
  [[nodiscard]] TensorView allocate(const cohort::Dims& shape, DType dtype) {
    const std::size_t bytes =
        static_cast<std::size_t>(cohort::numel(shape)) * cohort::size_of(dtype);
    const std::size_t unit = backend_.segment_granularity();
    auto& made = memory_.emplace_back();
    made.segment = std::make_unique<cohort::NcclSegment>(
        backend_.device().index, std::max(unit, (bytes + unit - 1) / unit * unit));
    if (!is_alone() && cohort::nccl_has_windows()) {
      control_->barrier();
      made.window = cohort::NcclWindow::create(communicator_, *made.segment, *control_);
    }
    return {made.segment->data(), dtype, shape, backend_.device()};
  }

 private:
  struct Registered {
    std::unique_ptr<cohort::NcclSegment> segment;
    std::unique_ptr<cohort::Window> window;  // goes first
  };

  std::unique_ptr<cohort::ControlPlane> control_;
  cohort::Backend& backend_;
  std::shared_ptr<cohort::Communicator> communicator_;
  std::vector<Registered> memory_;
};

class NcclExchange final : public Exchange {
 public:
  NcclExchange(cohort::ControlPlane& world, Device& device, const Sizes& sizes, const Place& place)
      : device_(device),
        sizes_(sizes),
        place_(place),
        tp_(world, place.pp_rank, place.tp_rank, "raw tp", *device.backend()),
        dcp_(world, place.pp_rank * place.tp + place.tp_rank / place.dcp, place.dcp_rank, "raw dcp",
             *device.backend()),
        pp_(world, place.tp_rank, place.pp_rank, "raw pp", *device.backend()) {}

  void reserve(std::int64_t batch) override {
    device_.synchronize();
    for (NcclGroup* group : {&tp_, &dcp_, &pp_}) {
      group->free();
    }
    const std::int64_t own = place_.own_heads(sizes_);
    lses_ = dcp_.allocate({place_.dcp, batch, own * place_.dcp}, DType::f32);
    corrected_ = dcp_.allocate({own * place_.dcp, batch, sizes_.latent}, DType::bf16);
    shares_ = tp_.allocate({place_.tp, batch, place_.vocabulary_share(sizes_)}, DType::f32);
  }
  cohort::Tensor allocate(Use use, const cohort::Dims& shape, DType dtype) override {
    const TensorView memory = group(use).allocate(shape, dtype);
    return {memory, nullptr, 0};
  }

  void gather_query(const TensorView& q, const TensorView& own) override { gather(dcp_, q, own); }
  void merge(const TensorView& merged, const TensorView& out, const TensorView& lse) override {
    gather(dcp_, lses_, lse);
    device_.backend()->ops().correct_partial(
        {.out = cohort::ConstTensorView(out.transpose(0, 1)).unsqueeze(),
         .lse = cohort::ConstTensorView(lse).unsqueeze(),
         .base = cohort::LseBase::e},
        lses_, place_.dcp_rank, corrected_.transpose(0, 1), device_.stream());
    nccl_check(ncclReduceScatter(corrected_.data(), merged.data(), count_of(merged), ncclBfloat16,
                                 ncclSum, dcp_.get(), stream()),
               "ncclReduceScatter");
  }
  DType sum_type() const override { return DType::bf16; }
  bool reduce(const Addition& addition) override {
    const TensorView& sums = addition.sums;
    if (!tp_.is_alone()) {
      nccl_check(ncclAllReduce(sums.data(), sums.data(), count_of(sums), ncclBfloat16, ncclSum,
                               tp_.get(), stream()),
                 "ncclAllReduce");
    }
    return false;
  }
  void gather_logits(const TensorView& logits, const TensorView& own) override {
    gather(tp_, shares_, own);
    device_.backend()->ops().copy(shares_.transpose(0, 1),
                                  logits.reshape({logits.size(0), place_.tp, own.size(1)}),
                                  device_.stream());
  }
  void receive(const TensorView& hidden) override {
    nccl_check(
        ncclRecv(hidden.data(), hidden.bytes(), ncclUint8, place_.pp_rank - 1, pp_.get(), stream()),
        "ncclRecv");
  }
  void send(const TensorView& hidden) override {
    nccl_check(
        ncclSend(hidden.data(), hidden.bytes(), ncclUint8, place_.pp_rank + 1, pp_.get(), stream()),
        "ncclSend");
  }
  void share(const TensorView& tokens) override {
    if (!pp_.is_alone()) {
      nccl_check(ncclBroadcast(tokens.data(), tokens.data(), tokens.bytes(), ncclUint8,
                               place_.pp - 1, pp_.get(), stream()),
                 "ncclBroadcast");
    }
  }

  std::function<void()> capture(const std::function<void()>& record) override {
    return captured_on(device_.stream(), record);
  }
  void synchronize() override { device_.synchronize(); }
  void close() override { device_.synchronize(); }

 private:
  [[nodiscard]] cudaStream_t stream() const {
    return static_cast<cudaStream_t>(device_.stream().native());
  }
  [[nodiscard]] static std::size_t count_of(const TensorView& x) {
    return static_cast<std::size_t>(x.numel());
  }
  void gather(const NcclGroup& group, const TensorView& all, const TensorView& own) {
    if (group.is_alone()) {
      cohort::cuda_check(
          cudaMemcpyAsync(all.data(), own.data(), own.bytes(), cudaMemcpyDeviceToDevice, stream()),
          "cudaMemcpyAsync");
      return;
    }
    nccl_check(ncclAllGather(own.data(), all.data(), own.bytes(), ncclUint8, group.get(), stream()),
               "ncclAllGather");
  }
  [[nodiscard]] NcclGroup& group(Use use) {
    return use == Use::attention ? dcp_ : use == Use::stages ? pp_ : tp_;
  }

  Device& device_;
  Sizes sizes_;
  Place place_;
  NcclGroup tp_, dcp_, pp_;
  TensorView lses_, corrected_, shares_;
};

}  // namespace

std::unique_ptr<Exchange> make_nccl_exchange(cohort::ControlPlane& world, Device& device,
                                             const Sizes& sizes, const Place& place) {
  return std::make_unique<NcclExchange>(world, device, sizes, place);
}

}  // namespace decode_engine
