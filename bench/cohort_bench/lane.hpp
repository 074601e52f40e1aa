// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "bed.hpp"
#include "cohort/decode_context_parallel.hpp"
#include "cohort/graph_capture.hpp"

/// \file
/// Groups of all ranks, one for each way that Cohort is measured.

namespace cohort::bench {

struct LaneConfig {
  bool symmetric = false;  ///< Callers' buffers lie in windows.
  OwnKernels own = OwnKernels::none;
  MergeOptions merge = {.plan = MergePlan::packed};

  [[nodiscard]] bool operator==(const LaneConfig& other) const noexcept {
    return symmetric == other.symmetric && own == other.own && merge.plan == other.merge.plan &&
           merge.staged_precision == other.merge.staged_precision;
  }
};

/// A DCP group of all ranks with its own transport.
class Lane {
 public:
  /// Collective. `number` tells the lanes apart.
  Lane(Bed& bed, ControlPlane& world, const LaneConfig& config, std::uint64_t number);
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  [[nodiscard]] const LaneConfig& config() const noexcept { return config_; }
  [[nodiscard]] DecodeContextParallelGroup& group() noexcept { return *group_; }
  /// Why the lane is not what was asked for, such as windows that the policy refused; or "".
  [[nodiscard]] const std::string& obstacle() const noexcept { return obstacle_; }
  /// Collective. In windows where the lane is symmetric.
  [[nodiscard]] Buffer allocate(const Dims& shape, DType dtype);
  [[nodiscard]] const CaptureDomain& captures() const noexcept { return captures_; }

 private:
  Bed& bed_;
  LaneConfig config_;
  std::unique_ptr<DecodeContextParallelGroup> group_;
  CaptureDomain captures_;
  std::string obstacle_;
};

/// Makes lanes when they are first asked for: a transport costs time and device memory.
class Lanes {
 public:
  Lanes(Bed& bed, ControlPlane& world) : bed_(bed), world_(world) {}

  /// Collective.
  [[nodiscard]] Lane& get(const LaneConfig& config);
  /// Collective. Leaves all groups.
  void close();

 private:
  Bed& bed_;
  ControlPlane& world_;
  std::vector<std::unique_ptr<Lane>> lanes_;
};

}  // namespace cohort::bench
