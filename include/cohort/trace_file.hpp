// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <iterator>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "cohort/fixed_text.hpp"
#include "cohort/flight_recorder.hpp"
#include "cohort/flight_ring.hpp"

/// \file
/// Rings as JSON, which `cohort_trace` reads. Of the own ring all is written; of the rings of other
/// ranks of the machine all where their process is gone, otherwise the last calls.

namespace cohort {

/// What records' times are told by: the clock of records next to that of the day, at two moments.
class TraceClock {
 public:
  TraceClock() noexcept : first_(now()) {}

  /// The same moment by both clocks.
  struct Moment {
    std::uint64_t ticks;  ///< The clock of records.
    std::int64_t ns;      ///< Since 1970.
  };
  /// This one.
  [[nodiscard]] static Moment now() noexcept {
    return {trace_ticks(), std::chrono::duration_cast<std::chrono::nanoseconds>(
                               std::chrono::system_clock::now().time_since_epoch())
                               .count()};
  }
  /// Nanoseconds since 1970 of a record that is not younger than `end`.
  [[nodiscard]] std::int64_t ns(std::uint64_t ticks, const Moment& end) const noexcept {
    const double all = static_cast<double>(end.ticks - first_.ticks);
    const double rate = all > 0 ? static_cast<double>(end.ns - first_.ns) / all : 0;
    const auto back = static_cast<double>(static_cast<std::int64_t>(end.ticks - ticks));
    return end.ns - static_cast<std::int64_t>(back * rate);
  }

 private:
  Moment first_;
};

namespace detail {

/// A text in quotes.
[[nodiscard]] inline std::string json_text(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out += fmt::format("\\u{:04x}", static_cast<unsigned>(c));
    } else {
      out += c;
    }
  }
  return out + '"';
}

/// Writes one JSON array, element by element.
class JsonArray {
 public:
  explicit JsonArray(std::string& out) : out_(out) { out_ += '['; }
  JsonArray(const JsonArray&) = delete;
  JsonArray& operator=(const JsonArray&) = delete;
  ~JsonArray() { out_ += ']'; }

  /// Where the next element goes.
  std::string& next() {
    if (!first_) {
      out_ += ',';
    }
    first_ = false;
    return out_;
  }

 private:
  std::string& out_;
  bool first_ = true;
};

inline void write_records(std::string& out,
                          const std::array<TraceRecord, TraceRing::kRecords>& records,
                          std::uint64_t last, std::uint64_t most, const TraceClock& clock,
                          const TraceClock::Moment& end) {
  JsonArray array(out);
  const std::uint64_t count = std::min(last, most);
  for (std::uint64_t sequence = last - count + 1; sequence <= last; ++sequence) {
    const auto record = TraceRing::at(records, sequence);
    if (!record) {
      continue;
    }
    fmt::format_to(
        std::back_inserter(array.next()), R"([{},{},"{}",{},{},"{}","{}",{},{},{},{},{},{},[)",
        record->sequence, clock.ns(record->ticks, end), to_string(record->call), record->number,
        record->signature, to_string(record->dtype), to_string(record->path), record->flags,
        record->inbox, record->steps, record->where, record->variant, record->ndim);
    const int shown =
        record->call == TraceCall::launch ? 2 : std::min<int>(record->ndim, TraceRecord::kExtents);
    for (int d = 0; d < shown; ++d) {
      out += fmt::format("{}{}", d == 0 ? "" : ",", record->extents[static_cast<std::size_t>(d)]);
    }
    out += "]]";
  }
}

/// What one ring says.
inline void write_ring(std::string& out, const TraceRing& ring, bool own, const TraceClock& clock,
                       const TraceClock::Moment& end) {
  constexpr std::uint64_t kFew = 64;
  const bool gone = !own && FlightRecorder::ended(ring);
  const std::uint64_t most = own || gone ? TraceRing::kRecords : kFew;
  fmt::format_to(std::back_inserter(out),
                 R"({{"rank":{},"own":{},"process":{},"gone":{},"calls":{},"listed":{},)"
                 R"("captures":{},"open":{},"ended":{},"progress":)",
                 ring.rank, own, ring.process, gone, TraceRing::load(ring.calls),
                 TraceRing::load(ring.listed), TraceRing::load(ring.captures),
                 TraceRing::load(ring.open), TraceRing::load(ring.ended) != 0);
  {
    JsonArray array(out);
    for (std::size_t inbox = 0; inbox < TraceRing::kInboxes; ++inbox) {
      const TraceProgress progress = load_words(ring.progress[inbox]);
      if (progress.issued != 0 || progress.entered != 0) {
        array.next() +=
            fmt::format("[{},{},{},{}]", inbox, progress.issued, progress.entered, progress.left);
      }
    }
  }
  out += R"(,"counters":)";
  {
    JsonArray array(out);
    for (std::size_t path = 0; path < kCallPaths; ++path) {
      const PathCounters counters = load_words(ring.counters[path]);
      if (counters.calls != 0) {
        array.next() += fmt::format(R"(["{}",{},{},{}])", to_string(static_cast<CallPath>(path)),
                                    counters.calls, counters.bytes, counters.waits);
      }
    }
  }
  out += R"(,"notes":)";
  {
    JsonArray array(out);
    for (const TraceNote& slot : ring.notes) {
      const TraceNote note = load_words(slot);
      if (note.sequence != 0) {
        array.next() += fmt::format("[{},{}]", note.sequence, json_text(text_of(note.text)));
      }
    }
  }
  out += R"(,"records":)";
  write_records(out, ring.records, TraceRing::load(ring.calls), most, clock, end);
  out += R"(,"captured":)";
  write_records(out, ring.captured, TraceRing::load(ring.listed), most, clock, end);
  out += '}';
}

/// A group with the rings that this rank can read.
inline void write_group(std::string& out, FlightRecorder& recorder, const TraceClock& clock,
                        const TraceClock::Moment& end) {
  recorder.look_at_device();
  out += fmt::format(R"({{"name":{},"rank":{},"ranks":[{}],"rings":)", json_text(recorder.group()),
                     recorder.rank(), joined(recorder.ranks(), ","));
  {
    JsonArray rings(out);
    for (int r = 0; r < static_cast<int>(recorder.ranks().size()); ++r) {
      if (const TraceRing* const ring = recorder.ring(r)) {
        write_ring(rings.next(), *ring, r == recorder.rank(), clock, end);
      }
    }
  }
  out += '}';
}

}  // namespace detail

/// The counters of groups in Prometheus's text format, one line for each group, path and number.
/// Source: Prometheus's "Exposition formats".
[[nodiscard]] inline std::string prometheus_text(
    std::span<const std::shared_ptr<FlightRecorder>> groups) {
  struct Metric {
    std::string_view name;
    std::string_view help;
    std::uint64_t PathCounters::*word;
  };
  constexpr std::array kMetrics{
      Metric{"cohort_calls_total", "Calls that took a path.", &PathCounters::calls},
      Metric{"cohort_bytes_total", "Bytes of the tensors that they were called with.",
             &PathCounters::bytes},
      Metric{"cohort_waits_total", "Times that the host waited in them for other ranks.",
             &PathCounters::waits}};
  std::string out;
  for (const Metric& metric : kMetrics) {
    out += fmt::format("# HELP {} {}\n# TYPE {} counter\n", metric.name, metric.help, metric.name);
    for (const auto& group : groups) {
      for (std::size_t path = 0; path < kCallPaths; ++path) {
        const PathCounters counters = group->counters(static_cast<CallPath>(path));
        if (counters.calls != 0) {
          out += fmt::format("{}{{group={},path=\"{}\"}} {}\n", metric.name,
                             detail::json_text(group->group()),
                             to_string(static_cast<CallPath>(path)), counters.*metric.word);
        }
      }
    }
  }
  return out;
}

}  // namespace cohort
