// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "analysis.hpp"
#include "support/catch.hpp"

using namespace cohort::trace;
using cohort::test::contains;
using nlohmann::json;

namespace {

constexpr std::int64_t kSecond = 1'000'000'000;
constexpr std::int64_t kStart = 1'700'000'000 * kSecond;  // 22:13:20 UTC

/// Record of an all-reduce that all ranks make, in second `at`.
json reduce(int number, std::int64_t at, unsigned signature = 1, int rows = 8) {
  return {number,
          kStart + at * kSecond,
          "all_reduce",
          number,
          signature,
          "bf16",
          "own",
          0,
          0,
          1,
          0,
          0,
          2,
          {rows, 4}};
}
/// Call `place` of the list of graph 1.
json listed(int place, const char* call, unsigned signature = 1) {
  return {place, kStart, call, place, signature, "f32", "own", 1, 0, 1, 1, 0, 1, {16}};
}
json launch(int number, std::int64_t at, unsigned signature = 7) {
  return {
      number, kStart + at * kSecond, "launch", number, signature, "u8", "unknown", 0, 0, 0, 1, 0, 0,
      {2, 2}};
}

json ring(int rank, bool own, json records, int open = 0) {
  return {{"rank", rank},
          {"own", own},
          {"gone", false},
          {"ended", false},
          {"open", open},
          {"progress", json::array()},
          {"counters", json::array()},
          {"notes", json::array({json::array({1, "growth of arena tp[0]"})})},
          {"records", std::move(records)},
          {"captured", json::array()}};
}

/// What a rank wrote in second `at`, of groups with these rings.
std::string file(int rank, std::int64_t at,
                 const std::vector<std::pair<std::string, std::vector<json>>>& groups,
                 bool late = true) {
  json j{{"cohort_trace", 1},  {"rank", rank}, {"process", 100 + rank},
         {"state", 5},         {"late", late}, {"written", kStart + at * kSecond},
         {"reason", "a test"}, {"groups", {}}};
  for (const auto& [name, rings] : groups) {
    j["groups"].push_back(
        {{"name", name}, {"rank", rank}, {"ranks", {0, 1, 2}}, {"rings", json(rings)}});
  }
  return j.dump();
}

State one(const std::vector<std::string>& texts) {
  std::vector<std::pair<std::string, std::string>> files;
  for (const auto& text : texts) {
    files.emplace_back("file", text);
  }
  const auto states = read(files);
  REQUIRE(states.size() == 1);
  return states.front();
}

}  // namespace

TEST_CASE("a rank that did not come is behind, from what the others see of it", "[cohort_trace]") {
  const json come = {reduce(1, 0), reduce(2, 3)};
  json third = ring(2, false, json::array({reduce(1, 0)}));
  third["gone"] = true;
  const State state = one({file(0, 5, {{"tp[0]", {ring(0, true, come, 2), third}}}),
                           file(1, 5, {{"tp[0]", {ring(1, true, come, 2), third}}})});
  CHECK(
      verdict(state) ==
      "rank 2 is behind in tp[0]: it has not come to all_reduce #2 of bf16(8,4), to which ranks 0 "
      "and 1 came at 22:13:23.000 UTC, 2.0 s before the end; its last call there is all_reduce "
      "#1 of bf16(8,4), and its process is gone");
  const auto found = findings(state);
  REQUIRE(found.size() == 1);
  CHECK(found[0].ranks == std::vector{2});
  CHECK(found[0].waiting == std::vector{0, 1});
  CHECK(json::parse(to_json(state)).at("findings").at(0).at("kind") == "behind");
}

TEST_CASE("what ranks did after the first time-out does not count", "[cohort_trace]") {
  const json come = {reduce(1, 0), reduce(2, 3)};
  const json later = {reduce(1, 0), reduce(2, 6), reduce(3, 7)};
  const State state = one({file(0, 5, {{"tp[0]", {ring(0, true, come, 2)}}}),
                           file(1, 5, {{"tp[0]", {ring(1, true, come, 2)}}}),
                           file(2, 8, {{"tp[0]", {ring(2, true, later)}}}, false)});
  CHECK_THAT(verdict(state), contains("rank 2 is behind in tp[0]", "not come to all_reduce #2",
                                      "it is in no call of the library"));
}

TEST_CASE("calls that differ are named with what differs", "[cohort_trace]") {
  const auto rank = [](int r, unsigned signature, int rows) {
    return file(r, 5,
                {{"tp[0]", {ring(r, true, {reduce(1, 0), reduce(2, 3, signature, rows)}, 2)}}});
  };
  const State state = one({rank(0, 1, 8), rank(1, 9, 6), rank(2, 1, 8)});
  CHECK(verdict(state) ==
        "rank 1 differs in tp[0]: it made all_reduce #2 of bf16(6,4) where the others made "
        "all_reduce #2 of bf16(8,4); what differs: extent 0 of x, 6 and 8");
}

TEST_CASE("graphs whose lists differ are told by the first call that does", "[cohort_trace]") {
  const auto rank = [](int r, const char* second, unsigned signature) {
    json mine = ring(r, true, json::array({launch(1, 3, signature)}), 0);
    mine["captured"] = {listed(1, "all_reduce"), listed(2, second, signature)};
    return file(r, 5, {{"tp[0]", {mine}}});
  };
  const State state = one({rank(0, "barrier", 4), rank(1, "barrier", 4), rank(2, "broadcast", 5)});
  CHECK_THAT(verdict(state), contains("rank 2 differs in tp[0], in the list of graph 1: it made "
                                      "broadcast of f32(16) where the others made barrier"));
}

TEST_CASE("how far a replay came is told by its steps", "[cohort_trace]") {
  const auto rank = [](int r, std::uint64_t left) {
    json mine = ring(r, true, {launch(1, 1), launch(2, 3)}, 0);
    mine["captured"] = {listed(1, "all_reduce"), listed(2, "all_gather")};
    mine["progress"] = json::array({json::array({0, 4, left, left})});
    return file(r, 5, {{"tp[0]", {mine}}});
  };
  CHECK(verdict(one({rank(0, 3), rank(1, 2), rank(2, 3)})) ==
        "rank 1 is behind in tp[0]: it has made the same calls as ranks 0 and 2, but ended 1 step "
        "fewer, and is in call 1 of 2 of graph 1, all_reduce of f32(16)");
}

TEST_CASE("the cause is a rank that waits for nobody", "[cohort_trace]") {
  // Rank 0 waits in dp for rank 1, which waits in tp for rank 2, which comes to neither.
  const auto rank = [](int r, int dp, int tp, int open_dp, int open_tp) {
    json first = json::array();
    json second = json::array();
    for (int i = 1; i <= dp; ++i) {
      first.push_back(reduce(i, 1));
    }
    for (int i = 1; i <= tp; ++i) {
      second.push_back(reduce(i, 2));
    }
    return file(
        r, 5,
        {{"dp[0]", {ring(r, true, first, open_dp)}}, {"tp[0]", {ring(r, true, second, open_tp)}}});
  };
  const State state = one({rank(0, 2, 1, 2, 0), rank(1, 1, 2, 0, 2), rank(2, 1, 1, 0, 0)});
  const auto found = findings(state);
  REQUIRE(found.size() == 2);
  CHECK(found[0].ranks == std::vector{2});
  CHECK_THAT(found[0].text, contains("rank 2 is behind in dp[0]", "it is in no call of the library",
                                     "rank 1 has not come either, but waits in another group"));
  CHECK(found[1].ranks == std::vector{2});
  CHECK_THAT(found[1].text, contains("rank 2 is behind in tp[0]",
                                     "rank 0 has not come either, but waits in another group"));
}

TEST_CASE("ranks that wait for one another are told together", "[cohort_trace]") {
  const auto rank = [](int r, const json& dp, const json& tp) {
    return file(r, 5, {{"dp[0]", {ring(r, true, dp)}}, {"tp[0]", {ring(r, true, tp)}}});
  };
  const json made = json::array({reduce(1, 1)});
  const json none = json::array();
  CHECK_THAT(verdict(one({rank(0, made, none), rank(1, none, made)})),
             contains("ranks wait for one another, in ", "dp[0]", "tp[0]", "rank 0", "rank 1"));
}

TEST_CASE("agreements are told with what they are on", "[cohort_trace]") {
  const json agreement = {
      2, kStart + 3 * kSecond, "agreement", 2, 3, "u8", "unknown", 0, 0, 0, 0, 1, 1, {4096}};
  const json come = {reduce(1, 0), agreement};
  const State state = one({file(0, 5, {{"tp[0]", {ring(0, true, come, 2)}}}),
                           file(1, 5, {{"tp[0]", {ring(1, true, json::array({reduce(1, 0)}))}}})});
  CHECK_THAT(verdict(state), contains("rank 1 is behind", "agreement #2 on growth of arena tp[0]"));
}

TEST_CASE("nothing is found where nothing is wrong", "[cohort_trace]") {
  const json come = {reduce(1, 0), reduce(2, 3)};
  const State state = one({file(0, 5, {{"tp[0]", {ring(0, true, come)}}}),
                           file(1, 5, {{"tp[0]", {ring(1, true, come)}}})});
  CHECK(findings(state).empty());
  CHECK_THAT(verdict(state), contains("no rank is behind"));
  const std::string text = to_text(state, 40);
  CHECK_THAT(text,
             contains("rank   0 R                  R  ", "tp[0], the last 5000.000 ms in order"));
  CHECK_THAT(to_svg(state), contains("<svg", "all_reduce #2 of bf16(8,4)"));
}

TEST_CASE("what is no trace is refused with its name", "[cohort_trace]") {
  for (const char* text : {"", "{}", "[]", R"({"cohort_trace":2})", R"({"cohort_trace":1})"}) {
    CHECK_THROWS_MATCHES(read({{"some file", text}}), std::runtime_error,
                         cohort::test::says("some file: "));
  }
}
