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

/// How many bytes the UTF-8 character at the front of a text takes; 0 where there is none.
/// Source: RFC 3629, section 4.
[[nodiscard]] constexpr std::size_t utf8_length(std::string_view text) noexcept {
  const auto byte = [text](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte(0);
  const std::size_t length = lead < 0x80                   ? 1
                             : lead >= 0xc2 && lead < 0xe0 ? 2
                             : lead >= 0xe0 && lead < 0xf0 ? 3
                             : lead >= 0xf0 && lead < 0xf5 ? 4
                                                           : 0;
  if (length == 0 || length > text.size()) {
    return 0;
  }
  for (std::size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xc0U) != 0x80) {
      return 0;
    }
  }
  const bool too_long = (lead == 0xe0 && byte(1) < 0xa0) || (lead == 0xf0 && byte(1) < 0x90);
  const bool beyond = (lead == 0xed && byte(1) >= 0xa0) || (lead == 0xf4 && byte(1) >= 0x90);
  return too_long || beyond ? 0 : length;
}

/// A text in quotes. What is no UTF-8 becomes the replacement character.
[[nodiscard]] inline std::string json_text(std::string_view text) {
  std::string out = "\"";
  for (std::size_t i = 0; i < text.size();) {
    const std::size_t length = utf8_length(text.substr(i));
    const char c = text[i];
    if (length == 0) {
      out += "\\ufffd";
    } else if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out += fmt::format("\\u{:04x}", static_cast<unsigned>(c));
    } else {
      out += text.substr(i, length);
    }
    i += std::max<std::size_t>(1, length);
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

/// What becomes of ticks, and of halves of numbers.
struct TraceUnits {
  const TraceClock& clock;
  TraceClock::Moment end;      ///< Of all records.
  std::uint64_t numbered = 0;  ///< The ring's last number.
};

inline void write_record(std::string& out, const TraceRecord& record, const TraceUnits& units) {
  const bool captured = (record.flags & TraceRecord::kCaptured) != 0;
  fmt::format_to(std::back_inserter(out), R"([{},{},"{}",{},{},"{}","{}",{},{},{},{},{},{},[)",
                 record.sequence, units.clock.ns(record.ticks, units.end), to_string(record.call),
                 captured ? record.number : TraceRing::full_number(units.numbered, record),
                 record.signature, to_string(record.dtype), to_string(record.path), record.flags,
                 record.inbox, record.steps, record.where, record.variant, record.ndim);
  const int shown =
      record.call == TraceCall::launch ? 3 : std::min<int>(record.ndim, TraceRecord::kExtents);
  for (int d = 0; d < shown; ++d) {
    fmt::format_to(std::back_inserter(out), "{}{}", d == 0 ? "" : ",",
                   record.extents[static_cast<std::size_t>(d)]);
  }
  out += "]]";
}

inline void write_records(std::string& out,
                          const std::array<TraceRecord, TraceRing::kRecords>& records,
                          std::uint64_t last, std::uint64_t most, const TraceUnits& units) {
  JsonArray array(out);
  const std::uint64_t count = std::min(last, most);
  for (std::uint64_t sequence = last - count + 1; sequence <= last; ++sequence) {
    if (const auto record = TraceRing::at(records, sequence)) {
      write_record(array.next(), *record, units);
    }
  }
}

/// What one ring says. `own` is the recorder of the ring, or null for another rank's.
inline void write_ring(std::string& out, const TraceRing& ring, const FlightRecorder* own,
                       const TraceClock& clock, const TraceClock::Moment& end) {
  constexpr std::uint64_t kFew = 64;
  const std::uint64_t calls = TraceRing::load(ring.calls);  // before what it may not overtake
  const TraceUnits units{clock, end, TraceRing::load(ring.numbered)};
  const std::uint64_t looked = TraceRing::load(ring.looked);
  const bool live = looked == TraceRing::kLive;
  const bool gone = own == nullptr && writer_ended(ring);
  const std::uint64_t most = own != nullptr || gone ? TraceRing::kRecords : kFew;
  fmt::format_to(std::back_inserter(out),
                 R"({{"rank":{},"own":{},"process":{},"gone":{},"calls":{},"listed":{},)"
                 R"("captures":{},"open":{},"ended":{},"live":{},"looked":{},"progress":)",
                 ring.rank, own != nullptr, ring.process, gone, calls, TraceRing::load(ring.listed),
                 TraceRing::load(ring.captures), TraceRing::load(ring.open),
                 TraceRing::load(ring.ended) != 0, live,
                 live || looked == 0 ? 0 : clock.ns(looked, end));
  {
    JsonArray array(out);
    for (std::size_t inbox = 0; inbox < TraceRing::kInboxes; ++inbox) {
      const TraceProgress progress = load_words(ring.progress[inbox]);
      if (progress.issued != 0 || progress.entered != 0) {
        array.next() += fmt::format("[{},{},{},{},{}]", inbox, progress.issued, progress.entered,
                                    progress.left, live ? progress.left : progress.perhaps_left);
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
  write_records(out, ring.records, calls, most, units);
  out += R"(,"captured":)";
  if (own == nullptr) {
    write_records(out, ring.captured, TraceRing::load(ring.listed), most, units);
  } else {
    JsonArray array(out);
    for (const TraceRecord& record : own->listed()) {
      write_record(array.next(), record, units);
    }
  }
  out += '}';
}

/// How the group failed, or null.
inline void write_failure(std::string& out, const FlightRecorder& recorder) {
  const auto failure = recorder.failure();
  if (!failure) {
    out += "null";
    return;
  }
  fmt::format_to(std::back_inserter(out), R"({{"why":{},"late":{},"missing":[{}],"over":{}}})",
                 json_text(failure->why), failure->late, joined(failure->missing, ","),
                 recorder.ended_calls() > failure->ended);
}

/// A group with the rings that this rank can read.
inline void write_group(std::string& out, FlightRecorder& recorder, const TraceClock& clock,
                        const TraceClock::Moment& end) {
  recorder.look_at_device();
  out += fmt::format(R"({{"name":{},"rank":{},"ranks":[{}],"failure":)",
                     json_text(recorder.group()), recorder.rank(), joined(recorder.ranks(), ","));
  write_failure(out, recorder);
  out += R"(,"rings":)";
  {
    JsonArray rings(out);
    for (int r = 0; r < static_cast<int>(recorder.ranks().size()); ++r) {
      if (const TraceRing* const ring = recorder.ring(r)) {
        write_ring(rings.next(), *ring, r == recorder.rank() ? &recorder : nullptr, clock, end);
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
