// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <optional>

#include "cohort/control_plane.hpp"
#include "cohort/error.hpp"
#include "cohort/flight_recorder.hpp"
#include "cohort/flight_ring.hpp"
#include "cohort/give_up.hpp"
#include "cohort/owner_process.hpp"
#include "cohort/traced_agreement.hpp"

/// \file
/// The steps of a group's transport on the host, as its records count them: each when it is
/// enqueued, and again when it runs, which for those in graphs is at every launch.

namespace cohort::host {

/// Of one group on one rank.
class HostSteps {
 public:
  /// @param ring  This rank's, or null where the group has none in shared memory.
  HostSteps(ControlPlane& control, TraceRing* ring, CallPath path) noexcept
      : control_(control), path_(path) {
    if (ring != nullptr) {
      count_in(*ring);
    }
  }

  /// A step is enqueued, or captured.
  void issue() noexcept { ++issued_; }
  [[nodiscard]] TransportStand stand() const noexcept { return {.steps = issued_, .path = path_}; }

  /// Runs a step. Its failure is reported to the group's recorder.
  template <class Step>
  void run(const Step& step) {
    count(&TraceProgress::entered);
    try {
      cohort::detail::reporting(control_.recorder(), step);
    } catch (const SymmetryError&) {
      keep(std::current_exception());
      throw;
    }
    if (has_differed_.load(std::memory_order_relaxed)) [[unlikely]] {
      has_differed_ = false;  // the ranks have gone on
    }
    count(&TraceProgress::left);
  }

  /// What the last step threw where the ranks differed in it. Any thread.
  [[nodiscard]] std::optional<cohort::detail::GiveUp> differed() const {
    if (!has_differed_) {
      return std::nullopt;
    }
    const std::lock_guard lock(mutex_);
    return differed_;
  }

 private:
  void keep(const std::exception_ptr& error) noexcept {
    const std::lock_guard lock(mutex_);
    try {
      differed_ = cohort::detail::GiveUp::because(error, control_.rank());
    } catch (const std::exception&) {
      differed_ = {};  // no memory for the reason
    }
    has_differed_ = true;
  }

  void count(std::uint64_t TraceProgress::*word) noexcept {
    if (ring_ == nullptr) {
      FlightRecorder* const recorder = control_.recorder();
      if (recorder == nullptr) {
        return;  // a transport without a group
      }
      count_in(recorder->own());
    }
    TraceRing::add(ring_->progress[0].*word, 1);
  }

  void count_in(TraceRing& ring) noexcept {
    ring_ = &ring;
    TraceRing::store(ring.looked, TraceRing::kLive);
  }

  ControlPlane& control_;
  TraceRing* ring_ = nullptr;
  CallPath path_;
  std::uint64_t issued_ = 0;
  std::atomic<bool> has_differed_{false};
  mutable OwnerMutex mutex_;  // of what follows
  cohort::detail::GiveUp differed_ = {};
};

}  // namespace cohort::host
