// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

/// \file
/// What the ranks' traces say together. Needs neither ranks nor devices.

namespace cohort::trace {

/// One call, as a file has it.
struct Record {
  std::uint64_t sequence = 0;
  std::int64_t ns = 0;  ///< Since 1970.
  std::string call;
  std::uint32_t number =
      0;  ///< Of calls that all ranks make; of captured ones the place in the list.
  std::uint32_t signature = 0;
  std::string dtype;
  std::string path;
  bool captured = false;
  int inbox = 0;
  std::uint32_t steps = 0;
  std::uint64_t where = 0;  ///< The stream; of captured calls and launches the graph's number.
  int variant = 0;
  int ndim = 0;
  std::vector<std::uint32_t> extents;
};

/// How far the work of an inbox has come.
struct Progress {
  std::uint64_t issued = 0, entered = 0, left = 0;
};

/// Calls that took one path.
struct Counters {
  std::string path;
  std::uint64_t calls = 0, bytes = 0, waits = 0;
};

/// What one rank did in one group.
struct Ring {
  int rank = 0;              ///< In the group.
  bool own = false;          ///< Written by the rank itself.
  bool gone = false;         ///< Its process had ended when the state did.
  std::int64_t gone_at = 0;  ///< The first file that says so; 0 for none.
  bool ended = false;        ///< The group was closed.
  std::uint64_t open = 0;
  std::int64_t written = 0;
  std::map<int, Progress> progress;
  std::vector<Counters> counters;
  std::map<int, std::string> notes;
  std::vector<Record> records;
  std::vector<Record> captured;
};

struct Group {
  std::string name;
  std::vector<int> ranks;     ///< World ranks.
  std::map<int, Ring> rings;  ///< By rank in the group: those that are known.
};

/// The files of one state, put together.
struct State {
  std::uint64_t id = 0;
  std::int64_t end = 0;  ///< What came later is left out: ranks that failed go on elsewhere.
  std::map<int, std::string> reasons;  ///< Why each rank wrote, by world rank.
  std::vector<Group> groups;
};

/// What a group's calls come to.
struct Finding {
  enum class Kind { differs, behind, behind_on_device };

  Kind kind = Kind::behind;
  std::string group;
  std::vector<int> ranks = {};    ///< World ranks that differ or are behind.
  std::vector<int> waiting = {};  ///< World ranks that came.
  std::int64_t since = 0;         ///< When the first of those came.
  std::string text = {};          ///< One sentence, without a full stop.
};

/// Reads files' texts, each with its name for errors, and puts those of one state together, the
/// newest state last. Throws `std::runtime_error` that names the file.
[[nodiscard]] std::vector<State> read(
    const std::vector<std::pair<std::string, std::string>>& files);

/// What is found in each group, the likeliest cause first.
[[nodiscard]] std::vector<Finding> findings(const State& state);

/// The one sentence: who is behind or differs, in which call.
[[nodiscard]] std::string verdict(const State& state);

/// The verdict, the other findings, and a picture of the last calls of each rank over time.
[[nodiscard]] std::string to_text(const State& state, int width);
/// The same picture as SVG.
[[nodiscard]] std::string to_svg(const State& state);
/// Verdict and findings for programs.
[[nodiscard]] std::string to_json(const State& state);

/// A call with its arguments, such as "all_reduce #57 of f32(16,33)".
[[nodiscard]] std::string describe(const Ring& ring, const Record& record);
/// Of a call, for the picture.
[[nodiscard]] char letter(const std::string& call);

}  // namespace cohort::trace
