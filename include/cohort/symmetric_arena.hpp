// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <iterator>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cohort/agreement.hpp"
#include "cohort/call_time.hpp"
#include "cohort/control_plane.hpp"
#include "cohort/error.hpp"
#include "cohort/hash.hpp"
#include "cohort/offset_allocator.hpp"
#include "cohort/stream.hpp"
#include "cohort/stream_marks.hpp"
#include "cohort/tensor.hpp"
#include "cohort/transport.hpp"

/// \file
/// Segments, their windows, and the deterministic allocation inside them.

namespace cohort {

/// The groups that an arena's segments are registered with, and where their ranks agree.
struct Audience {
  /// Of a group that holds every rank of each of these groups; of the group itself where it is one.
  ControlPlane* control = nullptr;
  std::vector<Transport*> transports = {};  ///< In the same order on every rank.
};

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

/// Memory that captured graphs lease of an arena, as the arena sees it. Implemented by `GraphPart`.
class CaptureMemory : public MemoryOwner {
 public:
  /// A tensor of the graph that is being captured, in the order of `stream`.
  [[nodiscard]] virtual Tensor empty(const Dims& shape, DType dtype, StreamRef stream,
                                     CaptureId capture) = 0;
  /// Hash of where its live blocks lie.
  [[nodiscard]] virtual std::uint64_t history() const noexcept = 0;
  /// Streams have given up the marks `gone`, which `by` stands for from here on.
  virtual void replace_marks(OffsetAllocator::Marks gone, OffsetAllocator::Marks by) noexcept = 0;
};

/// What a part of an arena that graphs use has taken of it. Kept until the part and all its graphs
/// are gone.
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

  /// Whether the part and all its graphs are gone.
  [[nodiscard]] bool ended() const noexcept { return part.expired() && leases == 0; }
};

class GraphPart;

/// Memory for one audience: every segment carries a window of each of its groups, and a block has
/// the same offset on every rank, because every rank makes the same calls in the same order.
/// An audience of no group is a workspace: the same allocator over memory without windows.
///
/// Reuse is in stream order. A block that is freed on the stream that allocates it next needs no
/// driver call; other streams that used it are waited for. Which block is reused never depends on
/// timing. Used by one thread at a time.
class SymmetricArena : public MemoryOwner, public std::enable_shared_from_this<SymmetricArena> {
  struct Private {};

 public:
  /// Local; no segment is allocated yet. The backend outlives the arena and every tensor of it;
  /// the audience's groups outlive `close`. Throws `UsageError` for groups without a control plane.
  [[nodiscard]] static std::shared_ptr<SymmetricArena> create(Backend& backend, std::string name,
                                                              Audience audience,
                                                              ArenaOptions options = {}) {
    if (!audience.transports.empty() && audience.control == nullptr) {
      throw UsageError(
          fmt::format("arena {}: expected a control plane for its audience, got null", name));
    }
    return std::make_shared<SymmetricArena>(Private{}, backend, std::move(name),
                                            std::move(audience), options);
  }

  /// Made by `create`.
  SymmetricArena(Private, Backend& backend, std::string name, Audience audience,
                 ArenaOptions options)
      : backend_(&backend),
        name_(std::move(name)),
        audience_(std::move(audience)),
        options_(options),
        marks_("arena " + name_),
        needs_equal_offsets_(
            std::any_of(audience_.transports.begin(), audience_.transports.end(),
                        [](const Transport* group) { return group->needs_equal_offsets(); })) {}

  ~SymmetricArena() override { close(); }

  /// Such as "tp+dcp".
  [[nodiscard]] const std::string& name() const noexcept { return name_; }
  /// Whose memory it hands out.
  [[nodiscard]] Backend& backend() const noexcept { return *backend_; }

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
  [[nodiscard]] Tensor empty(const Dims& shape, DType dtype, StreamRef stream) {
    return empty(shape, dtype, stream, stream.valid() ? stream.capture_id() : 0);
  }
  /// The same for a caller that has asked the stream for its capture.
  [[nodiscard]] Tensor empty(const Dims& shape, DType dtype, StreamRef stream, CaptureId capture);

  /// Collective. Grows the arena until a block of `bytes` fits without further growth. A
  /// second reservation does nothing where its block fits into what the first one made.
  /// Throws as growth does, and `UsageError` when frozen.
  void reserve(std::size_t bytes) {
    throw_if_closed();
    throw_if_too_large(bytes);
    const detail::CallTime time;
    agree_before("reservation in", bytes);
    make_room(bytes);
  }

  /// Local, by every rank at the same point: from here on the arena never grows.
  void freeze() noexcept { frozen_ = true; }

  /// Collective. Returns the memory of graphs that every rank has destroyed. Throws as growth does.
  void reclaim() {
    throw_if_closed();
    const detail::CallTime time;
    agree_before("reclaiming of graphs in", 0);
    reclaim_agreed();
  }

  /// Deregisters every window, newest first, then frees the segments, and refuses every later
  /// allocation. Segments with live tensors are freed with the last of them, those that graphs
  /// lease with the last of these. Called by the owner before the audience's groups go.
  void close() noexcept {
    closed_ = true;
    while (!windows_.empty()) {
      windows_.pop_back();
    }
    if (space_.statistics().live_blocks == 0) {
      segments_.clear();
    }
  }

  /// What it holds now, and held at the peak.
  [[nodiscard]] ArenaStatistics statistics() const {
    const auto space = space_.statistics();
    return {.reserved = space.capacity,
            .used = space.used,
            .peak = space.peak,
            .largest_free = space.largest_free,
            .live_blocks = space.live_blocks,
            .segments = segments_.size(),
            .frozen = frozen_};
  }

  /// A capture begins: allocations on its streams come from `part` until `leave_capture`.
  /// Throws `UsageError` where the capture has entered already.
  void enter_capture(CaptureId capture, std::shared_ptr<CaptureMemory> part) {
    throw_if_closed();
    for (const auto& active : captures_) {
      if (active.id == capture) {
        throw UsageError(fmt::format("arena {}: this capture has a CaptureScope already", name_));
      }
    }
    captures_.push_back({capture, std::move(part)});
  }
  /// The scope of the capture has ended.
  void leave_capture(CaptureId capture) noexcept {
    std::erase_if(captures_, [&](const ActiveCapture& active) { return active.id == capture; });
  }

  /// Work that `stream` gets from here on comes after the eager uses of what captures have taken
  /// since the last call. A captured stream cannot wait for them, so the first launch does.
  /// Throws `UsageError` where such a use was on a stream that is being captured now.
  void order_launch(StreamRef stream) {
    if (before_launch_ == 0 || (stream.valid() && stream.capture_id() != 0)) {
      return;  // nothing to wait for, or nobody yet: a graph within a graph
    }
    const auto users = std::exchange(before_launch_, 0);
    try {
      marks_.order_behind(users, stream);
    } catch (...) {
      before_launch_ |= users;
      throw;
    }
  }

  /// Where an address lies: bytes from the arena's start, equal on every rank for a symmetric
  /// buffer. Nothing for memory that is not the arena's.
  [[nodiscard]] std::optional<std::uint64_t> offset_of(const void* address) const noexcept {
    const auto target = reinterpret_cast<std::uintptr_t>(address);
    for (std::size_t i = 0; i < segments_.size(); ++i) {
      const auto base = reinterpret_cast<std::uintptr_t>(segments_[i]->data());
      if (target >= base && target - base < segments_[i]->bytes()) {
        return (std::uint64_t{i} << kSegmentBits) + (target - base);
      }
    }
    return std::nullopt;
  }

  /// Whether a group of the audience takes equal offsets for granted: see
  /// `Transport::needs_equal_offsets`.
  [[nodiscard]] bool needs_equal_offsets() const noexcept { return needs_equal_offsets_; }

  /// Hash of what decides where later blocks lie, and of where the live ones do: the segments, and
  /// the live blocks in the order of their allocation. Equal on ranks whose live tensors lie at
  /// equal offsets, whatever else they allocated and released and in which order; an arena in which
  /// nothing lives is as new. Takes time in proportion to the live blocks.
  [[nodiscard]] std::uint64_t history() const noexcept {
    std::uint64_t hash = detail::mix(detail::kHashSeed, frozen_ ? 1 : 0);
    for (const auto& segment : segments_) {
      hash = detail::mix(hash, segment->bytes());
    }
    hash = live_hash(space_, hash);
    // Unordered, because parts without memory, which do not count, differ between the ranks.
    std::uint64_t parts = 0;
    for (const auto& held : parts_) {
      if (const auto part = held->part.lock(); part != nullptr && !held->extents.empty()) {
        parts += detail::mix(number_of(*held), part->history());
      }
    }
    return detail::mix(hash, parts);
  }
  /// The history where it must agree, otherwise the same number on all ranks.
  [[nodiscard]] std::uint64_t history_to_agree_on() const noexcept {
    return needs_equal_offsets_ ? history() : 0;
  }

  void release(std::uint64_t block) noexcept override {
    const auto id = static_cast<OffsetAllocator::Block>(block);
    space_.free(id, users_[id]);
  }

  void record_stream(std::uint64_t block, StreamRef stream) override {
    users_[block] |= mark_of(stream);
  }

 private:
  friend class GraphPart;

  // A segment's blocks are numbered from its own multiple of 2^44, so that no block spans two
  // segments and one allocator serves them all.
  static constexpr unsigned kSegmentBits = 44;

  struct ActiveCapture {
    CaptureId id = 0;
    std::shared_ptr<CaptureMemory> part;
  };

  [[nodiscard]] static std::uint64_t live_hash(const OffsetAllocator& space,
                                               std::uint64_t hash) noexcept {
    space.for_each_live([&](OffsetAllocator::Block block) {
      hash = detail::mix(hash, space.offset(block) ^ std::rotl(space.size(block), 32));
    });
    return hash;
  }

  /// Names a part that has taken memory: its first offset, which no other has while it lives, and
  /// which does not depend on captures that came to nothing.
  [[nodiscard]] std::uint64_t number_of(const GraphExtents& held) const noexcept {
    return space_.offset(held.extents.front().block);
  }

  [[nodiscard]] void* address(std::uint64_t offset) const noexcept {
    const auto segment = static_cast<std::size_t>(offset >> kSegmentBits);
    return static_cast<std::byte*>(segments_[segment]->data()) +
           (offset & ((std::uint64_t{1} << kSegmentBits) - 1));
  }

  void throw_if_closed() const {
    if (closed_) {
      throw UsageError(fmt::format("arena {}: used after its group was shut down", name_));
    }
  }

  void throw_if_too_large(std::size_t bytes) const {
    if (bytes > std::size_t{1} << (kSegmentBits - 1)) {
      throw UsageError(fmt::format("arena {}: a segment of {} bytes is too large", name_, bytes));
    }
  }

  void throw_if_frozen(std::size_t bytes) const {
    if (frozen_) {
      throw UsageError(fmt::format("arena {} is frozen and exhausted: {}", name_, room(bytes)));
    }
  }

  /// "needs N bytes; M of K are free, the largest block has L; the peak so far is P"
  [[nodiscard]] std::string room(std::size_t bytes) const {
    const auto space = space_.statistics();
    return fmt::format(
        "{} bytes are needed; {} of {} are free, in blocks of at most {}; the peak so far is {}",
        OffsetAllocator::rounded(bytes), space.capacity - space.used, space.capacity,
        space.largest_free, space.peak);
  }

  /// What graphs hold that were destroyed on this rank, as the end of a message; empty for nothing.
  [[nodiscard]] std::string reclaimable() const {
    std::uint64_t bytes = 0;
    for (const auto& held : parts_) {
      for (const auto& extent : held->extents) {
        bytes += held->ended() ? space_.size(extent.block) : 0;
      }
    }
    return bytes == 0 ? std::string()
                      : fmt::format("; destroyed graphs hold {}, which reclaim_graphs() gives back",
                                    bytes);
  }

  [[nodiscard]] bool has_audience() const noexcept { return !audience_.transports.empty(); }

  /// Throws `own`, this rank's failure, as every agreement does, and alone where there is nobody to
  /// agree with.
  void agree_on(const Intent& intent, const std::exception_ptr& own = nullptr,
                std::chrono::milliseconds patience = {}) {
    if (has_audience()) {
      agree(*audience_.control, intent, own, patience);
    } else if (own) {
      std::rethrow_exception(own);
    }
  }

  [[nodiscard]] OffsetAllocator::Marks mark_of(StreamRef stream) {
    return marks_.of(stream, [this](OffsetAllocator::Marks gone, OffsetAllocator::Marks by) {
      space_.replace_marks(gone, by);
      for (auto& users : users_) {
        users = OffsetAllocator::replaced(users, gone, by);
      }
      for (const auto& held : parts_) {
        for (auto& extent : held->extents) {
          extent.users = OffsetAllocator::replaced(extent.users, gone, by);
        }
        if (const auto part = held->part.lock()) {
          part->replace_marks(gone, by);
        }
      }
      before_launch_ = OffsetAllocator::replaced(before_launch_, gone, by);
    });
  }

  [[nodiscard]] OffsetAllocator::Block allocate(std::size_t bytes, StreamRef stream) {
    throw_if_closed();
    auto block = space_.allocate(bytes);
    if (!block) {
      throw_if_too_large(bytes);
      if (!leases_anything()) {
        throw_if_frozen(bytes);  // otherwise destroyed graphs may have left room
      }
      const detail::CallTime time;
      agree_before("growth of", bytes);
      make_room(bytes);
      block = space_.allocate(bytes);
    }
    try {
      if (users_.size() <= *block) {
        users_.resize(std::max<std::size_t>(*block + 1, users_.size() * 2));
      }
      const auto own = mark_of(stream);
      users_[*block] = own;
      if (const auto others = space_.marks(*block) & ~own; others != 0) {
        marks_.order_behind(others, stream);
      }
    } catch (...) {
      space_.free(*block, space_.marks(*block));
      throw;
    }
    return *block;
  }

  [[nodiscard]] bool leases_anything() const noexcept {
    return std::any_of(parts_.begin(), parts_.end(),
                       [](const auto& held) { return !held->extents.empty(); });
  }

  /// A part's own allocator counts from the back of its memory, see `extend`: where a place lies
  /// there that the arena has at `offset`, and the other way round.
  [[nodiscard]] static constexpr std::uint64_t mirrored(std::uint64_t offset) noexcept {
    return (std::uint64_t{1} << 61) - offset;
  }

  /// Takes memory for a part of graphs into its `space`, so that a block of `bytes` fits there:
  /// what its free end lacks, where the arena is free in front of it, otherwise a block of its own.
  /// So graphs that share a part need no more than the largest, and no more than they allocate.
  ///
  /// It grows from the back of free space to the front, and eager blocks the other way: neither
  /// comes to lie in gaps of the other's, and what is eager and alive while a graph is captured
  /// does not cut the part in two.
  void extend(GraphExtents& held, OffsetAllocator& space, std::size_t bytes) {
    throw_if_closed();
    if (!has_audience()) {
      reclaim_agreed();  // nobody to agree with
    }
    std::optional<OffsetAllocator::Block> taken;
    for (const auto& extent : held.extents) {
      const auto end = mirrored(space_.offset(extent.block));
      taken = space_.allocate_in_front_of(extent.block,
                                          OffsetAllocator::rounded(bytes) - space.free_before(end));
      if (taken) {
        break;
      }
    }
    if (!taken) {
      taken = space_.allocate_at_back(bytes);
    }
    if (!taken) {
      throw UsageError(fmt::format(
          "arena {} cannot grow during a graph capture: {}; reserve() them before the capture{}",
          name_, room(bytes), reclaimable()));
    }
    const auto users = space_.marks(*taken);
    const auto offset = space_.offset(*taken);
    const auto size = space_.size(*taken);
    held.extents.push_back(
        {*taken, users, segments_[static_cast<std::size_t>(offset >> kSegmentBits)]});
    space.add_range(mirrored(offset + size), size);
    before_launch_ |= users;
  }

  /// Takes back what a part has, which nothing uses any more.
  void give_back(GraphExtents& held) noexcept {
    for (const auto& extent : held.extents) {
      space_.free(extent.block, extent.users);
    }
    held.extents.clear();
  }

  /// Compares what the ranks are about to do, so that one that is elsewhere is named with the
  /// place.
  void agree_before(std::string_view what, std::size_t bytes) {
    agree_on({.place = fmt::format("{} arena {}", what, name_),
              .sequence = segments_.size(),
              .bytes = bytes,
              .history = history_to_agree_on()});
  }

  /// Grows unless a block of `bytes` fits. The ranks have agreed on it.
  void make_room(std::size_t bytes) {
    reclaim_agreed();
    if (space_.statistics().largest_free < OffsetAllocator::rounded(bytes)) {
      throw_if_frozen(bytes);
      add_segment(bytes);
    }
  }

  void reclaim_agreed();

  void add_segment(std::size_t bytes) {
    const std::size_t unit = backend_->segment_granularity();
    const std::size_t wanted = std::max(OffsetAllocator::rounded(bytes), options_.growth_bytes);
    const std::size_t size = (wanted + unit - 1) / unit * unit;
    if (size >> kSegmentBits != 0 || segments_.size() >> (60 - kSegmentBits) != 0) {
      throw UsageError(fmt::format("arena {}: a segment of {} bytes is too large", name_, size));
    }
    Intent intent{.place = fmt::format("allocation of a segment of arena {}", name_),
                  .sequence = segments_.size(),
                  .bytes = size,
                  .history = history_to_agree_on()};
    std::unique_ptr<Segment> segment;
    std::exception_ptr failure;
    try {
      segment =
          has_audience() ? backend_->allocate_segment(size) : backend_->allocate_workspace(size);
    } catch (const std::exception&) {
      failure = std::current_exception();
    }
    agree_on(intent, failure);
    register_segment(*segment, intent);
    segments_.push_back(std::move(segment));
    space_.add_range(std::uint64_t{segments_.size() - 1} << kSegmentBits, size);
  }

  /// Registers with every group, in the audience's order. After each the whole audience makes sure
  /// that all could: a registration that a peer never joins may not end.
  void register_segment(Segment& segment, Intent intent) {
    std::vector<std::unique_ptr<Window>> windows;
    for (Transport* transport : audience_.transports) {
      std::exception_ptr failure;
      try {
        windows.push_back(transport->register_segment(segment));
      } catch (const std::exception&) {
        failure = std::current_exception();
      }
      intent.place = fmt::format("registration of a segment of arena {} with group {} of {}", name_,
                                 windows.size() + (failure ? 1 : 0), audience_.transports.size());
      agree_on(intent, failure, patience_after_a_wait(*audience_.control));
    }
    std::move(windows.begin(), windows.end(), std::back_inserter(windows_));
  }

  Backend* backend_;
  std::string name_;
  Audience audience_;
  ArenaOptions options_;
  OffsetAllocator space_;
  std::vector<std::shared_ptr<Segment>> segments_;
  std::vector<std::unique_ptr<Window>> windows_;  // destroyed before the segments
  std::vector<OffsetAllocator::Marks> users_;     // by block: the streams that use it
  StreamMarks marks_;
  std::vector<std::shared_ptr<GraphExtents>> parts_;
  std::vector<ActiveCapture> captures_;
  OffsetAllocator::Marks before_launch_ = 0;  // streams that used what captures have taken since
  bool needs_equal_offsets_;
  bool frozen_ = false;
  bool closed_ = false;
};

inline Tensor SymmetricArena::empty(const Dims& shape, DType dtype, StreamRef stream,
                                    CaptureId capture) {
  if (capture != 0) {
    for (const auto& active : captures_) {
      if (active.id == capture) {
        throw_if_closed();
        return active.part->empty(shape, dtype, stream, capture);
      }
    }
    throw UsageError(fmt::format(
        "arena {}: an allocation on a stream that is being captured needs an open CaptureScope, or "
        "the graph would not keep its memory",
        name_));
  }
  const std::size_t bytes = static_cast<std::size_t>(numel(shape)) * size_of(dtype);
  const auto block = allocate(bytes, stream);
  const TensorView view(address(space_.offset(block)), dtype, shape, backend_->device());
  return {view, shared_from_this(), block};
}

inline void SymmetricArena::reclaim_agreed() {
  std::vector<std::uint64_t> ended;
  for (const auto& held : parts_) {
    if (held->ended() && !held->extents.empty()) {
      ended.push_back(number_of(*held));
    }
  }
  // A graph ends at a moment of its own on each rank; only what has ended everywhere goes back.
  if (has_audience()) {
    for (const auto& bytes : audience_.control->all_gather(std::as_bytes(std::span(ended)))) {
      std::vector<std::uint64_t> theirs(bytes.size() / sizeof(std::uint64_t));
      if (!theirs.empty()) {
        std::memcpy(theirs.data(), bytes.data(), theirs.size() * sizeof(std::uint64_t));
      }
      std::erase_if(ended, [&](std::uint64_t id) {
        return std::find(theirs.begin(), theirs.end(), id) == theirs.end();
      });
    }
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

}  // namespace cohort
