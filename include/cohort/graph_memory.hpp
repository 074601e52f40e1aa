// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "cohort/arena_segments.hpp"
#include "cohort/control_plane.hpp"
#include "cohort/hash.hpp"
#include "cohort/log.hpp"
#include "cohort/offset_allocator.hpp"
#include "cohort/stream.hpp"
#include "cohort/stream_marks.hpp"
#include "cohort/stream_ordered_allocator.hpp"
#include "cohort/tensor.hpp"

/// \file
/// What captures and their graphs have of an arena: who allocates in which capture, what each part
/// has taken, and when it comes back.

namespace cohort {

/// Memory that captured graphs lease of an arena, as the arena sees it. Implemented by `GraphPart`.
class CaptureMemory : public MemoryOwner {
 public:
  /// A tensor of the graph that is being captured, in the order of `stream`.
  [[nodiscard]] virtual Tensor empty(const Dims& shape, DType dtype, StreamRef stream,
                                     CaptureId capture) = 0;
};

/// What a part of an arena that graphs use has taken of it, and who has used that. Kept until the
/// part and all its graphs are gone.
struct GraphExtents {
  /// A block that a graph holds.
  struct Extent {
    OffsetAllocator::Block block = 0;  ///< In its segment's allocator.
    OffsetAllocator::Marks users = 0;  ///< Streams that used it before the graphs.
    std::shared_ptr<Segment> segment;  ///< Of the block; graphs may outlive the arena.
  };

  std::weak_ptr<CaptureMemory> part;  ///< The part itself; expired where it is gone.
  std::atomic<int> leases = 0;        ///< Graphs that are alive.
  std::vector<Extent> extents;        ///< What they have taken.
  StreamOrderedAllocator blocks;      ///< Of what is taken, counted from the back: see `extend`.

  /// Whether the part, its blocks and all its graphs are gone.
  [[nodiscard]] bool ended() const noexcept {
    return part.expired() && leases == 0 && blocks.space().statistics().live_blocks == 0;
  }
};

/// The captures of one arena, and the parts of it that graphs use.
class GraphMemory {
 public:
  /// A set of streams, see `StreamMarks`.
  using Marks = OffsetAllocator::Marks;

  /// Of the arena with that space and these segments, which outlive it.
  GraphMemory(OffsetAllocator& space, const ArenaSegments& segments) noexcept
      : space_(&space), segments_(&segments) {}

  /// A capture begins to allocate from `part`. False where it has begun already.
  [[nodiscard]] bool enter(CaptureId capture, std::shared_ptr<CaptureMemory> part) {
    if (of(capture) != nullptr) {
      return false;
    }
    captures_.push_back({capture, std::move(part)});
    return true;
  }
  /// It ends. What its streams have done with memory that was freed meanwhile they do in the
  /// graph's launches, which the part outlives, so their marks go.
  void leave(CaptureId capture, const StreamMarks& marks) noexcept {
    const CaptureMemory* const part = of(capture);
    for (const auto& held : parts_) {
      if (part != nullptr && held->part.lock().get() == part) {
        forget_captured(held->blocks.space(), capture, marks);
      }
    }
    std::erase_if(captures_, [&](const ActiveCapture& active) { return active.id == capture; });
  }
  /// Where a capture allocates, or null.
  [[nodiscard]] CaptureMemory* of(CaptureId capture) const noexcept {
    for (const auto& active : captures_) {
      if (active.id == capture) {
        return active.part.get();
      }
    }
    return nullptr;
  }

  /// A new part.
  void add(std::shared_ptr<GraphExtents> held) { parts_.push_back(std::move(held)); }

  /// A part's own allocator counts from the back of its memory, see `extend`: where a place lies
  /// there that the arena has at `offset`, and the other way round.
  [[nodiscard]] static constexpr std::uint64_t mirrored(std::uint64_t offset) noexcept {
    return (std::uint64_t{1} << 61) - offset;
  }

  /// Takes memory for a part, so that a block of `bytes` fits there: what its free end lacks, where
  /// the arena is free in front of it, otherwise a block of its own. So graphs that share a part
  /// need no more than the largest, and no more than they allocate. False where the arena has too
  /// little.
  ///
  /// It grows from the back of free space to the front, and eager blocks the other way: neither
  /// comes to lie in gaps of the other's, and what is eager and alive while a graph is captured
  /// does not cut the part in two.
  [[nodiscard]] bool extend(GraphExtents& held, std::size_t bytes) {
    const auto taken = take(held, bytes);
    if (!taken) {
      return false;
    }
    const auto users = space_->marks(*taken);
    const auto offset = space_->offset(*taken);
    const auto size = space_->size(*taken);
    held.extents.push_back({*taken, users, segments_->holding(offset)});
    held.blocks.space().add_range(mirrored(offset + size), size);
    add_before_launch(users);
    return true;
  }

  /// Takes back what a part has, of which no graph and no tensor is left. Whoever takes it next
  /// waits for its users before the graphs and for those of tensors that outlived their capture.
  void give_back(GraphExtents& held) noexcept {
    const Marks since = held.blocks.space().clear_marks();
    for (const auto& extent : held.extents) {
      space_->free(extent.block, extent.users | since);
    }
    held.extents.clear();
    held.blocks = {};
  }

  /// Whether any part has memory.
  [[nodiscard]] bool holds_anything() const noexcept {
    return std::any_of(parts_.begin(), parts_.end(),
                       [](const auto& held) { return !held->extents.empty(); });
  }

  /// Bytes that parts hold whose graphs were destroyed on this rank.
  [[nodiscard]] std::uint64_t reclaimable() const noexcept {
    std::uint64_t bytes = 0;
    for (const auto& held : parts_) {
      for (const auto& extent : held->extents) {
        bytes += held->ended() ? space_->size(extent.block) : 0;
      }
    }
    return bytes;
  }

  /// Collective over the audience. Takes back the memory of parts that have ended on every rank: a
  /// graph ends at a moment of its own on each.
  void reclaim() {
    std::vector<std::uint64_t> ended;
    for (const auto& held : parts_) {
      if (held->ended() && !held->extents.empty()) {
        ended.push_back(number_of(*held));
      }
    }
    if (segments_->has_audience()) {
      keep_common(ended, segments_->control().all_gather(std::as_bytes(std::span(ended))));
    }
    std::erase_if(parts_, [&](const auto& held) {
      if (held->extents.empty()) {
        return held->ended();
      }
      if (std::find(ended.begin(), ended.end(), number_of(*held)) == ended.end()) {
        return false;
      }
      give_back(*held);
      return true;
    });
  }

  /// Launches wait for these streams as well: they used what captures have taken, and a captured
  /// stream cannot wait for them.
  void add_before_launch(Marks users) noexcept { before_launch_ |= users; }
  /// Work that `stream` gets from here on comes after those uses. Throws as
  /// `StreamMarks::order_behind`, and nothing has changed then.
  void order_launch(StreamMarks& marks, StreamRef stream) {
    if (before_launch_ == 0 || (stream.valid() && stream.capture_id() != 0)) {
      return;  // nothing to wait for, or nobody yet: a graph within a graph
    }
    const auto users = std::exchange(before_launch_, 0);
    try {
      marks.order_behind(users, stream);
    } catch (...) {
      before_launch_ |= users;
      throw;
    }
  }

  /// Whoever has a mark that is gone has another from here on.
  void replace_marks(const StreamMarks::GivenUp& marks) {
    for (const auto& held : parts_) {
      for (auto& extent : held->extents) {
        extent.users = marks.replaced(extent.users);
      }
      held->blocks.replace_marks(marks);
    }
    before_launch_ = marks.replaced(before_launch_);
  }

  /// Hash of where the live blocks of all parts lie. Of parts with live blocks only, in no order:
  /// captures that came to nothing differ between the ranks, and so does when pools and graphs go.
  [[nodiscard]] std::uint64_t history() const noexcept {
    std::uint64_t sum = 0;
    for (const auto& held : parts_) {
      if (held->blocks.space().statistics().live_blocks != 0) {
        sum += detail::mix(number_of(*held), held->blocks.mixed(0));
      }
    }
    return sum;
  }

 private:
  struct ActiveCapture {
    CaptureId id = 0;
    std::shared_ptr<CaptureMemory> part;
  };

  /// Names a part that has taken memory: its first offset, which no other has while it lives, and
  /// which does not depend on captures that came to nothing.
  [[nodiscard]] std::uint64_t number_of(const GraphExtents& held) const noexcept {
    return space_->offset(held.extents.front().block);
  }

  [[nodiscard]] std::optional<OffsetAllocator::Block> take(const GraphExtents& held,
                                                           std::size_t bytes) {
    for (const auto& extent : held.extents) {
      const auto end = mirrored(space_->offset(extent.block));
      if (const auto taken = space_->allocate_in_front_of(
              extent.block,
              OffsetAllocator::rounded(bytes) - held.blocks.space().free_before(end))) {
        return taken;
      }
    }
    return space_->allocate_at_back(bytes);
  }

  /// A mark too many costs a wait.
  static void forget_captured(OffsetAllocator& space, CaptureId capture,
                              const StreamMarks& marks) noexcept {
    try {
      space.replace_marks(marks.captured_by(capture, space.free_marks()), 0);
    } catch (const std::exception& error) {
      log(LogLevel::info, error.what());
    }
  }

  static void keep_common(std::vector<std::uint64_t>& ended, const std::vector<Bytes>& of_all) {
    for (const auto& bytes : of_all) {
      std::vector<std::uint64_t> theirs(bytes.size() / sizeof(std::uint64_t));
      if (!theirs.empty()) {
        std::memcpy(theirs.data(), bytes.data(), theirs.size() * sizeof(std::uint64_t));
      }
      std::erase_if(ended, [&](std::uint64_t id) {
        return std::find(theirs.begin(), theirs.end(), id) == theirs.end();
      });
    }
  }

  OffsetAllocator* space_;
  const ArenaSegments* segments_;
  std::vector<std::shared_ptr<GraphExtents>> parts_;
  std::vector<ActiveCapture> captures_;
  Marks before_launch_ = 0;  // streams that used what captures have taken since the last launch
};

}  // namespace cohort
