// SPDX-License-Identifier: Apache-2.0
#include "report.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

namespace cohort::info {
namespace {

using nlohmann::json;

constexpr std::size_t kNameWidth = 28;

json to_json_value(const Section& section) {
  json facts = json::array();
  for (const auto& fact : section.facts) {
    json entry{{"name", fact.name}, {"value", fact.value}};
    if (!fact.problem.empty()) {
      entry["problem"] = fact.problem;
    }
    facts.push_back(std::move(entry));
  }
  return {{"title", section.title}, {"ranks", section.ranks}, {"facts", std::move(facts)}};
}

void append(std::string& page, const Section& section, int ranks) {
  const bool everywhere = section.ranks.size() == static_cast<std::size_t>(ranks);
  page += everywhere ? fmt::format("\n{}\n", section.title)
                     : fmt::format("\n{} (rank {})\n", section.title, ranges(section.ranks));
  for (const auto& fact : section.facts) {
    page += fmt::format("  {:<{}} {}\n", fact.name, kNameWidth, fact.value);
    if (!fact.problem.empty()) {
      page += fmt::format("  {:<{}} ! {}\n", "", kNameWidth, fact.problem);
    }
  }
}

}  // namespace

bool is_well(const Report& report) {
  return std::none_of(report.groups.begin(), report.groups.end(),
                      [](const Group& group) { return group.denied; }) &&
         std::all_of(report.checks.begin(), report.checks.end(),
                     [](const Check& check) { return check.error.empty(); });
}

std::string to_text(const Report& report) {
  std::string page = fmt::format("Cohort {}, {} backend, {} rank{}\n", report.version,
                                 report.backend, report.ranks, report.ranks == 1 ? "" : "s");
  for (const auto& section : report.sections) {
    append(page, section, report.ranks);
  }
  page += "\nGroups\n";
  for (const auto& group : report.groups) {
    page += fmt::format("  {:<8} ranks {:<10} windows {}; peer mapping {}\n", group.name,
                        ranges(group.ranks), group.windows, group.peer_mapping);
    if (group.denied) {
      page += fmt::format("  {:<{}} ! asked for, and not to be had here\n", "", kNameWidth);
    }
  }
  if (!report.checks.empty()) {
    page += "\nSelf-test (median of the slowest rank)\n";
  }
  for (const auto& check : report.checks) {
    page += check.error.empty()
                ? fmt::format("  {:<{}} {:>9.1f} us\n", check.name, kNameWidth, check.median_us)
                : fmt::format("  {:<{}} ! {}\n", check.name, kNameWidth, check.error);
  }
  page += is_well(report) ? "\nAll that was asked for works.\n"
                          : "\nLines with ! are off or went wrong.\n";
  return page;
}

std::string to_json(const Report& report) {
  json sections = json::array();
  for (const auto& section : report.sections) {
    sections.push_back(to_json_value(section));
  }
  json groups = json::array();
  for (const auto& group : report.groups) {
    groups.push_back({{"name", group.name},
                      {"ranks", group.ranks},
                      {"windows", group.windows},
                      {"peer_mapping", group.peer_mapping},
                      {"denied", group.denied}});
  }
  json checks = json::array();
  for (const auto& check : report.checks) {
    checks.push_back(
        {{"name", check.name}, {"median_us", check.median_us}, {"error", check.error}});
  }
  const json all{{"version", report.version}, {"backend", report.backend}, {"ranks", report.ranks},
                 {"well", is_well(report)},   {"sections", sections},      {"groups", groups},
                 {"self_test", checks}};
  return all.dump(2);
}

std::vector<Section> merged(const std::vector<std::vector<Section>>& by_rank) {
  std::vector<Section> all;
  for (std::size_t rank = 0; rank < by_rank.size(); ++rank) {
    for (const auto& section : by_rank[rank]) {
      const auto same = std::find_if(all.begin(), all.end(), [&](const Section& known) {
        return known.title == section.title && known.facts == section.facts;
      });
      if (same != all.end()) {
        same->ranks.push_back(static_cast<int>(rank));
        continue;
      }
      // Behind the last of the same title, so that what differs stands side by side.
      const auto last = std::find_if(all.rbegin(), all.rend(), [&](const Section& known) {
        return known.title == section.title;
      });
      all.insert(last == all.rend() ? all.end() : last.base(),
                 {section.title, {static_cast<int>(rank)}, section.facts});
    }
  }
  return all;
}

std::string pack(const std::vector<Section>& sections) {
  json all = json::array();
  for (const auto& section : sections) {
    all.push_back(to_json_value(section));
  }
  return all.dump();
}

std::vector<Section> unpack(const std::string& bytes) {
  std::vector<Section> sections;
  for (const auto& entry : json::parse(bytes)) {
    Section section{.title = entry.at("title"), .ranks = entry.at("ranks"), .facts = {}};
    for (const auto& fact : entry.at("facts")) {
      section.facts.push_back({fact.at("name"), fact.at("value"), fact.value("problem", "")});
    }
    sections.push_back(std::move(section));
  }
  return sections;
}

std::string ranges(const std::vector<int>& ranks) {
  std::string text;
  for (std::size_t i = 0; i < ranks.size();) {
    std::size_t end = i + 1;
    while (end < ranks.size() && ranks[end] == ranks[end - 1] + 1) {
      ++end;
    }
    text += fmt::format("{}{}", text.empty() ? "" : ",", ranks[i]);
    if (end - i > 1) {
      text += fmt::format("-{}", ranks[end - 1]);
    }
    i = end;
  }
  return text;
}

}  // namespace cohort::info
