// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sched.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "cohort/flight_recorder.hpp"
#include "cohort/host/shared_memory.hpp"
#include "cohort/host/signal_pad.hpp"

/// \file
/// The memory files by which the ranks of a group on one machine meet, and what lies where in them.

namespace cohort::host {

/// Every rank's memory file, as one of the ranks sees them.
class GroupPads {
 public:
  /// @param files  By rank; the own one holds a constructed head.
  GroupPads(std::vector<std::shared_ptr<SharedMemory>> files, const PadGeometry& geometry, int rank)
      : files_(std::move(files)),
        geometry_(geometry),
        rank_(rank),
        slots_{geometry.slot(0), geometry.slot(1)},
        own_(files_[index(rank)]->data()) {
    for (const auto& file : files_) {
      memory_.push_back(file->data());
    }
  }

  /// Constructs the head of a rank's own memory file, before any peer knows of it.
  static void construct(SharedMemory& memory, const PadGeometry& geometry) {
    auto* pad = new (memory.data()) SignalPad;
    if (sched_getaffinity(0, sizeof(pad->processors), &pad->processors) != 0) {
      CPU_ZERO(&pad->processors);  // more processors than a set holds
    }
    for (int r = 0; r < geometry.ranks; ++r) {
      new (memory.data() + geometry.channel_ends() + index(r) * sizeof(ChannelEnd)) ChannelEnd;
    }
    // A ring begins as the zeros that are there; its pages are taken as it fills.
  }

  [[nodiscard]] int rank() const noexcept { return rank_; }
  [[nodiscard]] int size() const noexcept { return static_cast<int>(memory_.size()); }
  [[nodiscard]] std::size_t slot_bytes() const noexcept { return geometry_.slot_bytes; }
  /// Processors on which the ranks may run, all together: a launcher may bind each rank to one of
  /// its own, or a container all to the same.
  [[nodiscard]] int processors() const noexcept {
    cpu_set_t all;
    CPU_ZERO(&all);
    for (int r = 0; r < size(); ++r) {
      if (CPU_COUNT(&head(r).processors) == 0) {
        return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
      }
      CPU_OR(&all, &all, &head(r).processors);
    }
    return CPU_COUNT(&all);
  }

  /// Every rank's records.
  [[nodiscard]] TraceRings trace_rings() const {
    TraceRings rings{.keep = std::make_shared<std::vector<std::shared_ptr<SharedMemory>>>(files_)};
    for (std::byte* const memory : memory_) {
      rings.by_rank.push_back(
          std::launder(reinterpret_cast<TraceRing*>(memory + geometry_.trace())));
    }
    return rings;
  }

  /// Of this rank.
  [[nodiscard]] SignalPad& own_head() const noexcept { return head(rank_); }
  [[nodiscard]] SignalPad& head(int r) const noexcept {
    return *std::launder(reinterpret_cast<SignalPad*>(memory_[index(r)]));
  }
  [[nodiscard]] Presence presence_of(int r) const noexcept {
    return head(r).presence.load(std::memory_order_acquire);
  }

  /// The inbox slot of a step that this rank fills.
  [[nodiscard]] std::byte* own_slot(std::uint64_t epoch) const noexcept {
    return own_ + slots_[epoch % 2];
  }
  [[nodiscard]] const std::byte* slot_of(int r, std::uint64_t epoch) const noexcept {
    return memory_[index(r)] + slots_[epoch % 2];
  }

  [[nodiscard]] ChannelEnd& channel(int owner, int peer) const noexcept {
    return *std::launder(reinterpret_cast<ChannelEnd*>(
        memory_[index(owner)] + geometry_.channel_ends() + index(peer) * sizeof(ChannelEnd)));
  }
  /// Where this rank puts a parcel for a peer.
  [[nodiscard]] std::byte* own_parcel(int to, std::uint64_t number) const noexcept {
    return own_ + geometry_.parcel(to, number);
  }
  /// Where a peer puts one for this rank.
  [[nodiscard]] const std::byte* parcel_of(int from, std::uint64_t number) const noexcept {
    return memory_[index(from)] + geometry_.parcel(rank_, number);
  }

 private:
  static std::size_t index(int rank) noexcept { return static_cast<std::size_t>(rank); }

  std::vector<std::shared_ptr<SharedMemory>> files_;
  PadGeometry geometry_;
  int rank_;
  std::array<std::size_t, 2> slots_;  // worked out once: every call asks
  std::byte* own_;
  std::vector<std::byte*> memory_;  // by rank
};

}  // namespace cohort::host
