// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <optional>
#include <string_view>
#include <vector>

#include "cohort/error.hpp"
#include "cohort/give_up.hpp"
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

  /// A failure, in the numbers of the group in which it was.
  struct Cause {
    const GroupCoordinator* group;
    GiveUp why;
  };

  /// What the others of all groups are told where a group has failed, or where its ranks differed
  /// in its last call and do not go on; nothing where neither is so.
  [[nodiscard]] std::optional<Cause> reason_to_leave() const noexcept try {
    const auto failed = std::find_if(groups_.begin(), groups_.end(),
                                     [](const GroupCoordinator* group) { return group->failed(); });
    if (failed != groups_.end()) {
      return cause_of(**failed, std::make_exception_ptr(Error("a call failed")));
    }
    for (const GroupCoordinator* const group : groups_) {
      if (auto differed = group->differed()) {
        return Cause{group, *std::move(differed)};
      }
    }
    return std::nullopt;
  } catch (const std::exception&) {
    return Cause{groups_.front(), {}};  // no memory for more
  }
  /// The first cause of a failure of `group`, behind which this rank threw `error`.
  [[nodiscard]] static Cause cause_of(const GroupCoordinator& group,
                                      const std::exception_ptr& error) noexcept try {
    return {&group, group.cause(error)};
  } catch (const std::exception&) {
    return {&group, {}};  // no memory for more
  }

  /// Tells the others of all groups why this rank leaves, of those that are open: of each that the
  /// cause is another's, and who is at fault in its own numbers.
  void tell(const Cause& cause) const noexcept {
    for (GroupCoordinator* const group : groups_) {
      if (group->closed()) {
        continue;
      }
      try {
        group->forsake_peers(cause.why.across(cause.group->numbering(), group->numbering()));
      } catch (const std::exception&) {
        group->forsake_peers(GiveUp{});  // no memory for the cause
      }
    }
  }

  /// All groups within one patience: a call of one holds up the device of all. Where there is a
  /// cause ranks may be gone, so no group waits for them any longer, each of which would take its
  /// time; and in no group do others wait for this rank.
  void settle(const std::optional<Cause>& cause) const noexcept {
    if (cause) {
      tell(*cause);
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
