// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <compare>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "analysis.hpp"

/// \file
/// How far a rank came in a group, by its device where that is known, and by its host elsewhere.

namespace cohort::trace {

/// How far a rank came in the calls that all ranks of a group make.
struct Place {
  static constexpr std::uint64_t kAll = std::numeric_limits<std::uint64_t>::max();

  std::uint64_t number = 0;   ///< The last call that it began.
  std::uint64_t part = kAll;  ///< `kAll` where it ended; the call of a graph's list, from 1 on.

  friend auto operator<=>(const Place&, const Place&) = default;
};

/// The first work that a device has not ended.
struct Pending {
  Record record;                     ///< Eager call or launch.
  std::optional<Record> inner = {};  ///< The call in the launched graph, where it is known.
  std::uint64_t position = 0;        ///< Of that in the graph's list, from 1 on.
  std::uint64_t done = 0;            ///< Steps of the launch that ended.
  bool begun = false;                ///< The call has begun.
};

/// What a ring says of its rank.
struct Stand {
  std::uint64_t host = 0;               ///< The last call that the host began.
  Place place = {};                     ///< Of the device where it is known, otherwise of the host.
  bool by_device = false;               ///< Which of both.
  bool steps_differ = false;            ///< Steps are of launches of which nothing is known.
  std::optional<Pending> pending = {};  ///< Where the device is, or would be next.
  /// The last call that the device has begun, where nobody knows whether it has ended: `place` and
  /// `pending` take it that it has.
  std::optional<Pending> unsure = {};
  Place unsure_place = {};  ///< And this that it has not.
  bool waits = false;       ///< It is in a call, or its device has not ended all.

  /// Whether it may be there, although `place` is beyond.
  [[nodiscard]] bool may_be_at(const Place& there) const {
    return unsure && unsure_place <= there && there < place && place.number == there.number;
  }
};

/// How far a rank of a group came.
[[nodiscard]] Stand stand_of(const Group& group, const Ring& ring);

/// The last record with a number, or null.
[[nodiscard]] const Record* last_numbered(const Ring& ring);
/// The record with a number, or null.
[[nodiscard]] const Record* numbered(const Ring& ring, std::uint64_t number);
/// The record in which the host is, or null.
[[nodiscard]] const Record* open_record(const Ring& ring);
/// The calls of a launched graph in order, from whichever ring has them all, or what this one has.
[[nodiscard]] std::vector<const Record*> list_of(const Group& group, const Ring& ring,
                                                 const Record& launch);
/// "call 2 of 5 of graph 1, all_reduce of f32(16)", or the call itself where it is in no graph.
[[nodiscard]] std::string describe(const Ring& ring, const Pending& pending);

}  // namespace cohort::trace
