// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "analysis.hpp"
#include "support/catch.hpp"

/// \file
/// Traces as ranks write them, put together by hand.

namespace cohort::trace::test {

using nlohmann::json;

inline constexpr std::int64_t kSecond = 1'000'000'000;
inline constexpr std::int64_t kStart = 1'700'000'000 * kSecond;  // 22:13:20 UTC

/// Record of an all-reduce that all ranks make, in second `at`.
inline json reduce(std::uint64_t number, std::int64_t at, unsigned signature = 1, int rows = 8) {
  return {number,
          kStart + at * kSecond,
          "all_reduce",
          number,
          signature,
          "bf16",
          "own",
          2,
          0,
          1,
          0,
          0,
          2,
          {rows, 4}};
}
/// So many of them, one each second.
inline json reduces(std::uint64_t count, std::int64_t first = 0) {
  json records = json::array();
  for (std::uint64_t i = 1; i <= count; ++i) {
    records.push_back(reduce(i, first + static_cast<std::int64_t>(i) - 1));
  }
  return records;
}
/// Call `sequence` of all lists, of that of a graph; `number` among those that all ranks make.
inline json listed(int sequence, const char* call, unsigned signature = 1, int graph = 1,
                   int number = -1, int inbox = 0) {
  return {sequence,  kStart, call,  number < 0 ? sequence : number,
          signature, "f32",  "own", 3,
          inbox,     1,      graph, 0,
          1,         {16}};
}
inline json launch(int number, std::int64_t at, unsigned signature = 7, int graph = 1,
                   int calls = 2, int steps = 2, int inboxes = 1) {
  return {number,    kStart + at * kSecond,
          "launch",  number,
          signature, "u8",
          "unknown", 2,
          0,         0,
          graph,     0,
          0,         {calls, steps, inboxes}};
}
/// Inbox 0.
inline json progress(std::uint64_t issued, std::uint64_t entered, std::uint64_t left) {
  return json::array({json::array({0, issued, entered, left, left})});
}
/// The same where nobody knows whether the last step that began has ended.
inline json begun(std::uint64_t issued, std::uint64_t entered) {
  return json::array({json::array({0, issued, entered, entered - 1, entered})});
}

inline json ring(int rank, bool own, json records, std::uint64_t open = 0) {
  return {{"rank", rank},
          {"own", own},
          {"gone", false},
          {"ended", false},
          {"open", open},
          {"live", false},
          {"looked", own ? kStart : 0},
          {"progress", json::array()},
          {"counters", json::array()},
          {"notes", json::array({json::array({1, "growth of arena tp[0]"})})},
          {"records", std::move(records)},
          {"captured", json::array()}};
}

/// What is the same in all files of a test, unless it says otherwise.
struct Common {
  std::string run = "00000000000000aa";
  std::string machine = "here";
  std::vector<int> ranks = {0, 1, 2};
  std::vector<int> hosts = {0, 0, 0};
  json failure = nullptr;  ///< Of every group.
};

/// What a rank wrote in second `at`, of groups with these rings.
inline std::string file(int rank, std::int64_t at,
                        const std::vector<std::pair<std::string, std::vector<json>>>& groups,
                        bool late = true, const Common& common = {}) {
  json j{{"cohort_trace", 3},
         {"run", common.run},
         {"rank", rank},
         {"ranks", common.ranks.size()},
         {"hosts", common.hosts},
         {"machine", common.machine},
         {"process", 100 + rank},
         {"late", late},
         {"written", kStart + at * kSecond},
         {"reason", "a test"},
         {"groups", {}}};
  for (const auto& [name, rings] : groups) {
    j["groups"].push_back({{"name", name},
                           {"rank", rank},
                           {"ranks", common.ranks},
                           {"failure", common.failure},
                           {"rings", json(rings)}});
  }
  return j.dump();
}
inline json missing(const std::vector<int>& ranks, bool over = false) {
  return {{"why", "late"}, {"late", true}, {"missing", ranks}, {"over", over}};
}

inline Reading reading(const std::vector<std::string>& texts) {
  std::vector<std::pair<std::string, std::string>> files;
  for (const auto& text : texts) {
    files.emplace_back("file " + std::to_string(files.size()), text);
  }
  return read(files);
}
inline State one(const std::vector<std::string>& texts) {
  Reading all = reading(texts);
  for (const auto& note : all.notes) {
    UNSCOPED_INFO(note);
  }
  REQUIRE(all.notes.empty());
  REQUIRE(all.states.size() == 1);
  return all.states.front();
}

}  // namespace cohort::trace::test
