// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "cohort/arena_segments.hpp"
#include "cohort/call_time.hpp"
#include "cohort/error.hpp"
#include "cohort/graph_memory.hpp"
#include "cohort/hash.hpp"
#include "cohort/log.hpp"
#include "cohort/offset_allocator.hpp"
#include "cohort/release_gate.hpp"
#include "cohort/stream.hpp"
#include "cohort/stream_marks.hpp"
#include "cohort/stream_ordered_allocator.hpp"
#include "cohort/tensor.hpp"
#include "cohort/transport.hpp"

/// \file
/// Symmetric memory: deterministic allocation inside registered segments.

namespace cohort {

/// How an arena grows.
struct ArenaOptions {
  /// Least size of a segment that growth adds, in bytes.
  std::size_t growth_bytes = std::size_t{32} << 20;
};

/// What an arena holds.
struct ArenaStatistics {
  std::uint64_t reserved = 0;      ///< Bytes of all segments.
  std::uint64_t used = 0;          ///< Bytes of live blocks and of what captured graphs lease.
  std::uint64_t peak = 0;          ///< Largest `used` so far.
  std::uint64_t largest_free = 0;  ///< Bytes of the largest block that needs no growth.
  std::uint64_t live_blocks = 0;   ///< Blocks in use.
  std::size_t segments = 0;        ///< Allocations, each registered with the whole audience.
  bool frozen = false;             ///< Whether `freeze` was called.
};

class GraphPart;

namespace detail {
/// A block of an arena that is a loose part of its segment for as long as it lives.
class LooseBlock final : public MemoryOwner {
 public:
  LooseBlock(Tensor block, std::shared_ptr<Segment> segment)
      : segment_(std::move(segment)), block_(std::move(block)) {
    segment_->loose_parts().add(block_.data(), block_.view().bytes());
  }

  void release(std::uint64_t /*block*/) noexcept override {
    segment_->loose_parts().remove(block_.data());  // before the arena may give it to somebody else
    block_.reset();
  }
  void record_stream(std::uint64_t /*block*/, StreamRef stream) override {
    block_.record_stream(stream);
  }

 private:
  std::shared_ptr<Segment> segment_;
  Tensor block_;
};
}  // namespace detail

/// Memory for one audience: every segment carries a window of each of its groups, and a block has
/// the same offset on every rank, because every rank makes the same calls in the same order.
/// An audience of no group is a workspace: the same allocator over memory without windows.
///
/// Reuse is in stream order. A block that is freed on the stream that allocates it next needs no
/// driver call; other streams that used it are waited for. Which block is reused never depends on
/// timing. Used by one thread at a time; its tensors may be dropped on any thread at any time, and
/// those that another thread drops come back with the arena's next call.
class SymmetricArena : public MemoryOwner, public std::enable_shared_from_this<SymmetricArena> {
  struct Private {};

 public:
  /// Local; no segment is allocated yet. The backend outlives the arena and every tensor of it,
  /// which keep one that a shared pointer holds; the audience's groups outlive `close`. Throws
  /// `UsageError` for groups without a control plane.
  [[nodiscard]] static std::shared_ptr<SymmetricArena> create(Backend& backend, std::string name,
                                                              Audience audience,
                                                              ArenaOptions options = {}) {
    auto arena = std::make_shared<SymmetricArena>(Private{}, backend, std::move(name),
                                                  std::move(audience), options);
    auto* const raw = arena.get();
    // Shares that the arena keeps of itself end with the last one that a user has.
    return {raw, [held = std::move(arena)](SymmetricArena* self) noexcept { self->keep_none(); }};
  }

  /// Made by `create`.
  SymmetricArena(Private, Backend& backend, std::string name, Audience audience,
                 ArenaOptions options)
      : keeps_backend_(backend.weak_from_this().lock()),
        name_(std::move(name)),
        options_(options),
        device_(backend.device()),
        segments_(backend, name_, std::move(audience)),
        marks_("arena " + name_, segments_.limit()),
        graphs_(blocks_.space(), segments_) {}

  ~SymmetricArena() override { close(); }

  /// Such as "tp+dcp".
  [[nodiscard]] const std::string& name() const noexcept { return name_; }
  /// Whose memory it hands out.
  [[nodiscard]] Backend& backend() const noexcept { return segments_.backend(); }

  /// A contiguous tensor, allocated in the order of `stream`, on which it is also freed. Collective
  /// over the audience: every rank makes the same allocations and releases in the same order. Where
  /// the space does not suffice the arena grows, which is a registration.
  ///
  /// While `stream` is being captured a `CaptureScope` must be open; the memory then belongs to the
  /// captured graph, and the arena cannot grow.
  ///
  /// @throw UsageError  in a capture without room or without a scope; when frozen and exhausted;
  ///                    after `close`. Names the bytes needed and left.
  /// @throw SymmetryError, TimeoutError, TransportError  from growth, on every rank that came.
  /// @throw TimeoutError  without a stream, where those that used the memory do not come to an end
  ///                      within the time limit of the audience's control plane, all together.
  [[nodiscard]] Tensor empty(const Dims& shape, DType dtype, StreamRef stream) {
    return empty(shape, dtype, stream, stream.valid() ? stream.capture_id() : 0);
  }
  /// The same for a caller that has asked the stream for its capture.
  [[nodiscard]] Tensor empty(const Dims& shape, DType dtype, StreamRef stream, CaptureId capture);

  /// A block for an allocator that the library does not know, which divides it among tensors of its
  /// own as it likes: they may lie at other offsets on each rank. The block itself is allocated as
  /// by `empty`, of which it is a tensor of bytes. Calls of the audience's groups know of it: those
  /// that would reach a peer at the offset of such a tensor take another way.
  [[nodiscard]] Tensor empty_loose(std::size_t bytes, StreamRef stream) {
    Tensor block = empty({static_cast<std::int64_t>(bytes)}, DType::u8, stream);
    const TensorView view = block.view();
    const auto offset = segments_.offset_of(view.data());
    if (bytes == 0 || !offset) {
      return block;
    }
    return {view,
            std::make_shared<detail::LooseBlock>(std::move(block), segments_.holding(*offset)), 0};
  }

  /// Collective. Grows the arena until a block of `bytes` fits without further growth. A
  /// second reservation does nothing where its block fits into what the first one made.
  /// Throws as growth does, and `UsageError` when frozen.
  void reserve(std::size_t bytes) {
    enter();
    throw_if_closed();
    segments_.throw_if_too_large(bytes);
    const detail::CallTime time;
    segments_.agree_before("reservation in", bytes, hash_to_agree_on());
    make_room(bytes);
  }

  /// Local, by every rank at the same point: from here on the arena never grows.
  void freeze() noexcept { frozen_ = true; }

  /// Collective. Returns the memory of graphs that every rank has destroyed. Throws as growth does.
  void reclaim() {
    enter();
    throw_if_closed();
    const detail::CallTime time;
    segments_.agree_before("reclaiming of graphs in", 0, hash_to_agree_on());
    graphs_.reclaim();
  }

  /// Whether `close` has been called.
  [[nodiscard]] bool closed() const noexcept { return closed_; }
  /// Deregisters every window, newest first, then frees the segments, and refuses every later
  /// allocation. Segments with live tensors are freed with the last of them, those that graphs
  /// lease with the last of these. Called by the owner before the audience's groups go.
  void close() noexcept {
    enter();
    closed_ = true;
    segments_.deregister();
    if (blocks_.space().statistics().live_blocks == 0) {
      segments_.free();
    }
  }

  /// What it holds now, and held at the peak, behind what other threads have dropped.
  [[nodiscard]] ArenaStatistics statistics() {
    enter();
    const auto space = blocks_.space().statistics();
    return {.reserved = space.capacity,
            .used = space.used,
            .peak = space.peak,
            .largest_free = space.largest_free,
            .live_blocks = space.live_blocks,
            .segments = segments_.count(),
            .frozen = frozen_};
  }

  /// A capture begins: allocations on its streams come from `part` until `leave_capture`.
  /// Throws `UsageError` where the capture has entered already.
  void enter_capture(CaptureId capture, std::shared_ptr<CaptureMemory> part) {
    enter();
    throw_if_closed();
    if (!graphs_.enter(capture, std::move(part))) {
      throw UsageError(fmt::format("arena {}: this capture has a CaptureScope already", name_));
    }
  }
  /// The scope of the capture has ended.
  void leave_capture(CaptureId capture) noexcept {
    enter();
    graphs_.leave(capture, marks_);
  }

  /// Work that `stream` gets from here on comes after the eager uses of what captures have taken
  /// since the last call. A captured stream cannot wait for them, so the first launch does.
  /// Throws `UsageError` where such a use was on a stream that is being captured now.
  void order_launch(StreamRef stream) {
    enter();
    graphs_.order_launch(marks_, stream);
  }

  /// Where an address lies: bytes from the arena's start, equal on every rank for a symmetric
  /// buffer. Nothing for memory that is not the arena's.
  [[nodiscard]] std::optional<std::uint64_t> offset_of(const void* address) const noexcept {
    return segments_.offset_of(address);
  }

  /// Whether a group of the audience takes equal offsets for granted: see
  /// `Transport::needs_equal_offsets`.
  [[nodiscard]] bool needs_equal_offsets() const noexcept {
    return segments_.needs_equal_offsets();
  }

  /// Hash of what decides where later blocks lie, and of where the live ones do: the segments, and
  /// the live blocks in the order of their allocation. Equal on ranks whose live tensors lie at
  /// equal offsets, whatever else they allocated and released and in which order; an arena in which
  /// nothing lives is as new. Takes time in proportion to the live blocks.
  [[nodiscard]] std::uint64_t history() noexcept {
    enter();
    return hash_of_blocks();
  }
  /// The history where it must agree, otherwise the same number on all ranks.
  [[nodiscard]] std::uint64_t history_to_agree_on() noexcept {
    enter();
    return hash_to_agree_on();
  }

  void release(std::uint64_t block) noexcept override {
    std::shared_ptr<MemoryOwner> none;
    take_back(block, none);
  }
  void take_back(std::uint64_t block, std::shared_ptr<MemoryOwner>& self) noexcept override {
    const auto named = static_cast<OffsetAllocator::Block>(block);
    gate_.release(
        [&] {
          take_back(blocks_, named);
          if (self != nullptr && kept_ < most_kept_) {
            shares_[kept_++] = std::move(self);
          }
        },
        [&] {
          return Dropped{named, nullptr};
        });
    self.reset();  // where it was not kept, and last: it may be what keeps this
  }

  void record_stream(std::uint64_t block, StreamRef stream) override {
    enter();
    blocks_.use_also(static_cast<OffsetAllocator::Block>(block), mark_of(stream));
  }

 private:
  friend class GraphPart;

  /// A share of the arena for a tensor: one that another left, or a new one.
  [[nodiscard]] std::shared_ptr<MemoryOwner> share() {
    return kept_ > 0 ? std::move(shares_[--kept_]) : shared_from_this();
  }
  /// Only tensors, graphs and what they took need the arena from here on.
  void keep_none() noexcept {
    enter();
    most_kept_ = 0;
    while (kept_ > 0) {
      shares_[--kept_].reset();
    }
  }

  /// As many as the temporaries of a step that live at once.
  static constexpr std::size_t kMostShares = 16;

  /// A block that another thread dropped.
  struct Dropped {
    OffsetAllocator::Block block;
    std::shared_ptr<GraphExtents> held;  // of the part that it is of; null: of the arena itself
  };

  /// This thread uses the arena and its parts: what others dropped comes back. First in every call
  /// from outside, and never in the midst of one: what ranks agreed on must still be so when they
  /// act on it.
  void enter() noexcept {
    gate_.enter([this](const Dropped& dropped) {
      take_back(dropped.held != nullptr ? dropped.held->blocks : blocks_, dropped.block);
    });
  }
  /// Of a part. On any thread.
  void release_of(std::uint64_t block, const std::shared_ptr<GraphExtents>& held) noexcept {
    const auto named = static_cast<OffsetAllocator::Block>(block);
    gate_.release([&] { take_back(held->blocks, named); }, [&] { return Dropped{named, held}; });
  }
  void take_back(StreamOrderedAllocator& blocks, OffsetAllocator::Block block) noexcept {
    try {
      blocks.release(block, marks_, [this](const auto& given_up) { replace_marks(given_up); });
    } catch (const std::exception& error) {
      log(LogLevel::error, "arena {}: a tensor's memory is not used again: {}", name_,
          error.what());
    }
  }

  [[nodiscard]] std::uint64_t hash_of_blocks() const noexcept {
    const auto hash = segments_.mixed(detail::mix(detail::kHashSeed, frozen_ ? 1 : 0));
    return detail::mix(blocks_.mixed(hash), graphs_.history());
  }
  [[nodiscard]] std::uint64_t hash_to_agree_on() const noexcept {
    return needs_equal_offsets() ? hash_of_blocks() : 0;
  }

  void throw_if_closed() const {
    if (closed_) {
      throw UsageError(fmt::format("arena {}: used after its group was shut down", name_));
    }
  }

  void throw_if_frozen(std::size_t bytes) const {
    if (frozen_) {
      throw UsageError(fmt::format("arena {} is frozen and exhausted: {}", name_, room(bytes)));
    }
  }

  /// "needs N bytes; M of K are free, the largest block has L; the peak so far is P"
  [[nodiscard]] std::string room(std::size_t bytes) const {
    const auto space = blocks_.space().statistics();
    return fmt::format(
        "{} bytes are needed; {} of {} are free, in blocks of at most {}; the peak so far is {}",
        OffsetAllocator::rounded(bytes), space.capacity - space.used, space.capacity,
        space.largest_free, space.peak);
  }

  /// What graphs hold that were destroyed on this rank, as the end of a message; empty for nothing.
  [[nodiscard]] std::string reclaimable() const {
    const auto bytes = graphs_.reclaimable();
    return bytes == 0 ? std::string()
                      : fmt::format("; destroyed graphs hold {}, which reclaim_graphs() gives back",
                                    bytes);
  }

  [[nodiscard]] OffsetAllocator::Marks mark_of(StreamRef stream) {
    return marks_.of(stream, [this](const auto& given_up) { replace_marks(given_up); });
  }
  void replace_marks(const StreamMarks::GivenUp& marks) {
    blocks_.replace_marks(marks);
    graphs_.replace_marks(marks);
  }

  [[nodiscard]] OffsetAllocator::Block allocate(std::size_t bytes, StreamRef stream) {
    enter();
    throw_if_closed();
    auto block = blocks_.allocate(bytes);
    if (!block) {
      grow(bytes);
      block = blocks_.allocate(bytes);
    }
    try {
      if (const auto others = blocks_.use(*block, mark_of(stream)); others != 0) {
        marks_.order_behind(others, stream);
      }
    } catch (...) {
      blocks_.put_back(*block);
      throw;
    }
    return *block;
  }

  /// Collective. For an allocation that does not fit.
  void grow(std::size_t bytes) {
    segments_.throw_if_too_large(bytes);
    if (!graphs_.holds_anything()) {
      throw_if_frozen(bytes);  // otherwise destroyed graphs may have left room
    }
    const detail::CallTime time;
    segments_.agree_before("growth of", bytes, hash_to_agree_on());
    make_room(bytes);
  }

  /// Grows unless a block of `bytes` fits. The ranks have agreed on it.
  void make_room(std::size_t bytes) {
    graphs_.reclaim();
    const auto needed = OffsetAllocator::rounded(bytes);
    if (blocks_.space().statistics().largest_free < needed) {
      throw_if_frozen(bytes);
      const auto added =
          segments_.add(std::max<std::size_t>(needed, options_.growth_bytes), hash_to_agree_on());
      blocks_.space().add_range(added.offset, added.bytes);
    }
  }

  /// Room for a block of `bytes` in a part of graphs, without growth.
  void extend(GraphExtents& held, std::size_t bytes) {
    throw_if_closed();
    if (!segments_.has_audience()) {
      graphs_.reclaim();  // nobody to agree with
    }
    if (!graphs_.extend(held, bytes)) {
      throw UsageError(fmt::format(
          "arena {} cannot grow during a graph capture: {}; reserve() them before the capture{}",
          name_, room(bytes), reclaimable()));
    }
  }

  std::shared_ptr<Backend> keeps_backend_;  // goes last; null where nobody shares it
  std::string name_;
  ArenaOptions options_;
  Device device_;
  ArenaSegments segments_;
  StreamOrderedAllocator blocks_;
  StreamMarks marks_;
  GraphMemory graphs_;
  bool frozen_ = false;
  bool closed_ = false;
  detail::ReleaseGate<Dropped> gate_;
  // What tensors left of their shares in the arena, for those that follow.
  std::array<std::shared_ptr<MemoryOwner>, kMostShares> shares_;
  std::size_t kept_ = 0;
  std::size_t most_kept_ = kMostShares;
};

inline Tensor SymmetricArena::empty(const Dims& shape, DType dtype, StreamRef stream,
                                    CaptureId capture) {
  if (capture != 0) {
    if (CaptureMemory* const part = graphs_.of(capture); part != nullptr) {
      throw_if_closed();
      return part->empty(shape, dtype, stream, capture);
    }
    throw UsageError(fmt::format(
        "arena {}: an allocation on a stream that is being captured needs an open CaptureScope, or "
        "the graph would not keep its memory",
        name_));
  }
  check_dtype("dtype", dtype);
  const Counted count{numel(shape)};
  const auto block = allocate(static_cast<std::size_t>(count) * size_of(dtype), stream);
  return {segments_.address(blocks_.space().offset(block)),
          dtype,
          shape,
          count,
          device_,
          share(),
          block};
}

}  // namespace cohort
