// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <iterator>
#include <memory>
#include <utility>
#include <vector>

#include "cohort/error.hpp"
#include "cohort/graph_part.hpp"
#include "cohort/stream.hpp"
#include "cohort/symmetric_arena.hpp"

/// \file
/// Graphs that span all groups. The engine owns its capture; a `CaptureScope` inside it makes the
/// arenas allocate for the graph, which then keeps that memory for as long as it lives.

namespace cohort {

/// The arenas that captures concern: all those of one `ParallelState`.
class CaptureDomain {
 public:
  /// Adds an arena to those that captures cover.
  void add(std::shared_ptr<SymmetricArena> arena) { arenas_.push_back(std::move(arena)); }
  /// The arenas that captures cover.
  [[nodiscard]] const std::vector<std::shared_ptr<SymmetricArena>>& arenas() const noexcept {
    return arenas_;
  }
  /// Those whose groups have not been shut down. Throws `UsageError` where all have.
  [[nodiscard]] std::vector<std::shared_ptr<SymmetricArena>> open_arenas() const {
    std::vector<std::shared_ptr<SymmetricArena>> open;
    std::copy_if(arenas_.begin(), arenas_.end(), std::back_inserter(open),
                 [](const auto& arena) { return !arena->closed(); });
    if (open.empty() && !arenas_.empty()) {
      throw UsageError("graphs: used after all groups were shut down");
    }
    return open;
  }

 private:
  std::vector<std::shared_ptr<SymmetricArena>> arenas_;
};

/// Memory shared by graphs that are never in flight together, such as those of one engine's batch
/// sizes: all of them cost what the largest costs. Every rank uses its pools alike. May be
/// destroyed before its graphs.
class GraphPool {
 public:
  /// The pool's part of an arena, made at the first call.
  [[nodiscard]] const std::shared_ptr<GraphPart>& part_of(
      const std::shared_ptr<SymmetricArena>& arena) {
    for (const auto& [owner, part] : parts_) {
      if (owner == arena) {
        return part;
      }
    }
    return parts_.emplace_back(arena, GraphPart::create(arena)).second;
  }

 private:
  std::vector<std::pair<std::shared_ptr<SymmetricArena>, std::shared_ptr<GraphPart>>> parts_;
};

/// Opens inside the engine's capture and closes before it ends. While it lives, allocations on the
/// captured streams, the library's own included, come from the pool; freed blocks are reused in
/// stream order; no arena grows. The graph leases the union of those blocks until it and every
/// executable made of it are destroyed. One scope for each capture and domain; it can be neither
/// copied nor moved.
class CaptureScope {
 public:
  /// Local, but all ranks capture the same sequence. Without a pool the graph gets one of its own.
  /// Throws `UsageError` where `stream` is not being captured or its capture has a scope already.
  CaptureScope(const CaptureDomain& domain, StreamRef stream, GraphPool* pool = nullptr)
      : capture_(stream.valid() ? stream.capture_id() : 0) {
    if (capture_ == 0) {
      throw UsageError("CaptureScope: the stream is not being captured");
    }
    GraphPool own;
    GraphPool& from = pool != nullptr ? *pool : own;
    for (const auto& arena : domain.open_arenas()) {
      const auto& part = from.part_of(arena);
      stream.retain_in_capture(part->lease());
      entered_.push_back(std::make_unique<Entered>(arena, capture_, part));
      part->begin();
      if (pool == nullptr) {
        own_.push_back(part);
      }
    }
  }
  CaptureScope(const CaptureScope&) = delete;
  CaptureScope& operator=(const CaptureScope&) = delete;
  ~CaptureScope() = default;

  /// Local. Nothing more is allocated in the capture, which the caller ends; it throws the graph
  /// away. What the capture took goes back now, without the other ranks, so that a rank on which a
  /// capture failed may repeat it. Memory of a pool stays with the pool.
  void drop() noexcept {
    entered_.clear();
    for (const auto& part : own_) {
      part->drop();
    }
  }

 private:
  /// One arena's share of the scope.
  class Entered {
   public:
    Entered(std::shared_ptr<SymmetricArena> arena, CaptureId capture,
            std::shared_ptr<GraphPart> part)
        : arena_(std::move(arena)), capture_(capture) {
      arena_->enter_capture(capture, std::move(part));
    }
    Entered(const Entered&) = delete;
    Entered& operator=(const Entered&) = delete;
    ~Entered() { arena_->leave_capture(capture_); }

   private:
    std::shared_ptr<SymmetricArena> arena_;
    CaptureId capture_;
  };

  CaptureId capture_;
  std::vector<std::unique_ptr<Entered>> entered_;
  std::vector<std::shared_ptr<GraphPart>> own_;  // of no pool
};

}  // namespace cohort
