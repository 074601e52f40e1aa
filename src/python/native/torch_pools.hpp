// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "engines.hpp"

/// \file
/// Where pools of torch's caching allocator get their segments: an arena for each of a number of
/// places, because torch calls a plain function that says nothing but the size.

namespace cohort::python {

/// The groups that have a place, and the segments that torch has.
class TorchPools {
 public:
  /// Groups that can have pools at a time.
  static constexpr std::size_t kPlaces = 64;
  /// As torch's pluggable allocator calls them.
  using Allocate = void* (*)(ssize_t bytes, int device, void* stream);

  /// Never destroyed: torch may give segments back while the process ends.
  static TorchPools& of_process() {
    static auto* const pools = new TorchPools;
    return *pools;
  }

  /// The function that allocates from the group's arena, until its state leaves. Throws
  /// `UsageError` where all places are taken.
  [[nodiscard]] Allocate enter(std::string_view group) {
    const std::lock_guard lock(mutex_);
    for (std::size_t place = 0; place < kPlaces; ++place) {
      if (groups_[place].empty()) {
        groups_[place] = group;
        return functions()[place];
      }
    }
    throw UsageError(
        fmt::format("group {}: {} groups have pools of torch's already", group, kPlaces));
  }
  /// The places of the groups of a state are free: those whose names begin so.
  void leave(std::string_view prefix) {
    const std::lock_guard lock(mutex_);
    for (auto& name : groups_) {
      if (name.starts_with(prefix)) {
        name.clear();
      }
    }
  }

  /// On any thread: torch has no more use for the segment.
  static void free(void* segment, std::size_t /*bytes*/, int /*device*/, void* /*stream*/) {
    TorchPools& pools = of_process();
    Held given_back;  // goes without the lock
    const std::lock_guard lock(pools.mutex_);
    if (const auto found = pools.held_.find(segment); found != pools.held_.end()) {
      given_back = std::move(found->second);
      pools.held_.erase(found);
    }
  }

 private:
  struct Held {
    std::shared_ptr<Backend> backend;  // goes after the block
    Tensor block;
  };

  template <std::size_t place>
  static void* allocate_at(ssize_t bytes, int /*device*/, void* /*stream*/) {
    return with_torch_errors(
        [&] { return of_process().allocate(place, static_cast<std::size_t>(bytes)); });
  }
  template <std::size_t... place>
  static constexpr std::array<Allocate, kPlaces> functions_of(std::index_sequence<place...>) {
    return {&allocate_at<place>...};
  }
  static constexpr std::array<Allocate, kPlaces> functions() {
    return functions_of(std::make_index_sequence<kPlaces>());
  }

  /// On the thread whose tensor needs the segment, under torch's own lock.
  void* allocate(std::size_t place, std::size_t bytes) {
    std::string name;
    {
      const std::lock_guard lock(mutex_);
      name = groups_[place];
    }
    const GroupUse<> use(name, false);
    Held held{use.engine().backend, use->arena()->empty_loose(bytes, use.stream())};
    void* const segment = held.block.data();
    const std::lock_guard lock(mutex_);
    held_[segment] = std::move(held);
    return segment;
  }

  std::mutex mutex_;
  std::array<std::string, kPlaces> groups_;
  std::unordered_map<void*, Held> held_;
};

}  // namespace cohort::python
