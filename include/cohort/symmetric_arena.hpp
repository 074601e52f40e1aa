#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cohort/agreement.hpp"
#include "cohort/control_plane.hpp"
#include "cohort/error.hpp"
#include "cohort/offset_allocator.hpp"
#include "cohort/stream.hpp"
#include "cohort/tensor.hpp"
#include "cohort/transport.hpp"

/// \file
/// Segments, their windows, and the deterministic allocation inside them.

namespace cohort {

/// One group of an arena's audience: where its ranks agree, and with what segments are registered.
struct AudienceMember {
  ControlPlane* control = nullptr;
  Transport* transport = nullptr;
};

struct ArenaOptions {
  /// Least size of a segment that growth adds, in bytes.
  std::size_t growth_bytes = std::size_t{32} << 20;
};

struct ArenaStatistics {
  std::uint64_t reserved = 0;      ///< Bytes of all segments.
  std::uint64_t used = 0;          ///< Bytes of live blocks and of what captured graphs lease.
  std::uint64_t peak = 0;          ///< Largest `used` so far.
  std::uint64_t largest_free = 0;  ///< Bytes of the largest block that needs no growth.
  std::uint64_t live_blocks = 0;
  std::size_t segments = 0;
  bool frozen = false;
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
  /// the members outlive `close`.
  [[nodiscard]] static std::shared_ptr<SymmetricArena> create(Backend& backend, std::string name,
                                                              std::vector<AudienceMember> audience,
                                                              ArenaOptions options = {}) {
    return std::make_shared<SymmetricArena>(Private{}, backend, std::move(name),
                                            std::move(audience), options);
  }

  SymmetricArena(Private, Backend& backend, std::string name, std::vector<AudienceMember> audience,
                 ArenaOptions options)
      : backend_(&backend),
        name_(std::move(name)),
        audience_(std::move(audience)),
        options_(options) {}

  ~SymmetricArena() override { close(); }

  [[nodiscard]] const std::string& name() const noexcept { return name_; }
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

  /// Collective. Grows the arena until a block of `bytes` fits without further growth.
  /// Throws as growth does, and `UsageError` when frozen.
  void reserve(std::size_t bytes) {
    throw_if_closed();
    agree_before("reservation in", bytes);
    make_room(bytes);
  }

  /// Local, by every rank at the same point: from here on the arena never grows.
  void freeze() noexcept {
    frozen_ = true;
    history_ = detail::mix(history_, kFreeze);
  }

  /// Collective. Returns the memory of graphs that every rank has destroyed. Throws as growth does.
  void reclaim() {
    throw_if_closed();
    agree_before("reclaiming of graphs in", 0);
    reclaim_agreed();
  }

  /// Deregisters every window, newest first, then frees the segments, and refuses every later
  /// allocation. Segments with live tensors are freed with the last of them. Called by the owner
  /// before the audience's groups go.
  void close() noexcept {
    closed_ = true;
    while (!windows_.empty()) {
      windows_.pop_back();
    }
    if (space_.statistics().live_blocks == 0) {
      segments_.clear();
    }
  }

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
  void enter_capture(CaptureId capture, std::shared_ptr<GraphPart> part) {
    throw_if_closed();
    for (const auto& active : captures_) {
      if (active.id == capture) {
        throw UsageError(fmt::format("arena {}: this capture has a CaptureScope already", name_));
      }
    }
    captures_.push_back({capture, std::move(part)});
  }
  void leave_capture(CaptureId capture) noexcept {
    std::erase_if(captures_, [&](const ActiveCapture& active) { return active.id == capture; });
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

  /// Hash of every allocation and release so far; equal on every rank that made the same calls.
  [[nodiscard]] std::uint64_t history() const noexcept { return history_; }

  void release(std::uint64_t block) noexcept override {
    const auto id = static_cast<OffsetAllocator::Block>(block);
    history_ = detail::mix(history_, ~space_.offset(id));
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
  static constexpr std::uint64_t kFreeze = 0x667265657a65ULL;
  static constexpr unsigned kLastMark = 63;

  /// What captured graphs hold of this arena.
  struct Part {
    std::uint64_t id = 0;
    std::weak_ptr<GraphPart> part;
    std::shared_ptr<std::atomic<int>> leases;
    std::vector<OffsetAllocator::Block> extents;

    [[nodiscard]] bool ended() const noexcept { return part.expired() && *leases == 0; }
  };

  struct ActiveCapture {
    CaptureId id = 0;
    std::shared_ptr<GraphPart> part;
  };

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

  void agree_on(const Intent& intent) {
    if (!audience_.empty()) {
      std::vector<ControlPlane*> groups;
      for (const auto& member : audience_) {
        groups.push_back(member.control);
      }
      agree(groups, intent);
    }
  }

  [[nodiscard]] OffsetAllocator::Marks mark_of(StreamRef stream) {
    if (!stream.valid()) {
      return 0;
    }
    if (last_stream_ < streams_.size() && streams_[last_stream_] == stream) {
      return mark(last_stream_);
    }
    const auto found = std::find(streams_.begin(), streams_.end(), stream);
    last_stream_ = static_cast<std::size_t>(found - streams_.begin());
    if (found == streams_.end()) {
      streams_.push_back(stream);
    }
    return mark(last_stream_);
  }

  /// Streams beyond the last mark share it: their blocks wait for all of them.
  [[nodiscard]] static constexpr OffsetAllocator::Marks mark(std::size_t stream) noexcept {
    return OffsetAllocator::Marks{1} << std::min<std::size_t>(stream, kLastMark);
  }

  /// Calls `visit` with every stream that `marks` stands for, `self` left out.
  template <class Visit>
  void for_each_stream(OffsetAllocator::Marks marks, StreamRef self, const Visit& visit) const {
    while (marks != 0) {
      const auto bit = static_cast<std::size_t>(std::countr_zero(marks));
      marks &= marks - 1;
      const std::size_t end = bit == kLastMark ? streams_.size() : bit + 1;
      for (std::size_t i = bit; i < end; ++i) {
        if (!(streams_[i] == self)) {
          visit(streams_[i]);
        }
      }
    }
  }

  [[nodiscard]] OffsetAllocator::Block allocate(std::size_t bytes, StreamRef stream) {
    throw_if_closed();
    auto block = space_.allocate(bytes);
    if (!block) {
      throw_if_frozen(bytes);
      agree_before("growth of", bytes);
      make_room(bytes);
      block = space_.allocate(bytes);
    }
    const auto own = mark_of(stream);
    if (const auto others = space_.marks(*block) & ~own; others != 0) {
      wait_for_users(*block, others, stream);
    }
    if (users_.size() <= *block) {
      users_.resize(std::max<std::size_t>(*block + 1, users_.size() * 2));
    }
    users_[*block] = own;
    history_ = detail::mix(history_, space_.offset(*block) ^ std::rotl(space_.size(*block), 32));
    return *block;
  }

  /// Orders a block's next use, on `stream`, after the uses by `users`.
  void wait_for_users(OffsetAllocator::Block block, OffsetAllocator::Marks users,
                      StreamRef stream) {
    try {
      for_each_stream(users, stream, [&](StreamRef user) {
        if (user.capture_id() != 0) {
          throw UsageError(fmt::format(
              "arena {}: free memory was last used on a stream that is being captured, which "
              "nothing outside of the capture can wait for",
              name_));
        }
        if (stream.valid()) {
          stream.wait_for(user);
        } else {
          user.synchronize(kDefaultTimeLimit);
        }
      });
    } catch (...) {
      space_.free(block, space_.marks(block));
      throw;
    }
  }

  /// Compares what the ranks are about to do, so that one that is elsewhere is named with the
  /// place.
  void agree_before(std::string_view what, std::size_t bytes) {
    agree_on({.place = fmt::format("{} arena {}", what, name_),
              .sequence = segments_.size(),
              .bytes = bytes,
              .history = history_});
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
                  .history = history_};
    std::unique_ptr<Segment> segment;
    try {
      segment =
          audience_.empty() ? backend_->allocate_workspace(size) : backend_->allocate_segment(size);
    } catch (const Error& error) {
      if (audience_.empty()) {
        throw;
      }
      intent.failure = error.what();
    }
    agree_on(intent);
    register_segment(*segment, intent);
    segments_.push_back(std::move(segment));
    space_.add_range(std::uint64_t{segments_.size() - 1} << kSegmentBits, size);
    history_ = detail::mix(history_, size);
  }

  /// Registers with every group, in the audience's order, then makes sure that all ranks could.
  void register_segment(Segment& segment, Intent intent) {
    std::vector<std::unique_ptr<Window>> windows;
    try {
      for (const auto& member : audience_) {
        windows.push_back(member.transport->register_segment(segment));
      }
    } catch (const TimeoutError&) {
      throw;  // the group is beyond another exchange
    } catch (const Error& error) {
      intent.failure = error.what();
    }
    intent.place = fmt::format("registration of a segment of arena {}", name_);
    agree_on(intent);
    std::move(windows.begin(), windows.end(), std::back_inserter(windows_));
  }

  Backend* backend_;
  std::string name_;
  std::vector<AudienceMember> audience_;
  ArenaOptions options_;
  OffsetAllocator space_;
  std::vector<std::unique_ptr<Segment>> segments_;
  std::vector<std::unique_ptr<Window>> windows_;  // destroyed before the segments
  std::vector<OffsetAllocator::Marks> users_;     // by block: the streams that use it
  std::vector<StreamRef> streams_;
  std::size_t last_stream_ = 0;
  std::vector<Part> parts_;
  std::vector<ActiveCapture> captures_;
  std::uint64_t next_part_ = 0;
  std::uint64_t history_ = detail::kHashSeed;
  bool frozen_ = false;
  bool closed_ = false;
};

/// The part of an arena that the graphs of one `GraphPool` share. Blocks freed within a capture are
/// reused within it, in stream order; what the graphs have touched stays out of the arena until
/// they, the pool and every tensor are gone.
class GraphPart : public MemoryOwner, public std::enable_shared_from_this<GraphPart> {
 public:
  GraphPart(std::shared_ptr<SymmetricArena> arena, std::uint64_t id)
      : arena_(std::move(arena)), id_(id) {}

  /// The part of a new pool.
  [[nodiscard]] static std::shared_ptr<GraphPart> create(
      const std::shared_ptr<SymmetricArena>& arena) {
    auto part = std::make_shared<GraphPart>(arena, arena->next_part_++);
    arena->parts_.push_back({.id = part->id_,
                             .part = part,
                             .leases = std::make_shared<std::atomic<int>>(0),
                             .extents = {}});
    return part;
  }

  /// Keeps the part out of the arena for as long as it lives. Its end is safe on any thread and
  /// calls no driver, because it may come from a graph's destruction callback.
  class Lease {
   public:
    explicit Lease(std::shared_ptr<std::atomic<int>> count) : count_(std::move(count)) {
      ++*count_;
    }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    ~Lease() { --*count_; }

   private:
    std::shared_ptr<std::atomic<int>> count_;
  };

  [[nodiscard]] std::shared_ptr<Lease> lease() { return std::make_shared<Lease>(record().leases); }

  /// A capture begins: graphs of one pool are never in flight together, so no free block is in use.
  void begin() noexcept { space_.clear_marks(); }

  [[nodiscard]] Tensor empty(const Dims& shape, DType dtype, StreamRef stream) {
    const std::size_t bytes = static_cast<std::size_t>(numel(shape)) * size_of(dtype);
    auto block = space_.allocate(bytes);
    if (!block) {
      add_extent(bytes, stream);
      block = space_.allocate(bytes);
    }
    const auto own = arena_->mark_of(stream);
    arena_->for_each_stream(space_.marks(*block) & ~own, stream,
                            [&](StreamRef user) { stream.wait_for(user); });
    if (users_.size() <= *block) {
      users_.resize(*block + 1);
    }
    users_[*block] = own;
    arena_->history_ = detail::mix(arena_->history_, space_.offset(*block));
    const TensorView view(arena_->address(space_.offset(*block)), dtype, shape,
                          arena_->backend().device());
    return {view, shared_from_this(), *block};
  }

  void release(std::uint64_t block) noexcept override {
    const auto id = static_cast<OffsetAllocator::Block>(block);
    arena_->history_ = detail::mix(arena_->history_, ~space_.offset(id));
    space_.free(id, users_[id]);
  }

  void record_stream(std::uint64_t block, StreamRef stream) override {
    users_[block] |= arena_->mark_of(stream);
  }

 private:
  /// Extents are not cut finer than this where the arena has room, so that blocks can coalesce.
  static constexpr std::size_t kExtentBytes = std::size_t{256} << 10;

  [[nodiscard]] SymmetricArena::Part& record() {
    return *std::find_if(arena_->parts_.begin(), arena_->parts_.end(),
                         [&](const auto& part) { return part.id == id_; });
  }

  void add_extent(std::size_t bytes, StreamRef stream) {
    auto& arena = *arena_;
    arena.throw_if_closed();
    auto extent = arena.space_.allocate(std::max(bytes, kExtentBytes));
    if (!extent) {
      extent = arena.space_.allocate(bytes);
    }
    if (!extent) {
      throw UsageError(fmt::format(
          "arena {} cannot grow during a graph capture: {}; reserve() them before the capture",
          arena.name_, arena.room(bytes)));
    }
    const auto offset = arena.space_.offset(*extent);
    record().extents.push_back(*extent);
    // A captured stream cannot wait for work outside its capture, so the host does.
    const auto users = arena.space_.marks(*extent) & ~arena.mark_of(stream);
    arena.for_each_stream(users, stream, [&](StreamRef user) {
      // What a stream did before it joined this capture comes before the graph's launch.
      if (user.capture_id() != stream.capture_id()) {
        user.synchronize(kDefaultTimeLimit);
      }
    });
    arena.history_ = detail::mix(arena.history_, offset);
    space_.add_range(offset, arena.space_.size(*extent));
  }

  std::shared_ptr<SymmetricArena> arena_;
  std::uint64_t id_;
  OffsetAllocator space_;
  std::vector<OffsetAllocator::Marks> users_;
};

inline Tensor SymmetricArena::empty(const Dims& shape, DType dtype, StreamRef stream,
                                    CaptureId capture) {
  if (capture != 0) {
    for (const auto& active : captures_) {
      if (active.id == capture) {
        throw_if_closed();
        return active.part->empty(shape, dtype, stream);
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
  for (const auto& part : parts_) {
    if (part.ended()) {
      ended.push_back(part.id);
    }
  }
  // A graph ends at a moment of its own on each rank; only what has ended everywhere goes back. An
  // answer crosses one group a round, as in agree().
  for (std::size_t round = 0; round < audience_.size(); ++round) {
    for (const auto& member : audience_) {
      for (const auto& bytes : member.control->all_gather(std::as_bytes(std::span(ended)))) {
        std::vector<std::uint64_t> theirs(bytes.size() / sizeof(std::uint64_t));
        if (!theirs.empty()) {
          std::memcpy(theirs.data(), bytes.data(), theirs.size() * sizeof(std::uint64_t));
        }
        std::erase_if(ended, [&](std::uint64_t id) {
          return std::find(theirs.begin(), theirs.end(), id) == theirs.end();
        });
      }
    }
  }
  std::erase_if(parts_, [&](const Part& part) {
    if (std::find(ended.begin(), ended.end(), part.id) == ended.end()) {
      return false;
    }
    for (const auto extent : part.extents) {
      history_ = detail::mix(history_, ~space_.offset(extent));
      space_.free(extent);
    }
    return true;
  });
}

}  // namespace cohort
