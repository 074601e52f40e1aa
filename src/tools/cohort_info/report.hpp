// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

/// \file
/// What `cohort_info` finds out, as plain data, and the two forms in which it is shown.

namespace cohort::info {

/// A fact with its value in words; `problem` says why it stands in the way, or is empty.
struct Fact {
  std::string name;
  std::string value;
  std::string problem = {};

  friend bool operator==(const Fact&, const Fact&) = default;
};

/// Facts under a heading, as found by the ranks named. Ranks that found the same stand together.
struct Section {
  std::string title;
  std::vector<int> ranks;
  std::vector<Fact> facts;
};

/// Whether a group got what was asked for.
struct Group {
  std::string name;
  std::vector<int> ranks;
  std::string windows;       ///< "on" or "off (...)"
  std::string peer_mapping;  ///< the same
  bool denied = false;       ///< The machine, not the user, denies one of the two.
};

/// One call of the self-test; times are of the slowest rank.
struct Check {
  std::string name;
  double median_us = 0;
  std::string error = {};  ///< What went wrong, on the first rank where something did.
};

struct Report {
  std::string version;
  std::string backend;
  int ranks = 1;
  std::vector<Section> sections;
  std::vector<Group> groups;
  std::vector<Check> checks;
};

/// Whether nothing that was asked for is off and every check passed.
[[nodiscard]] bool is_well(const Report& report);

/// One page of text.
[[nodiscard]] std::string to_text(const Report& report);

/// The same as JSON, indented.
[[nodiscard]] std::string to_json(const Report& report);

/// Sections with equal facts of different ranks become one; the first rank's come first.
[[nodiscard]] std::vector<Section> merged(const std::vector<std::vector<Section>>& by_rank);

/// A rank's sections as bytes for the other ranks, and back. Throws `nlohmann::json::exception` for
/// bytes that are none.
[[nodiscard]] std::string pack(const std::vector<Section>& sections);
[[nodiscard]] std::vector<Section> unpack(const std::string& bytes);

/// "0-3,6" for ascending ranks.
[[nodiscard]] std::string ranges(const std::vector<int>& ranks);

}  // namespace cohort::info
