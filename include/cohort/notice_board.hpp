// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "cohort/messenger.hpp"

/// \file
/// What ranks said when they left their groups, and whom it concerns.

namespace cohort::detail {

/// What a rank said when it left a group.
struct Notice {
  int from = 0;                ///< Rank in the messenger.
  std::uint32_t sequence = 0;  ///< The first collective call of the group that it did not finish.
  Bytes reason;
};

/// Whose notices concern a call: this rank's always do.
struct Watch {
  std::uint64_t channel = 0;
  std::span<const int> ranks;  ///< In the messenger.
  /// The number of the call: who left a later one has finished this one. Nothing where calls are
  /// not numbered.
  std::optional<std::uint32_t> sequence;
  /// In the messenger: whose messages the call still needs. None comes behind a goodbye.
  std::span<const int> awaited = {};
};

/// The notices of all groups of this rank. Any thread; nobody waits for long, also while another is
/// in the messenger.
class NoticeBoard {
 public:
  /// @param self  This rank in the messenger.
  explicit NoticeBoard(int self) noexcept : self_(self) {}

  /// Whether there are any, of whatever group: one load.
  [[nodiscard]] bool any() const noexcept { return has_notices_.load(std::memory_order_relaxed); }
  /// The first notice that concerns a call, of those taken in. Costs nothing where there is none.
  [[nodiscard]] std::optional<Notice> first(const Watch& watch) const {
    if (!any()) {
      return std::nullopt;
    }
    const std::lock_guard lock(mutex_);
    const auto of_group = notices_.find(watch.channel);
    if (of_group == notices_.end()) {
      return std::nullopt;
    }
    const auto concerns = [&](const Notice& notice) {
      return notice.from == self_ ||
             (std::count(watch.ranks.begin(), watch.ranks.end(), notice.from) > 0 &&
              (!watch.sequence ||
               static_cast<std::int32_t>(notice.sequence - *watch.sequence) <= 0));
    };
    const auto found = std::find_if(of_group->second.begin(), of_group->second.end(), concerns);
    return found != of_group->second.end() ? std::optional(*found) : std::nullopt;
  }

  /// Takes in why this rank leaves. False where it has said so before: the first cause stays.
  bool note_own(std::uint64_t channel, std::span<const std::byte> reason) {
    const std::lock_guard lock(mutex_);
    auto& of_group = notices_[channel];
    const auto is_own = [&](const Notice& notice) { return notice.from == self_; };
    if (std::any_of(of_group.begin(), of_group.end(), is_own)) {
      return false;
    }
    of_group.push_back({self_, 0, Bytes(reason.begin(), reason.end())});
    has_notices_.store(true, std::memory_order_relaxed);
    return true;
  }

  /// Takes in what another rank says.
  void note(std::uint64_t channel, int from, std::uint32_t sequence,
            std::span<const std::byte> reason) {
    const std::lock_guard lock(mutex_);
    notices_[channel].push_back({from, sequence, Bytes(reason.begin(), reason.end())});
    has_notices_.store(true, std::memory_order_relaxed);
  }

  /// Forgets a group.
  void forget(std::uint64_t channel) {
    const std::lock_guard lock(mutex_);
    notices_.erase(channel);
    has_notices_.store(!notices_.empty(), std::memory_order_relaxed);
  }

  /// How many other ranks' are kept.
  [[nodiscard]] std::size_t held() const {
    const std::lock_guard lock(mutex_);
    std::size_t count = 0;
    for (const auto& [channel, notices] : notices_) {
      count += static_cast<std::size_t>(
          std::count_if(notices.begin(), notices.end(),
                        [&](const Notice& notice) { return notice.from != self_; }));
    }
    return count;
  }

 private:
  int self_;
  mutable std::mutex mutex_;
  std::map<std::uint64_t, std::vector<Notice>> notices_;
  std::atomic<bool> has_notices_{false};
};

}  // namespace cohort::detail
