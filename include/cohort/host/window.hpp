// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "cohort/host/shared_memory.hpp"
#include "cohort/host/signal_pad.hpp"
#include "cohort/host/strided.hpp"
#include "cohort/transport.hpp"

/// \file
/// Segments of the host backend, their registration with one group, and the group's table of them.

namespace cohort::host {

/// A memory file that callers' tensors live in. Keeps its descriptor, because later registrations
/// with other groups need it.
class HostSegment final : public Segment {
 public:
  /// @param hold  Kept as long as the segment.
  explicit HostSegment(std::shared_ptr<SharedMemory> memory, std::shared_ptr<void> hold = {})
      : memory_(std::move(memory)), hold_(std::move(hold)) {}

  [[nodiscard]] void* data() const noexcept override { return memory_->data(); }
  [[nodiscard]] std::size_t bytes() const noexcept override { return memory_->bytes(); }
  [[nodiscard]] bool registers_with(BackendKind kind) const noexcept override {
    return kind == BackendKind::host;
  }
  [[nodiscard]] const std::shared_ptr<SharedMemory>& memory() const noexcept { return memory_; }

 private:
  std::shared_ptr<SharedMemory> memory_;
  std::shared_ptr<void> hold_;
};

/// Memory of an arena that nobody else maps.
class PrivateSegment : public Segment {
 public:
  /// @param hold  Kept as long as the segment.
  PrivateSegment(std::size_t bytes, std::shared_ptr<void> hold)
      : memory_(bytes), hold_(std::move(hold)) {}

  [[nodiscard]] void* data() const noexcept override { return memory_.data(); }
  [[nodiscard]] std::size_t bytes() const noexcept override { return memory_.bytes(); }

 private:
  PrivateMemory memory_;
  std::shared_ptr<void> hold_;
};

/// The windows of one group, by number (equal on all ranks) and by this rank's addresses.
class WindowTable {
 public:
  struct Entry {
    std::uint32_t number = 0;
    const std::byte* begin = nullptr;  ///< This rank's copy.
    const std::byte* end = nullptr;
    std::span<void* const> peers;
  };

  /// Registrations are collective, so counting them numbers them alike on all ranks.
  [[nodiscard]] std::uint32_t next_number() noexcept { return next_number_++; }

  void add(const Entry& entry) {
    by_number_.push_back(entry);  // numbers only grow
    by_address_.insert(
        std::upper_bound(by_address_.begin(), by_address_.end(), entry,
                         [](const Entry& a, const Entry& b) { return a.begin < b.begin; }),
        entry);
  }

  void remove(std::uint32_t number) noexcept {
    const auto same = [number](const Entry& entry) { return entry.number == number; };
    std::erase_if(by_number_, same);
    std::erase_if(by_address_, same);
  }

  /// Where a view lies, if all of it lies in one window.
  template <class Void>
  [[nodiscard]] std::optional<WindowOffset> find(const BasicTensorView<Void>& view) const noexcept {
    if (by_address_.empty() || view.numel() == 0) {
      return std::nullopt;
    }
    const Extent extent = extent_of(view);
    const auto* data = static_cast<const std::byte*>(view.data());
    const auto* begin = data + extent.begin;
    auto it = std::upper_bound(
        by_address_.begin(), by_address_.end(), begin,
        [](const std::byte* address, const Entry& entry) { return address < entry.begin; });
    if (it == by_address_.begin() || data + extent.end > (--it)->end) {
      return std::nullopt;
    }
    return WindowOffset{it->number, static_cast<std::uint64_t>(data - it->begin)};
  }

  /// A rank's memory at an offset of a window, or null where this rank has no such window, or where
  /// the offset, which a peer gave, lies outside.
  [[nodiscard]] const std::byte* at(const WindowOffset& where, int rank) const noexcept {
    const auto it = std::lower_bound(
        by_number_.begin(), by_number_.end(), where.window,
        [](const Entry& entry, std::uint32_t number) { return entry.number < number; });
    if (it == by_number_.end() || it->number != where.window ||
        where.offset >= static_cast<std::uint64_t>(it->end - it->begin)) {
      return nullptr;
    }
    return static_cast<const std::byte*>(it->peers[static_cast<std::size_t>(rank)]) + where.offset;
  }

 private:
  std::uint32_t next_number_ = 0;
  std::vector<Entry> by_number_;
  std::vector<Entry> by_address_;
};

/// Mappings of every rank's copy of a segment. Destruction unmaps, locally.
class HostWindow : public Window {
 public:
  /// @param memory  Every rank's memory file, by rank.
  HostWindow(std::shared_ptr<WindowTable> table, std::uint32_t number, int rank,
             std::vector<std::shared_ptr<SharedMemory>> memory)
      : table_(std::move(table)), number_(number), memory_(std::move(memory)) {
    for (const auto& file : memory_) {
      peers_.push_back(file->data());
    }
    const auto& own = *memory_[static_cast<std::size_t>(rank)];
    table_->add({number_, own.data(), own.data() + own.bytes(), peers_});
  }
  ~HostWindow() override { table_->remove(number_); }

  [[nodiscard]] std::span<void* const> peers() const noexcept override { return peers_; }

 private:
  std::shared_ptr<WindowTable> table_;
  std::uint32_t number_;
  std::vector<std::shared_ptr<SharedMemory>> memory_;
  std::vector<void*> peers_;
};

}  // namespace cohort::host
