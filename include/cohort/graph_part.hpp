// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "cohort/offset_allocator.hpp"
#include "cohort/stream.hpp"
#include "cohort/symmetric_arena.hpp"
#include "cohort/tensor.hpp"

/// \file
/// The memory of captured graphs: a part of an arena that is theirs for as long as they live.

namespace cohort {

/// The part of an arena that the graphs of one `GraphPool` share. Blocks freed within a capture are
/// reused within it, in stream order; what the graphs have touched stays out of the arena until
/// they, the pool and every tensor are gone.
class GraphPart : public CaptureMemory, public std::enable_shared_from_this<GraphPart> {
 public:
  /// Of one capture in one arena.
  explicit GraphPart(std::shared_ptr<SymmetricArena> arena)
      : arena_(std::move(arena)), held_(std::make_shared<GraphExtents>()) {}

  /// The part of a new pool.
  [[nodiscard]] static std::shared_ptr<GraphPart> create(
      const std::shared_ptr<SymmetricArena>& arena) {
    auto part = std::make_shared<GraphPart>(arena);
    part->held_->part = part;
    arena->parts_.push_back(part->held_);
    return part;
  }

  /// Keeps the part out of the arena, and its memory mapped, for as long as it lives. Its end is
  /// safe on any thread, because it comes with a graph's; it frees memory only where the arena is
  /// gone.
  class Lease {
   public:
    /// Keeps the extents from other use while it lives.
    explicit Lease(std::shared_ptr<GraphExtents> held) : held_(std::move(held)) { ++held_->leases; }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    ~Lease() { --held_->leases; }

   private:
    std::shared_ptr<GraphExtents> held_;
  };

  /// For a graph that uses the blocks.
  [[nodiscard]] std::shared_ptr<Lease> lease() { return std::make_shared<Lease>(held_); }

  /// A capture begins: graphs of one pool are never in flight together, so no free block is in use
  /// by another. Tensors that outlived their captures may have been used eagerly.
  void begin() noexcept { arena_->before_launch_ |= space_.clear_marks(); }

  /// The capture that alone has used the part so far comes to nothing: what it took goes back at
  /// once, so that ranks which try again are where the others are. Where a tensor of it lives it
  /// stays until that is gone and every rank has ended its graph.
  void drop() noexcept {
    if (space_.statistics().live_blocks == 0) {
      arena_->give_back(*held_);
      space_ = {};
    }
  }

  [[nodiscard]] Tensor empty(const Dims& shape, DType dtype, StreamRef stream,
                             CaptureId capture) override {
    const std::size_t bytes = static_cast<std::size_t>(numel(shape)) * size_of(dtype);
    auto block = space_.allocate(bytes);
    if (!block) {
      arena_->extend(*held_, space_, bytes);
      block = space_.allocate(bytes);
    }
    try {
      if (users_.size() <= *block) {
        users_.resize(*block + 1);
      }
      users_[*block] = arena_->mark_of(stream);
      arena_->before_launch_ |=
          arena_->marks_.order_within(capture, space_.marks(*block) & ~users_[*block], stream);
    } catch (...) {
      space_.free(*block, space_.marks(*block));
      throw;
    }
    const auto offset = SymmetricArena::mirrored(space_.offset(*block) + space_.size(*block));
    const TensorView view(arena_->address(offset), dtype, shape, arena_->backend().device());
    return {view, shared_from_this(), *block};
  }

  [[nodiscard]] std::uint64_t history() const noexcept override {
    return SymmetricArena::live_hash(space_, 0);
  }

  void replace_marks(OffsetAllocator::Marks gone, OffsetAllocator::Marks by) noexcept override {
    space_.replace_marks(gone, by);
    for (auto& users : users_) {
      users = OffsetAllocator::replaced(users, gone, by);
    }
  }

  void release(std::uint64_t block) noexcept override {
    const auto id = static_cast<OffsetAllocator::Block>(block);
    space_.free(id, users_[id]);
  }

  void record_stream(std::uint64_t block, StreamRef stream) override {
    users_[block] |= arena_->mark_of(stream);
  }

 private:
  std::shared_ptr<SymmetricArena> arena_;
  std::shared_ptr<GraphExtents> held_;
  OffsetAllocator space_;  // counts from the back: see `SymmetricArena::extend`
  std::vector<OffsetAllocator::Marks> users_;
};

}  // namespace cohort
