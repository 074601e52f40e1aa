// SPDX-License-Identifier: Apache-2.0
#include "analysis.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "findings.hpp"

namespace cohort::trace {

std::vector<int> unknown_ranks(const State& state) {
  std::set<int> known;
  std::set<int> all;
  for (const auto& [rank, reason] : state.reasons) {
    known.insert(rank);
  }
  for (const Group& group : state.groups) {
    all.insert(group.ranks.begin(), group.ranks.end());
    for (const auto& [rank, ring] : group.rings) {
      known.insert(world_rank(group, rank));
    }
  }
  for (int rank = 0; rank < static_cast<int>(state.hosts.size()); ++rank) {
    all.insert(rank);
  }
  std::vector<int> unknown;
  std::set_difference(all.begin(), all.end(), known.begin(), known.end(),
                      std::back_inserter(unknown));
  return unknown;
}

std::vector<Finding> findings(const State& state) {
  std::vector<Finding> all;
  std::vector<Judged> groups;
  std::set<int> waits;
  for (const Group& group : state.groups) {
    const bool over = std::all_of(group.rings.begin(), group.rings.end(),
                                  [](const auto& ring) { return ring.second.ended; });
    if (group.ranks.size() < 2 || over) {
      continue;
    }
    groups.push_back(judge(state, group));
    waits.merge(waiting_in(groups.back()));
  }
  for (const Judged& judged : groups) {
    auto found = difference(*judged.group);
    if (found && found->kind == Finding::Kind::differed) {
      all.push_back(*std::exchange(found, std::nullopt));
    }
    const auto otherwise = [&found](const auto& look) {
      if (!found) {
        found = look();
      }
    };
    otherwise([&] { return behind(state, judged, waits); });
    otherwise([&] { return fewer_steps(*judged.group); });
    otherwise([&] { return unknown(state, judged); });
    otherwise([&] { return together(state, judged); });
    if (found) {
      all.push_back(std::move(*found));
    }
    for (const PairWait& wait : judged.pairs) {
      all.push_back(unmatched(state, judged, wait));
    }
  }
  // A rank for which others wait, and which waits itself, is no cause.
  const auto rank = [&waits](const Finding& finding) {
    const bool is_cause = std::any_of(finding.ranks.begin(), finding.ranks.end(),
                                      [&waits](int one) { return waits.count(one) == 0; });
    const bool differs = finding.kind == Finding::Kind::differs;
    const bool no_cause = finding.kind == Finding::Kind::differed;
    const int last = no_cause ? 2 : finding.kind == Finding::Kind::begun ? 1 : 0;
    return std::tuple(!differs, last, !is_cause, static_cast<int>(finding.kind), finding.since);
  };
  std::stable_sort(all.begin(), all.end(),
                   [&](const Finding& a, const Finding& b) { return rank(a) < rank(b); });
  return all;
}

std::string verdict(const State& state) {
  const auto found = findings(state);
  const bool begun = !found.empty() && found.front().kind == Finding::Kind::begun;
  if (found.empty() || begun || found.front().kind == Finding::Kind::differed) {
    const auto unknown = unknown_ranks(state);
    const std::string but = found.empty() ? "" : (begun ? "; " : ", now; ") + found.front().text;
    return "no rank is behind another, and no calls differ, as far as is known" + but +
           (unknown.empty() ? ""
                            : fmt::format("; nothing is known of {}, of which no trace was found",
                                          listed(unknown)));
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
      if (other.kind == Finding::Kind::behind && &other != &first &&
          meets(other.ranks, first.waiting) && meets(first.ranks, other.waiting)) {
        const std::string where = other.group == first.group ? "" : " and " + other.group;
        return fmt::format("ranks wait for one another, in {}{}: {}; {}", first.group, where,
                           first.text, other.text);
      }
    }
  }
  return first.text;
}

std::string to_json(const State& state) {
  static constexpr const char* kKinds[] = {
      "differs",         "behind",         "behind on the device", "unknown",
      "all in one call", "all have begun", "differed once"};
  nlohmann::json j{
      {"run", state.run}, {"verdict", verdict(state)}, {"findings", nlohmann::json::array()}};
  for (const Finding& finding : findings(state)) {
    j["findings"].push_back({{"kind", kKinds[static_cast<int>(finding.kind)]},
                             {"group", finding.group},
                             {"ranks", finding.ranks},
                             {"waiting", finding.waiting},
                             {"since_ns", finding.since},
                             {"text", finding.text}});
  }
  j["unknown"] = unknown_ranks(state);
  for (const auto& [rank, reason] : state.reasons) {
    j["reasons"][std::to_string(rank)] = reason;
  }
  return j.dump(2);
}

}  // namespace cohort::trace
