// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdlib>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

/// \file
/// What the ranks of a round have told, as `Steps` writes it.

namespace cohort::chaos {

using Clock = std::chrono::steady_clock;

struct Step {
  std::string phase, name, outcome, text;
  int index = 0;
  double took_ms = 0;
  double queued_ms = 0;  ///< Of that, how long its thread could have run and had no processor.
  std::set<int> named;
};

/// A rank as its supervisor sees it.
struct Child {
  pid_t pid = -1;
  int from = -1;  ///< What the rank reports.
  int to = -1;    ///< What it is told.
  std::string unread;
  std::vector<Step> steps;
  bool over = false;   ///< Its phases are over, well or not.
  bool ended = false;  ///< It reported its end.
  bool gone = false;   ///< The process has left.
  int status = 0;
  Clock::time_point stopped = Clock::time_point::max();
};

inline std::vector<std::string> fields_of(const std::string& line) {
  std::vector<std::string> fields;
  std::stringstream stream(line);
  for (std::string field; std::getline(stream, field, '\t');) {
    fields.push_back(field);
  }
  return fields;
}

inline void take_line(Child& child, const std::string& line) {
  const auto fields = fields_of(line);
  if (fields.empty()) {
    return;
  }
  if (fields[0] == "over") {
    child.over = true;
  } else if (fields[0] == "end") {
    child.ended = true;
  } else if (fields.size() >= 7) {
    Step step{.phase = fields[1],
              .name = fields[3],
              .outcome = fields[6],
              .text = fields.size() > 8 ? fields[8] : "",
              .index = std::atoi(fields[2].c_str()),
              .took_ms = std::atof(fields[4].c_str()),
              .queued_ms = std::atof(fields[5].c_str()),
              .named = {}};
    if (fields.size() > 7) {
      std::stringstream stream(fields[7]);
      for (std::string rank; std::getline(stream, rank, ',');) {
        step.named.insert(std::atoi(rank.c_str()));
      }
    }
    child.steps.push_back(std::move(step));
  }
}

}  // namespace cohort::chaos
