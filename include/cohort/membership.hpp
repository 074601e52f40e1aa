// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cohort/error.hpp"
#include "cohort/hash.hpp"
#include "cohort/joined.hpp"

/// \file
/// Who is in a group of a control plane, by which numbers, and which messages are the group's.

namespace cohort::detail {

/// A group of ranks of one messenger, as one of them sees it. Ranks are numbers in the group,
/// members the same in the messenger.
class Membership {
 public:
  /// All ranks of the messenger.
  Membership(std::string name, int rank, int size)
      : name_(std::move(name)),
        members_(static_cast<std::size_t>(size)),
        rank_(rank),
        channel_(kHashSeed) {
    std::iota(members_.begin(), members_.end(), 0);
  }

  /// Of these ranks of this group, in the given order: each generation of the same list has
  /// messages of its own. Throws `UsageError` where the list is not a set of ranks that holds this
  /// one.
  [[nodiscard]] Membership subgroup(std::span<const int> ranks, std::uint64_t generation,
                                    std::string name) const {
    std::vector<int> members;
    std::uint64_t channel = mix(channel_, generation);
    int rank = -1;
    for (const int r : ranks) {
      if (r < 0 || r >= size() || std::count(ranks.begin(), ranks.end(), r) != 1) {
        throw UsageError(fmt::format("subgroup {}: {} is not a list of different ranks of {}", name,
                                     joined(ranks, ","), name_));
      }
      if (r == rank_) {
        rank = static_cast<int>(members.size());
      }
      members.push_back(member(r));
      channel = mix(channel, static_cast<std::uint64_t>(members.back()));
    }
    if (rank < 0) {
      throw UsageError(fmt::format("subgroup {}: the list {} does not hold this rank, {}", name,
                                   joined(ranks, ","), rank_));
    }
    Membership group{std::move(name), std::move(members), rank, channel};
    group.parent_ = std::make_shared<const Membership>(*this);
    return group;
  }

  [[nodiscard]] const std::string& name() const noexcept { return name_; }
  [[nodiscard]] int rank() const noexcept { return rank_; }
  [[nodiscard]] int size() const noexcept { return static_cast<int>(members_.size()); }
  /// The number that its messages carry.
  [[nodiscard]] std::uint64_t channel() const noexcept { return channel_; }

  [[nodiscard]] int member(int rank) const { return members_[static_cast<std::size_t>(rank)]; }
  [[nodiscard]] std::span<const int> members() const noexcept { return members_; }
  [[nodiscard]] std::span<const int> only(int rank) const { return from(rank).first(1); }
  /// From that rank on.
  [[nodiscard]] std::span<const int> from(int rank) const {
    return members().subspan(static_cast<std::size_t>(rank));
  }
  /// `size()` for one that is no member.
  [[nodiscard]] int rank_of(int member) const {
    return static_cast<int>(std::find(members_.begin(), members_.end(), member) - members_.begin());
  }

  /// The group of which this one is a part; null for that of all ranks.
  [[nodiscard]] const Membership* parent() const noexcept { return parent_.get(); }
  /// The smallest group that holds them all, of this one and those of which it is a part.
  [[nodiscard]] const Membership& home_of(std::span<const int> members) const {
    const Membership* group = this;
    const auto is_elsewhere = [&](int member) { return group->rank_of(member) == group->size(); };
    while (group->parent() != nullptr &&
           std::any_of(members.begin(), members.end(), is_elsewhere)) {
      group = group->parent();
    }
    return *group;
  }

  /// Throws `UsageError` for what is no rank of the group.
  void check_rank(std::string_view argument, int rank) const {
    if (rank < 0 || rank >= size()) {
      throw UsageError(fmt::format("{}: expected a rank of group {} in [0, {}), got {}", argument,
                                   name_, size(), rank));
    }
  }

 private:
  Membership(std::string name, std::vector<int> members, int rank, std::uint64_t channel)
      : name_(std::move(name)), members_(std::move(members)), rank_(rank), channel_(channel) {}

  std::string name_;
  std::vector<int> members_;  // by rank
  int rank_;
  std::uint64_t channel_;
  std::shared_ptr<const Membership> parent_;
};

}  // namespace cohort::detail
