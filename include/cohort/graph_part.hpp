// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "cohort/graph_memory.hpp"
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
    arena->enter();
    arena->graphs_.add(part->held_);
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
  void begin() noexcept {
    arena_->enter();
    arena_->graphs_.add_before_launch(held_->blocks.space().clear_marks());
  }

  /// The capture that alone has used the part so far comes to nothing: what it took goes back at
  /// once, so that ranks which try again are where the others are. Where a tensor of it lives it
  /// stays until that is gone and every rank has ended its graph.
  void drop() noexcept {
    arena_->enter();
    if (held_->blocks.space().statistics().live_blocks == 0) {
      arena_->graphs_.give_back(*held_);
    }
  }

  [[nodiscard]] Tensor empty(const Dims& shape, DType dtype, StreamRef stream,
                             CaptureId capture) override {
    const std::size_t bytes = bytes_of(shape, dtype);
    arena_->enter();
    auto& blocks = held_->blocks;
    auto block = blocks.allocate(bytes);
    if (!block) {
      arena_->extend(*held_, bytes);
      block = blocks.allocate(bytes);
    }
    try {
      const auto others = blocks.use(*block, arena_->mark_of(stream));
      arena_->graphs_.add_before_launch(arena_->marks_.order_within(capture, others, stream));
    } catch (...) {
      blocks.put_back(*block);
      throw;
    }
    const auto& space = blocks.space();
    const auto offset = GraphMemory::mirrored(space.offset(*block) + space.size(*block));
    const TensorView view(arena_->segments_.address(offset), dtype, shape,
                          arena_->backend().device());
    return {view, shared_from_this(), *block};
  }

  void release(std::uint64_t block) noexcept override { arena_->release_of(block, held_); }

  void record_stream(std::uint64_t block, StreamRef stream) override {
    arena_->enter();
    held_->blocks.use_also(static_cast<OffsetAllocator::Block>(block), arena_->mark_of(stream));
  }

 private:
  std::shared_ptr<SymmetricArena> arena_;
  std::shared_ptr<GraphExtents> held_;
};

}  // namespace cohort
