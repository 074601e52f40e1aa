// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cohort/call_record.hpp"
#include "cohort/call_time.hpp"
#include "cohort/captured_calls.hpp"
#include "cohort/fixed_text.hpp"
#include "cohort/flight_ring.hpp"
#include "cohort/log.hpp"
#include "cohort/machine.hpp"
#include "cohort/owner_process.hpp"
#include "cohort/poll_pause.hpp"
#include "cohort/ring_reading.hpp"
#include "cohort/stream.hpp"
#include "cohort/trace_failures.hpp"

/// \file
/// The flight recorder of one group on one rank: writes the own ring, reads those of the other
/// ranks of the machine.

namespace cohort {

/// Where a group's rings lie.
struct TraceRings {
  std::vector<TraceRing*> by_rank = {};  ///< By rank in the group; null where not mapped here.
  std::shared_ptr<void> keep = {};       ///< Keeps them mapped.
};

/// Calls are recorded by the thread that makes them; others may read. No call allocates, outside of
/// captures.
class FlightRecorder {
 public:
  /// @param ranks  World ranks, by rank in the group.
  FlightRecorder(std::string group, int rank, std::vector<int> ranks, TraceRings rings)
      : rank_(rank), group_(std::move(group)), ranks_(std::move(ranks)), rings_(std::move(rings)) {
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

  /// Whether calls are to be recorded: they are, unless what records cost is being measured. Equal
  /// on all ranks for each call.
  [[nodiscard]] bool is_on() const noexcept { return is_on_; }
  /// Between calls, by the thread that makes them.
  void turn(bool on) noexcept { is_on_ = on; }

  /// A call begins. `record` says what it is; sequence, time, number and stream are filled in here.
  [[nodiscard]] TraceEntry begin(const TraceRecord& record, std::size_t bytes, bool collective,
                                 const StreamRef& stream, CaptureId capture,
                                 const TransportStand& stand, std::uint64_t waits) {
    TraceEntry entry;
    begin_into(
        entry, [&record] { return record; }, bytes, collective, stream, capture, stand, waits);
    return entry;
  }
  /// The same, built where the entry is to be kept, from what `record()` gives. A thing that is
  /// written in small pieces and read at once in larger ones keeps the processor waiting until
  /// whatever was stored before has left for the cache; so entries are not copied, and a record
  /// goes from registers into the ring, for which all of this is inlined.
  template <class Record>
  [[gnu::always_inline]] void begin_into(TraceEntry& entry, const Record& record, std::size_t bytes,
                                         bool collective, const StreamRef& stream,
                                         CaptureId capture, const TransportStand& stand,
                                         std::uint64_t waits) {
    if (alone_ == nullptr) {
      owner_.check(group_);  // a forked child would write into its parent's
    }
    TraceRing& ring = *own_;
    // Not written for a thousand calls, so it is far away: fetched while the record is put
    // together.
    detail::fetch_to_write(&ring.records[TraceRing::slot(ring.calls + 1)]);
    entry.steps = stand.steps;
    entry.waits = waits;
    entry.bytes = bytes;
    entry.capture = capture;
    entry.inbox = stand.inbox;
    entry.before = ring.open;
    if (capture != 0) [[unlikely]] {
      list(entry, record, collective);
      return;
    }
    const std::uint64_t ticks = trace_ticks();  // which takes longest
    const std::uint64_t sequence = ring.calls + 1;
    const std::uint64_t numbered = ring.numbered + (collective ? 1 : 0);
    entry.sequence = sequence;
    comes_on(stream, stand.inbox);
    TraceRing::store(ring.numbered, numbered);
    TraceRing::push(ring.records, ring.calls, record(),
                    {.sequence = sequence,
                     .ticks = ticks,
                     .where = reinterpret_cast<std::uintptr_t>(stream.native()),
                     .number = collective ? static_cast<std::uint32_t>(numbered) : 0,
                     .flags = collective ? TraceRecord::kNumbered : std::uint8_t{0},
                     .inbox = stand.inbox});
    TraceRing::store(ring.open, sequence);
  }

  /// All of it has been enqueued.
  [[gnu::always_inline]] void end(const TraceEntry& entry, const TransportStand& stand,
                                  std::uint64_t waits) {
    const std::uint64_t steps = stand.steps - entry.steps;
    const auto path = static_cast<std::size_t>(stand.path);
    if (entry.capture != 0) [[unlikely]] {
      end_captured(entry, stand.path, steps, 0);
      captured_.end(*own_, entry.capture, entry.inbox, steps, path, entry.bytes);
      return;
    }
    end_eager(entry, stand.path, steps, 0);
    TraceRing& ring = *own_;
    PathCounters& counters = ring.counters[path];
    TraceRing::add(counters.calls, 1);
    TraceRing::add(counters.bytes, entry.bytes);
    TraceRing::add(counters.waits, waits - entry.waits);
    TraceRing::store(ring.open, entry.before);
  }

  /// It was left by an exception. What it had enqueued is there.
  [[gnu::cold, gnu::noinline]] void abandon(const TraceEntry& entry,
                                            const TransportStand& stand) noexcept {
    if (!writes()) {
      return;
    }
    const std::uint64_t steps = stand.steps - entry.steps;
    if (entry.capture != 0) {
      end_captured(entry, stand.path, steps, TraceRecord::kFailed);
    } else {
      end_eager(entry, stand.path, steps, TraceRecord::kFailed);
      TraceRing::store(own_->open, entry.before);
    }
  }

  /// A graph is launched on `stream`: the one that `capture` made, or where that is 0 the engine's
  /// own, of which nothing is known. Nothing is recorded of graphs without calls of the group. It
  /// is compared with the others' launches where all ranks make calls in the graph.
  void launch(const StreamRef& stream, CaptureId capture) noexcept {
    if (captured_.empty() || !writes() || !is_on_) {
      return;
    }
    TraceRecord record{.ticks = trace_ticks(),
                       .signature = TraceSignature(TraceCall::launch).word(),
                       .call = TraceCall::launch};
    const CapturedCalls::List* const found = captured_.find(capture);
    if (found == nullptr && capture != 0 && !captured_.forgot()) {
      return;
    }
    if (found != nullptr) {
      const CapturedCalls::List& list = *found;
      record.where = list.number;
      record.signature = list.signature.word();
      record.extents[0] = list.calls;
      record.extents[2] = static_cast<std::uint32_t>(list.steps.size());
      for (const auto& [inbox, steps] : list.steps) {
        record.inbox = inbox;
        record.extents[1] += static_cast<std::uint32_t>(steps);
        comes_on(stream, inbox);
        issue(inbox, steps);
      }
      for (std::size_t path = 0; path < kCallPaths; ++path) {
        TraceRing::add(own_->counters[path].calls, list.counters[path].calls);
        TraceRing::add(own_->counters[path].bytes, list.counters[path].bytes);
      }
      if (list.collectives != 0) {
        record.number = next_number();
        record.flags = TraceRecord::kNumbered;
      }
    }
    record.variant = static_cast<std::int32_t>(reinterpret_cast<std::uintptr_t>(stream.native()));
    record.sequence = own_->calls + 1;
    TraceRing::push(own_->records, own_->calls, record);
  }

  /// A wait for `stream` came back: what it got has ended, and so has whatever came before that in
  /// the same inbox. Taken into account where this thread made the last call, because nobody can
  /// have enqueued more since. `perhaps_left` and `left` follow when the device is looked at.
  void settle(const StreamRef& stream) noexcept {
    const detail::CallClock* mine = &detail::call_clock();
    const auto is_mine = [&] { return unsettled_by_.load(std::memory_order_relaxed) == mine; };
    if (!is_mine() || !writes()) {
      return;
    }
    bool all = true;
    for (std::size_t inbox = 0; inbox < TraceRing::kInboxes; ++inbox) {
      TraceProgress& progress = own_->progress[inbox];
      const std::uint64_t issued = TraceRing::load(progress.issued);
      if (TraceRing::load(progress.settled) == issued) {
        continue;
      }
      if (streams_[inbox].load(std::memory_order_relaxed) != stream.native()) {
        all = false;
      } else if (is_mine()) {  // and no other thread has come meanwhile
        TraceRing::store(progress.settled, issued);
      }
    }
    if (all) {
      unsettled_by_.compare_exchange_strong(mine, nullptr, std::memory_order_relaxed);
    }
  }

  /// The calls in graphs' lists, in the order of capture: the last `CapturedCalls::kMostListed` of
  /// them.
  [[nodiscard]] std::vector<TraceRecord> listed() const { return captured_.listed(); }

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
        .number = next_number(),
        .signature = signature.word(),
        .call = TraceCall::agreement,
        .flags = TraceRecord::kNumbered,
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
    return record ? describe_record(*own_, *record) : "";
  }
  /// The same with what the ranks compare of it, launches of graphs included.
  [[nodiscard]] std::optional<OpenCall> call_to_compare() const { return open_call_in(*own_); }
  /// The ranks of this machine that have not come as far as this one, and what each did last:
  /// "rank 1 has not come to all_reduce #57; its last call is all_gather #56". "" where none is
  /// behind.
  [[nodiscard]] std::string behind() const {
    std::string text;
    for (int r = 0; r < static_cast<int>(ranks_.size()); ++r) {
      if (const TraceRing* const other = r == rank_ ? nullptr : ring(r); other != nullptr) {
        const std::string words = behind_in(*own_, r, *other);
        text += (text.empty() || words.empty() ? "" : "; ") + words;
      }
    }
    return text;
  }

  /// Asks the device how far it has come, where a transport has said how; any thread may.
  void look_at_device() noexcept {
    const std::lock_guard lock(look_mutex_);
    if (look_) {
      try {
        look_(*own_);
        if (own_->looked != TraceRing::kLive) {
          TraceRing::store(own_->looked, trace_ticks());
        }
      } catch (const std::exception& error) {
        log(LogLevel::info, "group {}: how far the device has come: {}", group_, error.what());
      }
    }
  }
  /// How that is done, until the group closes; by default nothing has to be.
  void look_at_device(std::function<void(TraceRing&)> look) noexcept {
    const std::lock_guard lock(look_mutex_);
    look_ = std::move(look);
  }

  /// What to do when a call fails other than by its arguments. Waits for what is being done.
  void on_failure(TraceFailures::Act act) noexcept { failures_.on_failure(std::move(act)); }
  /// A call has failed; `late` where ranks did not come in time, of whom `missing` are known.
  void failed(std::string_view why, bool late, std::vector<int> missing = {}) noexcept {
    try {
      failures_.add(*this, {std::string(why), late, std::move(missing), ended_calls()});
    } catch (const std::exception& error) {
      log(LogLevel::error, "group {}: the trace: {}", group_, error.what());
    }
  }
  /// The failure that tells most of those since a call last came to its end.
  [[nodiscard]] std::optional<TraceFailure> failure() const { return failures_.telling(); }
  /// Calls that have come to their end, on all paths.
  [[nodiscard]] std::uint64_t ended_calls() const noexcept {
    std::uint64_t sum = 0;
    for (std::size_t path = 0; path < kCallPaths; ++path) {
      sum += counters(static_cast<CallPath>(path)).calls;
    }
    return sum;
  }

 private:
  /// A call or launch that has not enqueued its steps.
  void comes_on(const StreamRef& stream, std::uint8_t inbox) noexcept {
    unsettled_by_.store(&detail::call_clock(), std::memory_order_relaxed);
    streams_[inbox].store(stream.native(), std::memory_order_relaxed);
  }
  /// Steps were enqueued. Who sees them sees who enqueued them.
  void issue(std::uint8_t inbox, std::uint64_t steps) noexcept {
    std::uint64_t& issued = own_->progress[inbox].issued;
    TraceRing::store(issued, issued + steps);
  }

  /// A call is captured.
  template <class Record>
  [[gnu::noinline]] void list(TraceEntry& entry, const Record& record, bool collective) {
    entry.sequence = captured_.add(*own_, record(), collective, entry.capture, entry.inbox);
  }

  /// Whether the ring is this process's: a forked child would write into its parent's.
  [[nodiscard]] bool writes() const noexcept { return alone_ != nullptr || owner_.is_here(); }

  /// The low half of the number of a call that all ranks make.
  [[nodiscard]] std::uint32_t next_number() noexcept {
    TraceRing::add(own_->numbered, 1);
    return static_cast<std::uint32_t>(own_->numbered);
  }

  /// Completes a record, unless it was overwritten: a call may push a thousand others.
  static void complete(TraceRecord& at, std::uint64_t sequence, CallPath path, std::uint64_t steps,
                       std::uint8_t flags) noexcept {
    if (at.sequence != sequence) [[unlikely]] {
      return;
    }
    std::atomic_ref<CallPath>(at.path).store(path, std::memory_order_relaxed);
    std::atomic_ref<std::uint16_t>(at.steps).store(
        static_cast<std::uint16_t>(std::min<std::uint64_t>(steps, 0xffff)),
        std::memory_order_relaxed);
    if (flags != 0) {
      std::atomic_ref<std::uint8_t>(at.flags).store(at.flags | flags, std::memory_order_relaxed);
    }
  }
  [[gnu::always_inline]] void end_eager(const TraceEntry& entry, CallPath path, std::uint64_t steps,
                                        std::uint8_t flags) noexcept {
    complete(own_->records[TraceRing::slot(entry.sequence)], entry.sequence, path, steps, flags);
    issue(entry.inbox, steps);
  }
  [[gnu::noinline]] void end_captured(const TraceEntry& entry, CallPath path, std::uint64_t steps,
                                      std::uint8_t flags) noexcept {
    const auto finish = [&](TraceRecord& at) { complete(at, entry.sequence, path, steps, flags); };
    finish(own_->captured[TraceRing::slot(entry.sequence)]);
    captured_.complete(entry.sequence, finish);
  }

  // What each call reads and writes, side by side.
  alignas(64) TraceRing* own_ = nullptr;
  std::unique_ptr<TraceRing> alone_;  // where no other rank can see it
  OwnerProcess owner_;
  bool is_on_ = true;
  int rank_;
  // The thread that made the last call or launch, where it is not known that all of them ended.
  std::atomic<const detail::CallClock*> unsettled_by_{nullptr};
  std::array<std::atomic<const void*>, TraceRing::kInboxes> streams_{};  // of the last, by inbox
  std::string group_;
  std::vector<int> ranks_;
  TraceRings rings_;
  CapturedCalls captured_;
  OwnerMutex look_mutex_;
  std::function<void(TraceRing&)> look_;
  TraceFailures failures_;
};

}  // namespace cohort
