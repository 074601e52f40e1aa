// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cohort/message_control_plane.hpp>
#include <cohort/thread_control_planes.hpp>
#include <cstddef>
#include <memory>

#include "support/threads.hpp"

/// \file
/// Messages by which tests of control planes know the rank and the round, and planes whose limits
/// differ.

namespace cohort::test {

/// As many bytes as the rank says, each telling rank and position.
inline Bytes message_of(int rank, int round = 0) {
  Bytes bytes(static_cast<std::size_t>(3 * rank + round));
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<std::byte>(17 * rank + 5 * round + static_cast<int>(i));
  }
  return bytes;
}

/// Of one of the ranks that share a hub.
inline MessageControlPlane plane_of(const std::shared_ptr<detail::ThreadHub>& hub, int rank,
                                    std::chrono::milliseconds limit) {
  return MessageControlPlane(std::make_shared<detail::ThreadMessenger>(hub, rank), limit);
}

inline void check_all_gather(ControlPlane& plane, int round) {
  const auto all = plane.all_gather(message_of(plane.rank(), round));
  check_equal(all.size(), static_cast<std::size_t>(plane.size()), "number of messages");
  for (int r = 0; r < plane.size(); ++r) {
    check(all[static_cast<std::size_t>(r)] == message_of(r, round), "message of each rank");
  }
}

}  // namespace cohort::test
