// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <string>
#include <string_view>
#include <vector>

#include "cohort/error.hpp"
#include "cohort/group_coordinator.hpp"

/// \file
/// All groups of one rank together: whether they go on, and how they end.

namespace cohort::detail {

/// The groups of a state in the order in which all ranks form and leave them, or none once they are
/// gone. It does not own them.
class FormedGroups {
 public:
  /// World, TP, PP, DCP.
  [[nodiscard]] const std::vector<GroupCoordinator*>& all() const noexcept { return groups_; }
  /// Once they are formed.
  void assign(std::vector<GroupCoordinator*> groups) { groups_ = std::move(groups); }
  /// Before they go.
  void clear() noexcept { groups_.clear(); }

  /// Throws `UsageError` where each of them was shut down.
  void throw_if_all_closed(std::string_view call) const {
    if (std::all_of(groups_.begin(), groups_.end(),
                    [](const GroupCoordinator* group) { return group->closed(); })) {
      throw UsageError(fmt::format("{}: the ParallelState was used after shutdown", call));
    }
  }

  /// Whether a call of any is known to have failed, without asking the device.
  [[nodiscard]] bool failed() const noexcept {
    return std::any_of(groups_.begin(), groups_.end(),
                       [](const GroupCoordinator* group) { return group->failed(); });
  }

  /// What the others of all groups are told where a group has failed; empty where none has.
  [[nodiscard]] std::string reason_to_leave() const noexcept try {
    for (const GroupCoordinator* const group : groups_) {
      if (group->failed()) {
        return fmt::format("its ParallelState ends behind a failure in group {}", group->name());
      }
    }
    return {};
  } catch (const std::exception&) {
    return "failed";  // no memory for more
  }

  /// Tells the others of these groups why this rank leaves, those that are open.
  template <class Which>
  void tell(const std::string& reason, const Which& which) const noexcept {
    for (GroupCoordinator* const group : groups_) {
      if (which(group) && !group->closed()) {
        group->forsake_peers(reason);
      }
    }
  }

  /// All groups within one patience: a call of one holds up the device of all. Where there is a
  /// reason ranks may be gone, so no group waits for them any longer, each of which would take its
  /// time; and in no group do others wait for this rank.
  void settle(const std::string& reason) const noexcept {
    if (!reason.empty()) {
      tell(reason, [](const GroupCoordinator*) { return true; });
    }
    const auto deadline = Clock::now() + GroupCoordinator::kTeardownPatience;
    for (auto group = groups_.rbegin(); group != groups_.rend(); ++group) {
      (*group)->settle(
          std::max(std::chrono::milliseconds::zero(),
                   std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now())));
    }
  }

  /// Leaves them, the last first.
  void close() const noexcept {
    for (auto group = groups_.rbegin(); group != groups_.rend(); ++group) {
      (*group)->close();
    }
  }

 private:
  std::vector<GroupCoordinator*> groups_;
};

}  // namespace cohort::detail
