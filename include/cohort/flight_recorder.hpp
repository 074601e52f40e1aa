// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cohort/fixed_text.hpp"
#include "cohort/flight_ring.hpp"
#include "cohort/log.hpp"
#include "cohort/machine.hpp"
#include "cohort/owner_process.hpp"
#include "cohort/stream.hpp"
#include "cohort/tensor.hpp"

/// \file
/// The flight recorder of one group on one rank: writes the own ring, reads those of the other
/// ranks of the machine.

namespace cohort {

/// Where a group's rings lie.
struct TraceRings {
  std::vector<TraceRing*> by_rank = {};  ///< By rank in the group; null where not mapped here.
  std::shared_ptr<void> keep = {};       ///< Keeps them mapped.
};

/// What a transport has done so far, as the recorder asks before and behind each call.
struct TransportStand {
  std::uint64_t steps = 0;            ///< Enqueued or captured, in all inboxes.
  std::uint8_t inbox = 0;             ///< That counts the steps of the next call.
  CallPath path = CallPath::unknown;  ///< Of the last call.
};

/// The record of a call with a tensor: what has to be equal on all ranks goes into its signature.
/// @param dim    Along it extents differ between the ranks where there are `sizes`, all ranks' own.
/// @param variant  The op, root, peer or base.
template <class Void>
[[nodiscard]] TraceRecord trace_record(TraceCall call, const BasicTensorView<Void>& x, int dim,
                                       std::span<const std::int64_t> sizes, int variant) noexcept {
  const Dims& shape = x.shape();
  // Equal shares follow from the shape, and are the same whichever call was made with them.
  const bool uneven = std::any_of(sizes.begin(), sizes.end(),
                                  [&sizes](std::int64_t size) { return size != sizes.front(); });
  TraceSignature signature(call);
  signature.mix(static_cast<std::int64_t>(variant) * 0x1000000 + dim * 0x10000 +
                shape.size() * 0x100 + static_cast<int>(x.dtype()));
  for (int d = 0; d < shape.size(); ++d) {
    signature.mix(d == dim && uneven ? 0 : shape[d]);
  }
  if (uneven) {
    signature.mix(sizes);
  }
  TraceRecord record{.signature = signature.word(),
                     .call = call,
                     .dtype = x.dtype(),
                     .ndim = static_cast<std::uint8_t>(shape.size()),
                     .variant = variant};
  for (int d = 0; d < std::min(shape.size(), TraceRecord::kExtents); ++d) {
    record.extents[static_cast<std::size_t>(d)] = static_cast<std::uint32_t>(
        std::min<std::int64_t>(shape[d], std::numeric_limits<std::uint32_t>::max()));
  }
  return record;
}

/// A call under way.
struct TraceEntry {
  std::uint64_t sequence = 0;  ///< 0 where nothing is recorded.
  std::uint64_t before = 0;    ///< What was open.
  std::uint64_t steps = 0;     ///< Of the transport, when it began.
  std::uint64_t waits = 0;     ///< Of the thread, when it began.
  std::size_t bytes = 0;       ///< Of the tensor that it was called with.
  bool captured = false;       ///< It is of a graph's list.
  std::uint8_t inbox = 0;      ///< That counts its steps.
};

/// Calls are recorded by the thread that makes them; others may read. No call allocates, outside of
/// captures.
class FlightRecorder {
 public:
  /// @param ranks  World ranks, by rank in the group.
  FlightRecorder(std::string group, int rank, std::vector<int> ranks, TraceRings rings)
      : group_(std::move(group)), rank_(rank), ranks_(std::move(ranks)), rings_(std::move(rings)) {
    rings_.by_rank.resize(ranks_.size(), nullptr);
    TraceRing*& own = rings_.by_rank[static_cast<std::size_t>(rank_)];
    if (own == nullptr) {
      alone_ = std::make_unique<TraceRing>();
      own = alone_.get();
    }
    own_ = own;
    own_->rank = rank_;
    own_->process = ::getpid();
    own_->process_namespace = pid_namespace();
    own_->process_start = process_start_time("self");
    std::atomic_ref<std::uint32_t>(own_->protocol)
        .store(TraceRing::kProtocol, std::memory_order_release);
  }
  FlightRecorder(const FlightRecorder&) = delete;
  FlightRecorder& operator=(const FlightRecorder&) = delete;
  ~FlightRecorder() = default;

  /// The group's name.
  [[nodiscard]] const std::string& group() const noexcept { return group_; }
  /// This rank in the group.
  [[nodiscard]] int rank() const noexcept { return rank_; }
  /// World ranks, by rank in the group.
  [[nodiscard]] const std::vector<int>& ranks() const noexcept { return ranks_; }
  /// What this rank writes.
  [[nodiscard]] TraceRing& own() noexcept { return *own_; }
  /// A rank's ring, or null where it is not mapped here or that rank has not begun it.
  [[nodiscard]] const TraceRing* ring(int rank) const noexcept {
    const TraceRing* const ring = rings_.by_rank[static_cast<std::size_t>(rank)];
    return ring != nullptr &&
                   std::atomic_ref<std::uint32_t>(const_cast<std::uint32_t&>(ring->protocol))
                           .load(std::memory_order_acquire) == TraceRing::kProtocol
               ? ring
               : nullptr;
  }
  /// Calls that took a path.
  [[nodiscard]] PathCounters counters(CallPath path) const noexcept {
    return detail::load_words(own_->counters[static_cast<std::size_t>(path)]);
  }

  /// A call begins. `record` says what it is; sequence, time, number and stream are filled in here.
  [[nodiscard]] TraceEntry begin(const TraceRecord& record, std::size_t bytes, bool collective,
                                 const StreamRef& stream, CaptureId capture,
                                 const TransportStand& stand, std::uint64_t waits) {
    if (alone_ == nullptr) {
      owner_.check(group_);  // a forked child would write into its parent's
    }
    TraceEntry entry{.before = own_->open,
                     .steps = stand.steps,
                     .waits = waits,
                     .bytes = bytes,
                     .captured = capture != 0,
                     .inbox = stand.inbox};
    if (capture != 0) {
      Capture& list = of(capture);
      list.signature.mix(record.signature);
      entry.sequence = own_->listed + 1;
      TraceRing::push(own_->captured, own_->listed, record,
                      {.sequence = entry.sequence,
                       .ticks = trace_ticks(),
                       .where = list.number,
                       .number = ++list.calls,
                       .flags = TraceRecord::kCaptured,
                       .inbox = stand.inbox});
      return entry;
    }
    entry.sequence = own_->calls + 1;
    TraceRing::push(own_->records, own_->calls, record,
                    {.sequence = entry.sequence,
                     .ticks = trace_ticks(),
                     .where = reinterpret_cast<std::uintptr_t>(stream.native()),
                     .number = collective ? ++number_ : 0,
                     .inbox = stand.inbox});
    TraceRing::store(own_->open, entry.sequence);
    return entry;
  }

  /// All of it has been enqueued.
  void end(const TraceEntry& entry, const TransportStand& stand, std::uint64_t waits) noexcept {
    const std::uint64_t steps = stand.steps - entry.steps;
    auto& records = entry.captured ? own_->captured : own_->records;
    TraceRecord& at = records[TraceRing::slot(entry.sequence)];
    if (at.sequence == entry.sequence) {  // a call within may have pushed a thousand others
      std::atomic_ref<CallPath>(at.path).store(stand.path, std::memory_order_relaxed);
      std::atomic_ref<std::uint16_t>(at.steps).store(static_cast<std::uint16_t>(steps),
                                                     std::memory_order_relaxed);
    }
    const auto path = static_cast<std::size_t>(stand.path);
    if (entry.captured) {
      Capture& list = captures_.back();
      list.add_steps(entry.inbox, steps);
      ++list.counters[path].calls;
      list.counters[path].bytes += entry.bytes;
      return;
    }
    TraceRing::add(own_->progress[entry.inbox].issued, steps);
    PathCounters& counters = own_->counters[path];
    TraceRing::add(counters.calls, 1);
    TraceRing::add(counters.bytes, entry.bytes);
    TraceRing::add(counters.waits, waits - entry.waits);
    TraceRing::store(own_->open, entry.before);
  }

  /// A graph is launched on `stream`: the one that `capture` made, or where that is 0 the engine's
  /// own, of which nothing is known. Nothing is recorded of graphs without calls of the group.
  void launch(const StreamRef& stream, CaptureId capture) noexcept {
    if (captures_.empty() || !writes()) {
      return;
    }
    TraceRecord record{.ticks = trace_ticks(),
                       .where = 0,
                       .signature = TraceSignature(TraceCall::launch).word(),
                       .call = TraceCall::launch};
    if (capture != 0) {
      const auto found = find(capture);
      if (found == captures_.end()) {
        return;
      }
      record.where = found->number;
      record.signature = found->signature.word();
      record.extents = {found->calls};
      for (const auto& [inbox, steps] : found->steps) {
        record.inbox = inbox;
        record.extents[1] += static_cast<std::uint32_t>(steps);
        TraceRing::add(own_->progress[inbox].issued, steps);
      }
      for (std::size_t path = 0; path < kCallPaths; ++path) {
        TraceRing::add(own_->counters[path].calls, found->counters[path].calls);
        TraceRing::add(own_->counters[path].bytes, found->counters[path].bytes);
      }
    }
    record.number = ++number_;
    record.variant = static_cast<std::int32_t>(reinterpret_cast<std::uintptr_t>(stream.native()));
    record.sequence = own_->calls + 1;
    TraceRing::push(own_->records, own_->calls, record);
  }

  /// The ranks begin to agree on something; to be ended by `agreed`.
  [[nodiscard]] std::uint64_t agree(std::string_view place, std::uint64_t bytes) noexcept {
    if (!writes()) {
      return 0;
    }
    TraceNote note{.sequence = own_->noted + 1};
    detail::copy_text(place, note.text);
    detail::store_words(own_->notes[(note.sequence - 1) % TraceRing::kNotes], note);
    TraceRing::store(own_->noted, note.sequence);
    TraceSignature signature(TraceCall::agreement);
    for (const char c : place) {
      signature.mix(c);
    }
    signature.mix(static_cast<std::int64_t>(bytes));
    TraceRecord record{
        .sequence = own_->calls + 1,
        .ticks = trace_ticks(),
        .number = ++number_,
        .signature = signature.word(),
        .call = TraceCall::agreement,
        .ndim = 1,
        .variant = static_cast<std::int32_t>(note.sequence),
        .extents = {static_cast<std::uint32_t>(std::min<std::uint64_t>(bytes, 0xffffffffU))}};
    const std::uint64_t before = own_->open;
    TraceRing::push(own_->records, own_->calls, record);
    TraceRing::store(own_->open, record.sequence);
    return before;
  }
  /// The ranks have agreed. `before` is what `agree` gave.
  void agreed(std::uint64_t before) noexcept {
    if (writes()) {
      TraceRing::store(own_->open, before);
    }
  }

  /// The group was closed: nobody is missed in it any longer.
  void close() noexcept {
    if (writes()) {
      TraceRing::store(own_->ended, 1);
    }
    look_at_device({});
  }

  /// What the host is in, for messages: "all_gather #12" or "agreement #3, growth of arena tp[0]";
  /// "" for nothing.
  [[nodiscard]] std::string open_call() const {
    const std::uint64_t open = TraceRing::load(own_->open);
    const auto record = open == 0 ? std::nullopt : TraceRing::at(own_->records, open);
    return record ? describe(*own_, *record) : "";
  }
  /// What a record is, in a few words.
  [[nodiscard]] static std::string describe(const TraceRing& ring, const TraceRecord& record) {
    std::string text = fmt::format("{} #{}", to_string(record.call), record.number);
    if (record.call == TraceCall::agreement) {
      const TraceNote note = detail::load_words(
          ring.notes[(static_cast<std::size_t>(record.variant) - 1) % TraceRing::kNotes]);
      if (note.sequence == static_cast<std::uint64_t>(record.variant)) {
        text += fmt::format(", {}", detail::text_of(note.text));
      }
    }
    return text;
  }

  /// The ranks of this machine that have not come as far as this one, and what each did last:
  /// "rank 1 has not come to all_reduce #57; its last call is all_gather #56". "" where none is
  /// behind.
  [[nodiscard]] std::string behind() const {
    std::string text;
    const auto mine = last_numbered(*own_);
    for (int r = 0; mine && r < static_cast<int>(ranks_.size()); ++r) {
      const TraceRing* const other = ring(r);
      const auto theirs = r == rank_ || other == nullptr ? std::nullopt : last_numbered(*other);
      if (r == rank_ || other == nullptr || (theirs && theirs->number >= mine->number)) {
        continue;
      }
      text += fmt::format("{}rank {} has not come to {}; its last call is {}{}",
                          text.empty() ? "" : "; ", r, describe(*own_, *mine),
                          theirs ? describe(*other, *theirs) : "none",
                          ended(*other) ? ", and its process is gone" : "");
    }
    return text;
  }
  /// Whether the process of a ring is known to have ended.
  [[nodiscard]] static bool ended(const TraceRing& ring) {
    return ring.process_namespace == pid_namespace() &&
           process_ended(ring.process, ring.process_start);
  }

  /// Asks the device how far it has come, where a transport has said how; any thread may.
  void look_at_device() noexcept {
    const std::lock_guard lock(mutex_);
    if (look_) {
      try {
        look_(*own_);
      } catch (const std::exception& error) {
        log(LogLevel::info, "group {}: how far the device has come: {}", group_, error.what());
      }
    }
  }
  /// How that is done, until the group closes; by default nothing has to be.
  void look_at_device(std::function<void(TraceRing&)> look) noexcept {
    const std::lock_guard lock(mutex_);
    look_ = std::move(look);
  }

  /// What to do when a call fails other than by its arguments.
  void on_failure(std::function<void(std::string_view why, bool late)> act) noexcept {
    const std::lock_guard lock(mutex_);
    failed_ = std::move(act);
  }
  /// A call has failed; `late` where ranks did not come in time.
  void failed(std::string_view why, bool late) noexcept {
    try {
      std::function<void(std::string_view, bool)> act;
      {
        const std::lock_guard lock(mutex_);
        act = failed_;
      }
      if (act) {
        act(why, late);
      }
    } catch (const std::exception& error) {
      log(LogLevel::error, "group {}: the trace: {}", group_, error.what());
    }
  }

 private:
  /// Whether the ring is this process's: a forked child would write into its parent's.
  [[nodiscard]] bool writes() const noexcept { return alone_ != nullptr || owner_.is_here(); }

  /// A graph's list of calls.
  struct Capture {
    CaptureId id = 0;
    std::uint64_t number = 0;  ///< From 1 on.
    std::uint32_t calls = 0;
    TraceSignature signature{TraceCall::launch};
    std::vector<std::pair<std::uint8_t, std::uint64_t>> steps = {};  ///< By inbox.
    std::array<PathCounters, kCallPaths> counters = {};

    void add_steps(std::uint8_t inbox, std::uint64_t more) {
      for (auto& [known, count] : steps) {
        if (known == inbox) {
          count += more;
          return;
        }
      }
      steps.emplace_back(inbox, more);
    }
  };
  static constexpr std::size_t kMostCaptures = 1024;

  [[nodiscard]] std::vector<Capture>::iterator find(CaptureId id) noexcept {
    return std::find_if(captures_.begin(), captures_.end(),
                        [id](const Capture& capture) { return capture.id == id; });
  }
  /// The list of a capture, made where there is none; the last of all from then on.
  [[nodiscard]] Capture& of(CaptureId id) {
    if (const auto found = find(id); found != captures_.end()) {
      std::rotate(found, found + 1, captures_.end());
      return captures_.back();
    }
    if (captures_.size() == kMostCaptures) {
      captures_.erase(captures_.begin());
    }
    TraceRing::store(own_->captures, own_->captures + 1);
    captures_.push_back({.id = id, .number = own_->captures});
    return captures_.back();
  }

  /// The last record of a call that all ranks make.
  [[nodiscard]] static std::optional<TraceRecord> last_numbered(const TraceRing& ring) noexcept {
    const std::uint64_t last = TraceRing::load(ring.calls);
    for (std::uint64_t back = 0; back < std::min<std::uint64_t>(last, TraceRing::kRecords);
         ++back) {
      const auto record = TraceRing::at(ring.records, last - back);
      if (record && record->number != 0) {
        return record;
      }
    }
    return std::nullopt;
  }

  OwnerProcess owner_;
  std::string group_;
  int rank_;
  std::vector<int> ranks_;
  TraceRings rings_;
  std::unique_ptr<TraceRing> alone_;  // where no other rank can see it
  TraceRing* own_ = nullptr;
  std::uint32_t number_ = 0;  // of calls that all ranks make
  std::vector<Capture> captures_;
  std::mutex mutex_;  // of what follows
  std::function<void(TraceRing&)> look_;
  std::function<void(std::string_view, bool)> failed_;
};

namespace detail {

/// An agreement, from its beginning until it is left in whichever way.
class TracedAgreement {
 public:
  TracedAgreement(FlightRecorder* recorder, std::string_view place, std::uint64_t bytes) noexcept
      : recorder_(recorder), before_(recorder != nullptr ? recorder->agree(place, bytes) : 0) {}
  TracedAgreement(const TracedAgreement&) = delete;
  TracedAgreement& operator=(const TracedAgreement&) = delete;
  ~TracedAgreement() {
    if (recorder_ != nullptr) {
      recorder_->agreed(before_);
    }
  }

 private:
  FlightRecorder* recorder_;
  std::uint64_t before_;
};

/// Runs `body`; what it throws other than for its arguments is reported to the recorder first.
template <class Body>
auto reporting(FlightRecorder* recorder, const Body& body) {
  try {
    return body();
  } catch (const UsageError&) {
    throw;
  } catch (const ConfigError&) {
    throw;
  } catch (const TimeoutError& error) {
    if (recorder != nullptr) {
      recorder->failed(error.what(), true);
    }
    throw;
  } catch (const Error& error) {
    if (recorder != nullptr) {
      recorder->failed(error.what(), false);
    }
    throw;
  }
}

}  // namespace detail
}  // namespace cohort
