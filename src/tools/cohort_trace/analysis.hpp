// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

/// \file
/// What the ranks' traces say together. Needs neither ranks nor devices.

namespace cohort::trace {

/// One call, as a file has it.
struct Record {
  std::uint64_t sequence = 0;
  std::int64_t ns = 0;  ///< Since 1970, by the clock of the machine.
  std::string call;
  /// Of calls that all ranks make, the same on all of them, and of captured ones their place among
  /// such calls of the graph; 0 for others.
  std::uint64_t number = 0;
  std::uint32_t signature = 0;
  std::string dtype;
  std::string path;
  bool captured = false;
  bool failed = false;  ///< It was left by an exception.
  int inbox = 0;
  std::uint32_t steps = 0;
  std::uint64_t where = 0;  ///< The stream; of captured calls and launches the graph's number.
  int variant = 0;
  int ndim = 0;
  /// Of launches: the graph's calls, its steps, and the inboxes that count these.
  std::vector<std::uint32_t> extents;
};

/// How far the work of an inbox has come.
struct Progress {
  std::uint64_t issued = 0, entered = 0, left = 0;
  std::uint64_t perhaps_left = 0;  ///< Steps that may have ended: `left` or more.
};

/// Calls that took one path.
struct Counters {
  std::string path;
  std::uint64_t calls = 0, bytes = 0, waits = 0;
};

/// What one rank did in one group, as one file has it.
struct Ring {
  int rank = 0;              ///< In the group.
  bool own = false;          ///< Written by the rank itself.
  bool late = false;         ///< The file was written because ranks did not come in time.
  bool gone = false;         ///< Its process had ended.
  bool ended = false;        ///< The group was closed.
  bool device_known = true;  ///< `progress` was true when the file was written.
  std::uint64_t open = 0;    ///< The record in which the host is; 0 for none.
  std::int64_t written = 0;
  std::string machine;     ///< Whose clock its times are of.
  int writer = 0;          ///< World rank that wrote the file.
  std::int64_t left = -1;  ///< How long after the first file the process had ended; -1 for never.
  std::map<int, Progress> progress;
  std::vector<Counters> counters;
  std::map<int, std::string> notes;
  std::vector<Record> records;
  std::vector<Record> afterwards;  ///< Those that came too late to matter.
  std::vector<Record> captured;
};

/// How a rank's call in a group failed.
struct Failure {
  std::string why;
  bool late = false;         ///< Ranks did not come in time.
  bool over = false;         ///< Calls of the group ended afterwards.
  std::vector<int> missing;  ///< Those ranks, in the group.
};

struct Group {
  std::string name;
  std::vector<int> ranks;           ///< World ranks.
  std::map<int, Ring> rings;        ///< By rank in the group: those that are known.
  std::map<int, Failure> failures;  ///< By rank in the group.
  std::set<int> forsaken;           ///< Ranks in the group whose rings are of nobody's knowledge.
};

/// The files of one state, put together.
struct State {
  std::string run;           ///< The number that they share.
  bool agreed = true;        ///< Or the ranks had not agreed on it when they wrote.
  std::int64_t written = 0;  ///< The newest file.
  /// By machine: what came later there is left out, because ranks that failed go on elsewhere.
  /// Clocks of different machines are not compared.
  std::map<std::string, std::int64_t> ends;
  std::map<int, std::string> reasons;  ///< Why each rank wrote, by world rank.
  std::vector<int> hosts;              ///< By world rank: equal numbers are one machine.
  std::vector<Group> groups;
};

/// What a group's calls come to.
struct Finding {
  enum class Kind { differs, behind, behind_on_device, unknown, together, begun, differed };

  Kind kind = Kind::behind;
  std::string group;
  std::vector<int> ranks = {};    ///< World ranks that differ, are behind or unknown.
  std::vector<int> waiting = {};  ///< World ranks that came.
  std::int64_t since = 0;         ///< When the first of those came, by its clock; 0 where unknown.
  std::string text = {};          ///< One sentence, without a full stop.
};

/// What files hold.
struct Reading {
  std::vector<State> states;       ///< The newest last.
  std::vector<std::string> notes;  ///< About files that were left out.
};

/// Reads files' texts, each with its name for notes, and puts those of one state together.
[[nodiscard]] Reading read(const std::vector<std::pair<std::string, std::string>>& files);

/// What is found in each group, the likeliest cause first.
[[nodiscard]] std::vector<Finding> findings(const State& state);

/// World ranks of which nothing is known.
[[nodiscard]] std::vector<int> unknown_ranks(const State& state);

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
/// "22:13:20.000 UTC".
[[nodiscard]] std::string clock_time(std::int64_t ns);
/// "2.0 s".
[[nodiscard]] std::string duration(std::int64_t ns);

}  // namespace cohort::trace
