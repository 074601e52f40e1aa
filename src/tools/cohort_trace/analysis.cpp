// SPDX-License-Identifier: Apache-2.0
#include "analysis.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <tuple>
#include <utility>

#include "findings.hpp"

namespace cohort::trace {
namespace {

using nlohmann::json;

}  // namespace

std::vector<Finding> findings(const State& state) {
  std::vector<Finding> all;
  std::set<int> waits;
  for (const Group& group : state.groups) {
    waits.merge(waiting_in(group));
  }
  for (const Group& group : state.groups) {
    const bool over = std::all_of(group.rings.begin(), group.rings.end(),
                                  [](const auto& ring) { return ring.second.ended; });
    if (group.ranks.size() < 2 || over) {
      continue;
    }
    auto found = difference(group);
    if (!found) {
      found = behind(state, group, waits);
    }
    if (!found) {
      found = behind_on_device(state, group);
    }
    if (found) {
      all.push_back(std::move(*found));
    }
  }
  // A rank for which others wait, and which waits itself, is no cause.
  const auto rank = [&waits](const Finding& finding) {
    const bool is_cause = std::any_of(finding.ranks.begin(), finding.ranks.end(),
                                      [&waits](int one) { return waits.count(one) == 0; });
    return std::tuple(static_cast<int>(finding.kind), !is_cause, finding.since);
  };
  std::stable_sort(all.begin(), all.end(),
                   [&](const Finding& a, const Finding& b) { return rank(a) < rank(b); });
  return all;
}

std::string verdict(const State& state) {
  const auto found = findings(state);
  if (found.empty()) {
    return "no rank is behind another, and no calls differ, as far as is known";
  }
  const Finding& first = found.front();
  // Where every rank that is missed waits itself, they wait for one another.
  if (first.kind == Finding::Kind::behind) {
    for (const Finding& other : found) {
      const auto meets = [](const std::vector<int>& a, const std::vector<int>& b) {
        return std::any_of(a.begin(), a.end(), [&b](int rank) {
          return std::find(b.begin(), b.end(), rank) != b.end();
        });
      };
      if (other.kind == Finding::Kind::behind && other.group != first.group &&
          meets(other.ranks, first.waiting) && meets(first.ranks, other.waiting)) {
        return fmt::format("ranks wait for one another, in {} and {}: {}; {}", first.group,
                           other.group, first.text, other.text);
      }
    }
  }
  return first.text;
}

std::string to_json(const State& state) {
  static constexpr const char* kKinds[] = {"differs", "behind", "behind on the device"};
  json j{{"state", state.id}, {"verdict", verdict(state)}, {"findings", json::array()}};
  for (const Finding& finding : findings(state)) {
    j["findings"].push_back({{"kind", kKinds[static_cast<int>(finding.kind)]},
                             {"group", finding.group},
                             {"ranks", finding.ranks},
                             {"waiting", finding.waiting},
                             {"since_ns", finding.since},
                             {"text", finding.text}});
  }
  for (const auto& [rank, reason] : state.reasons) {
    j["reasons"][std::to_string(rank)] = reason;
  }
  return j.dump(2);
}

}  // namespace cohort::trace
