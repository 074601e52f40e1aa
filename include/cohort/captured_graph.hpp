// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <exception>
#include <functional>
#include <memory>
#include <utility>

#include "cohort/error.hpp"
#include "cohort/formed_groups.hpp"
#include "cohort/graph_capture.hpp"
#include "cohort/log.hpp"
#include "cohort/stream.hpp"

/// \file
/// Graphs over all groups of a state, and the place of their launches among the groups' calls.

namespace cohort {

namespace detail {

/// The order of a state's graph launches. Graphs keep it beyond the state.
class LaunchOrder {
 public:
  /// Of launches that hold calls of these groups and memory of these arenas.
  LaunchOrder(std::shared_ptr<const FormedGroups> formed,
              std::weak_ptr<const CaptureDomain> captures)
      : formed_(std::move(formed)), captures_(std::move(captures)) {}

  /// Puts what `stream` gets next behind the calls of all groups, and behind the eager uses of the
  /// memory that captures took. `graph` is the number of the graph's capture, or 0.
  void before(StreamRef stream, CaptureId graph) const {
    const auto captures = captures_.lock();
    if (formed_->all().empty() || captures == nullptr) {
      throw UsageError("graph launch: the ParallelState of the graph was destroyed");
    }
    formed_->throw_if_all_closed("graph launch");
    for (GroupCoordinator* group : formed_->all()) {
      if (!group->closed()) {  // a graph with its calls says so itself
        group->order(stream, graph);
      }
    }
    for (const auto& arena : captures->arenas()) {
      arena->order_launch(stream);  // those of audiences as well
    }
  }
  /// Lets later calls on other streams wait for the launch and for nothing else.
  void behind(StreamRef stream) const {
    formed_->throw_if_all_closed("graph launch");
    for (GroupCoordinator* group : formed_->all()) {
      if (!group->closed()) {
        group->launched(stream);
      }
    }
  }

  /// The launch was refused, or a wait before or behind it: it may hold calls of any group. Where
  /// one has failed, that is what was thrown, and the others are left as they are.
  void refused(const std::exception_ptr& error) const noexcept {
    for (const GroupCoordinator* group : formed_->all()) {
      if (!group->closed() && group->failed()) {
        return;
      }
    }
    for (GroupCoordinator* group : formed_->all()) {
      if (!group->closed()) {
        group->refused(error);
      }
    }
  }

 private:
  std::shared_ptr<const FormedGroups> formed_;
  std::weak_ptr<const CaptureDomain> captures_;
};

/// Ends a capture that failed.
inline void drop_capture(StreamRef stream) noexcept {
  try {
    stream.driver().end_capture(stream.native()).reset();
  } catch (const std::exception& error) {
    log(LogLevel::info, "a dropped capture had failed: {}", error.what());
  }
}

}  // namespace detail

/// A captured graph and the memory that it leases.
class CapturedGraph {
 public:
  /// `id` is the number of its capture.
  CapturedGraph(std::unique_ptr<ExecutableGraph> graph, CaptureId id, detail::LaunchOrder order)
      : graph_(std::move(graph)), id_(id), order_(std::move(order)) {}

  /// Enqueues the captured work after the eager calls so far, on whichever streams. All ranks
  /// launch the same sequence of graphs and calls. Throws `UsageError` after the state's shutdown.
  void launch(StreamRef stream) {
    try {
      order_.before(stream, id_);
      graph_->launch(stream);
      order_.behind(stream);
    } catch (const TransportError&) {
      order_.refused(std::current_exception());
      throw;
    }
  }

 private:
  std::unique_ptr<ExecutableGraph> graph_;
  CaptureId id_;
  detail::LaunchOrder order_;
};

namespace detail {

/// Captures what `record` enqueues on `stream`; see `ParallelState::capture`.
[[nodiscard]] inline CapturedGraph capture_graph(const CaptureDomain& captures, LaunchOrder order,
                                                 StreamRef stream,
                                                 const std::function<void()>& record,
                                                 GraphPool* pool) {
  if (!stream.valid()) {
    throw UsageError("capture stream: expected a stream, got none");
  }
  if (!record) {
    throw UsageError("capture record: expected a function, got an empty one");
  }
  auto& driver = stream.driver();
  driver.begin_capture(stream.native());
  CaptureId id = 0;
  try {
    id = stream.capture_id();
    CaptureScope scope(captures, stream, pool);
    try {
      record();
    } catch (...) {
      scope.drop();
      throw;
    }
  } catch (...) {
    drop_capture(stream);
    throw;
  }
  return {driver.end_capture(stream.native()), id, std::move(order)};
}

}  // namespace detail

}  // namespace cohort
