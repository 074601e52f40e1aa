// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cohort/agreement.hpp"
#include "cohort/error.hpp"
#include "cohort/formed_groups.hpp"
#include "cohort/graph_capture.hpp"
#include "cohort/group_coordinator.hpp"
#include "cohort/symmetric_arena.hpp"
#include "cohort/symmetric_scope.hpp"
#include "cohort/topology.hpp"
#include "cohort/transport.hpp"

/// \file
/// Arenas whose segments are registered with several groups of a state.

namespace cohort::detail {

/// The arenas of several groups that a state was asked for.
class GroupAudiences {
 public:
  /// Of these groups. What captures concern takes the arenas in.
  GroupAudiences(std::shared_ptr<const FormedGroups> formed,
                 std::shared_ptr<CaptureDomain> captures, std::shared_ptr<Backend> backend,
                 ArenaOptions options)
      : formed_(std::move(formed)),
        captures_(std::move(captures)),
        backend_(std::move(backend)),
        options_(options) {}

  /// See `ParallelState::audience`.
  [[nodiscard]] ScopeTarget of(const std::vector<GroupCoordinator*>& wanted) {
    const auto chosen = in_order(wanted);
    const std::string name = names_of(chosen);
    for (const auto& known : known_) {
      if (known.name == name) {
        return {known.arena.get(), backend_.get()};
      }
    }
    GroupCoordinator& covering = smallest_around(chosen);
    Audience audience{.control = &covering.control(), .everyone = covering.numbering()};
    std::vector<GroupCoordinator*> with_windows;
    for (GroupCoordinator* group : chosen) {
      for (Transport* transport : group->audience().transports) {
        audience.transports.push_back(transport);
        audience.groups.push_back(group->numbering());
        with_windows.push_back(group);
      }
    }
    const std::string registered = names_of(with_windows);
    agree(covering.control(),
          {.place = fmt::format("audience of the groups {}, of which [{}] have windows", name,
                                registered)});
    std::shared_ptr<SymmetricArena> arena;
    if (!with_windows.empty()) {
      arena = SymmetricArena::create(*backend_, registered, std::move(audience), options_);
      captures_->add(arena);
    }
    known_.push_back({name, arena});
    return {arena.get(), backend_.get()};
  }

  /// Before the groups go.
  void close() noexcept {
    for (const auto& known : known_) {
      if (known.arena != nullptr) {
        known.arena->close();
      }
    }
  }

 private:
  /// These groups in the state's order. Throws `UsageError` unless they are different ones of it.
  [[nodiscard]] std::vector<GroupCoordinator*> in_order(
      const std::vector<GroupCoordinator*>& wanted) const {
    std::vector<GroupCoordinator*> chosen;
    for (GroupCoordinator* group : formed_->all()) {
      if (std::find(wanted.begin(), wanted.end(), group) != wanted.end()) {
        chosen.push_back(group);
      }
    }
    if (chosen.empty() || chosen.size() != wanted.size()) {
      throw UsageError("audience groups: expected different groups of this ParallelState");
    }
    static_cast<void>(chosen.front()->audience());  // refused after shutdown
    return chosen;
  }

  /// "tp+dcp". Of kinds: the names of groups differ between the ranks of another group.
  [[nodiscard]] static std::string names_of(const std::vector<GroupCoordinator*>& groups) {
    std::string names;
    for (const GroupCoordinator* group : groups) {
      names += fmt::format("{}{}", names.empty() ? "" : "+", to_string(group->kind()));
    }
    return names;
  }

  /// Of the groups that hold every rank of these, the smallest, and the last of equal ones; the
  /// same kind on every rank.
  [[nodiscard]] GroupCoordinator& smallest_around(
      const std::vector<GroupCoordinator*>& inner) const {
    const auto holds = [&](const GroupCoordinator& outer) {
      return std::all_of(inner.begin(), inner.end(), [&](const GroupCoordinator* group) {
        return std::all_of(group->ranks().begin(), group->ranks().end(), [&](int rank) {
          const auto& ranks = outer.ranks();
          return std::find(ranks.begin(), ranks.end(), rank) != ranks.end();
        });
      });
    };
    GroupCoordinator* smallest = formed_->all().front();  // the world
    for (GroupCoordinator* group : formed_->all()) {
      if (group->size() <= smallest->size() && holds(*group)) {
        smallest = group;
      }
    }
    return *smallest;
  }

  /// An arena of several groups, or null where none of them has windows.
  struct Known {
    std::string name;
    std::shared_ptr<SymmetricArena> arena;
  };

  std::shared_ptr<const FormedGroups> formed_;
  std::shared_ptr<CaptureDomain> captures_;
  std::shared_ptr<Backend> backend_;
  ArenaOptions options_;
  std::vector<Known> known_;
};

}  // namespace cohort::detail
