// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <string>

#include "cohort/flight_ring.hpp"

/// \file
/// Ranges in NVIDIA's profilers, named by call and group, such as "all_gather tp[0]". The headers
/// of NVTX stay in the library's sources.

namespace cohort {

/// Of one group. Without a tool that listens a range costs two loads.
class ProfilerRanges {
 public:
  explicit ProfilerRanges(const std::string& group);

  /// A range of this thread begins.
  void begin(TraceCall call) const noexcept {
    if (names_.front() != nullptr) [[unlikely]] {
      push(call);
    }
  }
  /// The last one that began ends.
  void end() const noexcept {
    if (names_.front() != nullptr) [[unlikely]] {
      pop();
    }
  }

 private:
  void push(TraceCall call) const noexcept;
  static void pop() noexcept;

  static constexpr std::size_t kCalls = static_cast<std::size_t>(TraceCall::launch) + 1;

  std::array<void*, kCalls> names_{};  // registered with the tool; null without one
};

}  // namespace cohort
