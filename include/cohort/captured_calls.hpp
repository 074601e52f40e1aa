// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cohort/flight_ring.hpp"
#include "cohort/stream.hpp"

/// \file
/// The calls of a group that were captured: what each graph's launch stands for.

namespace cohort {

/// The lists of a group's graphs. One thread writes; any may read `listed`.
class CapturedCalls {
 public:
  /// Enough for the graphs of all batch sizes of a large model.
  static constexpr std::size_t kMostListed = 65'536;

  /// A graph's list of calls.
  struct List {
    std::uint64_t number = 0;                                        ///< From 1 on.
    std::uint32_t calls = 0;                                         ///< All of them.
    std::uint32_t collectives = 0;                                   ///< Those that all ranks make.
    TraceSignature signature{TraceCall::launch};                     ///< Of the collectives.
    std::vector<std::pair<std::uint8_t, std::uint64_t>> steps = {};  ///< By inbox.
    std::array<PathCounters, kCallPaths> counters = {};              ///< By path.

    /// Adds steps of one inbox.
    void add_steps(std::uint8_t inbox, std::uint64_t more) {
      for (auto& [known, count] : steps) {
        if (known == inbox) {
          count += more;
          return;
        }
      }
      if (more != 0) {
        steps.emplace_back(inbox, more);
      }
    }
  };

  /// Whether nothing was ever captured.
  [[nodiscard]] bool empty() const noexcept { return lists_.empty(); }
  /// The list of a capture, or null.
  [[nodiscard]] const List* find(CaptureId id) const noexcept {
    const auto found = lists_.find(id);
    return found == lists_.end() ? nullptr : &found->second;
  }
  /// Whether a list is missing for want of room.
  [[nodiscard]] bool forgot() const noexcept { return forgot_; }

  /// A call is captured: it gets into the graph's list, and into the ring, which other ranks see.
  [[nodiscard]] std::uint64_t add(TraceRing& ring, const TraceRecord& record, bool collective,
                                  CaptureId capture, std::uint8_t inbox) {
    const std::lock_guard lock(mutex_);
    List& list = of(ring, capture);
    ++list.calls;
    TraceRecord listed = record;
    listed.sequence = ring.listed + 1;
    listed.ticks = trace_ticks();
    listed.where = list.number;
    listed.flags = TraceRecord::kCaptured;
    listed.inbox = inbox;
    if (collective) {  // what only some ranks do is in their lists alone
      list.signature.mix(record.signature);
      listed.number = ++list.collectives;
      listed.flags |= TraceRecord::kNumbered;
    }
    calls_.push_back(listed);
    if (calls_.size() > kMostListed) {
      calls_.pop_front();
    }
    TraceRing::push(ring.captured, ring.listed, listed);
    return listed.sequence;
  }
  /// All of a captured call has been enqueued.
  void end(TraceRing& ring, CaptureId capture, std::uint8_t inbox, std::uint64_t steps,
           std::size_t path, std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    List& list = of(ring, capture);
    list.add_steps(inbox, steps);
    ++list.counters[path].calls;
    list.counters[path].bytes += bytes;
  }
  /// Lets `change` complete the record of that sequence, where it is still there.
  template <class Change>
  void complete(std::uint64_t sequence, const Change& change) noexcept {
    const std::lock_guard lock(mutex_);
    const std::uint64_t first = calls_.empty() ? sequence + 1 : calls_.front().sequence;
    if (sequence >= first) {
      change(calls_[static_cast<std::size_t>(sequence - first)]);
    }
  }
  /// In the order of capture, the last `kMostListed` of them.
  [[nodiscard]] std::vector<TraceRecord> listed() const {
    const std::lock_guard lock(mutex_);
    return {calls_.begin(), calls_.end()};
  }

 private:
  static constexpr std::size_t kMostCaptures = 16'384;

  /// The list of a capture, made where there is none.
  [[nodiscard]] List& of(TraceRing& ring, CaptureId id) {
    if (const auto found = lists_.find(id); found != lists_.end()) {
      return found->second;
    }
    if (lists_.size() == kMostCaptures) {
      lists_.erase(std::min_element(lists_.begin(), lists_.end(), [](const auto& a, const auto& b) {
        return a.second.number < b.second.number;
      }));
      forgot_ = true;
    }
    TraceRing::store(ring.captures, ring.captures + 1);
    return lists_.emplace(id, List{.number = ring.captures}).first->second;
  }

  std::unordered_map<CaptureId, List> lists_;
  bool forgot_ = false;            // a list, for want of room
  mutable std::mutex mutex_;       // of writing, and of reading calls
  std::deque<TraceRecord> calls_;  // of all captures, by sequence
};

}  // namespace cohort
