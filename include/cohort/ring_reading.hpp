// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "cohort/fixed_text.hpp"
#include "cohort/flight_ring.hpp"
#include "cohort/machine.hpp"

/// \file
/// What the rings of a group tell in words. Any process may read them, while they are written.

namespace cohort {

/// What a record is, in a few words: "all_gather #12" or "agreement #3, growth of arena tp[0]".
[[nodiscard]] inline std::string describe_record(const TraceRing& ring, const TraceRecord& record) {
  const std::uint64_t number = TraceRing::full_number(TraceRing::load(ring.numbered), record);
  std::string text(to_string(record.call));
  if (number != 0) {
    text += fmt::format(" #{}", number);
  }
  if (record.call == TraceCall::agreement) {
    const TraceNote note = detail::load_words(
        ring.notes[(static_cast<std::size_t>(record.variant) - 1) % TraceRing::kNotes]);
    if (note.sequence == static_cast<std::uint64_t>(record.variant)) {
      text += fmt::format(", {}", detail::text_of(note.text));
    }
  }
  return text;
}

/// The call that a rank's host is in, as ranks compare it that wait for each other.
struct OpenCall {
  std::uint64_t number = 0;     ///< Among those that all ranks make; 0 for one of a pair.
  std::uint32_t signature = 0;  ///< Of what has to be equal on all ranks.
  std::string text = {};        ///< `describe_record`.
};

/// Nothing where it is in none. On the host a graph runs within its launch.
[[nodiscard]] inline std::optional<OpenCall> open_call_in(const TraceRing& ring) {
  const std::uint64_t open = TraceRing::load(ring.open);
  const std::uint64_t sequence = open != 0 ? open : TraceRing::load(ring.calls);
  const auto record = sequence != 0 ? TraceRing::at(ring.records, sequence) : std::nullopt;
  if (!record || (open == 0 && record->call != TraceCall::launch)) {
    return std::nullopt;
  }
  return OpenCall{TraceRing::full_number(TraceRing::load(ring.numbered), *record),
                  record->signature, describe_record(ring, *record)};
}

/// Whether the process that writes a ring is known to have ended.
[[nodiscard]] inline bool writer_ended(const TraceRing& ring) {
  return ring.process_namespace == pid_namespace() &&
         process_ended(ring.process, ring.process_start);
}

/// The last record of a call that all ranks make, where the ring has one.
[[nodiscard]] inline std::optional<TraceRecord> last_numbered(const TraceRing& ring) noexcept {
  const std::uint64_t last = TraceRing::load(ring.calls);
  for (std::uint64_t back = 0; back < std::min<std::uint64_t>(last, TraceRing::kRecords); ++back) {
    const auto record = TraceRing::at(ring.records, last - back);
    if (record && (record->flags & TraceRecord::kNumbered) != 0) {
      return record;
    }
  }
  return std::nullopt;
}

/// Why `rank`, which writes `theirs`, is behind the writer of `mine`: "rank 1 has not come to
/// all_reduce #57; its last call is all_gather #56". "" where it is not.
[[nodiscard]] inline std::string behind_in(const TraceRing& mine, int rank,
                                           const TraceRing& theirs) {
  const auto number = [](const TraceRing& ring, const std::optional<TraceRecord>& record) {
    return record ? TraceRing::full_number(TraceRing::load(ring.numbered), *record) : 0;
  };
  const auto here = last_numbered(mine);
  const auto there = here ? last_numbered(theirs) : std::nullopt;
  if (!here || number(theirs, there) >= number(mine, here)) {
    return "";
  }
  return fmt::format("rank {} has not come to {}; its last call is {}{}", rank,
                     describe_record(mine, *here), there ? describe_record(theirs, *there) : "none",
                     writer_ended(theirs) ? ", and its process is gone" : "");
}

}  // namespace cohort
