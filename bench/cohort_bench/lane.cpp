// SPDX-License-Identifier: Apache-2.0
#include "lane.hpp"

#include <fmt/format.h>

#include <numeric>

#include "cohort/symmetric_policy.hpp"
#include "cohort/symmetric_scope.hpp"

namespace cohort::bench {

namespace {

[[nodiscard]] GroupParts form(Bed& bed, ControlPlane& world, const LaneConfig& config,
                              std::uint64_t number) {
  constexpr std::uint64_t kFirstGeneration = 1000;
  GroupParts parts;
  parts.kind = GroupKind::decode_context_parallel;
  parts.name = fmt::format("bench[{}]", number);
  parts.ranks.resize(static_cast<std::size_t>(world.size()));
  std::iota(parts.ranks.begin(), parts.ranks.end(), 0);
  parts.control = world.subgroup(parts.ranks, kFirstGeneration + number, parts.name);
  // An alias that owns nothing: the bed outlives every lane.
  parts.backend = std::shared_ptr<Backend>(std::shared_ptr<void>(), &bed.backend(config.own));
  SymmetricCapabilities found;
  if (world.size() > 1) {
    parts.transport = parts.backend->connect(*parts.control);
    found = parts.transport->capabilities();
    if (PeerKernels* kernels = parts.transport->peer_kernels();
        config.own == OwnKernels::all && kernels != nullptr) {
      constexpr std::size_t kLargestOwnCollective = std::size_t{16} << 20;
      kernels->reserve(kLargestOwnCollective);
    }
  }
  const SymmetricOptions options{.enabled = config.symmetric,
                                 .selection = Selection::all(),
                                 .peer_mapping = config.own != OwnKernels::none};
  parts.decision =
      decide(options, parts.kind, {.tp = world.size(), .pp = 1, .dcp = world.size()}, found);
  return parts;
}

}  // namespace

Lane::Lane(Bed& bed, ControlPlane& world, const LaneConfig& config, std::uint64_t number)
    : bed_(bed), config_(config) {
  GroupParts parts = form(bed, world, config, number);
  MergeOptions merge = config.merge;
  if (config.own == OwnKernels::compare && bed.kind() == BackendKind::host) {
    obstacle_ = "on the host places are no concern of a call";
  } else if (config.own != OwnKernels::none && !parts.decision.peer_mapping.on) {
    obstacle_ = fmt::format("no peer mapping: {}", to_string(parts.decision.peer_mapping.reason));
    merge.plan = MergePlan::packed;  // the group would refuse to exist
  } else if (config.symmetric && !parts.decision.nccl_windows.on) {
    obstacle_ = fmt::format("no windows: {}", to_string(parts.decision.nccl_windows.reason));
  }
  group_ = std::make_unique<DecodeContextParallelGroup>(std::move(parts), merge);
  captures_.add(group_->arena());
}

Buffer Lane::allocate(const Dims& shape, DType dtype) {
  const SymmetricScope scope(*group_, bed_.stream());
  auto tensor = std::make_shared<Tensor>(empty(shape, dtype));
  return {tensor->view(), tensor};
}

Lane& Lanes::get(const LaneConfig& config) {
  for (const auto& lane : lanes_) {
    if (lane->config() == config) {
      return *lane;
    }
  }
  lanes_.push_back(std::make_unique<Lane>(bed_, world_, config, lanes_.size()));
  return *lanes_.back();
}

void Lanes::close() {
  for (auto lane = lanes_.rbegin(); lane != lanes_.rend(); ++lane) {
    (*lane)->group().shutdown();
  }
  lanes_.clear();
}

}  // namespace cohort::bench
