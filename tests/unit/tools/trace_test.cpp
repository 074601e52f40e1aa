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
json reduce(std::uint64_t number, std::int64_t at, unsigned signature = 1, int rows = 8) {
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
json reduces(std::uint64_t count, std::int64_t first = 0) {
  json records = json::array();
  for (std::uint64_t i = 1; i <= count; ++i) {
    records.push_back(reduce(i, first + static_cast<std::int64_t>(i) - 1));
  }
  return records;
}
/// Call `sequence` of all lists, of that of a graph; `number` among those that all ranks make.
json listed(int sequence, const char* call, unsigned signature = 1, int graph = 1, int number = -1,
            int inbox = 0) {
  return {sequence,  kStart, call,  number < 0 ? sequence : number,
          signature, "f32",  "own", 3,
          inbox,     1,      graph, 0,
          1,         {16}};
}
json launch(int number, std::int64_t at, unsigned signature = 7, int graph = 1, int calls = 2,
            int steps = 2, int inboxes = 1) {
  return {number,    kStart + at * kSecond,
          "launch",  number,
          signature, "u8",
          "unknown", 2,
          0,         0,
          graph,     0,
          0,         {calls, steps, inboxes}};
}
/// Inbox 0.
json progress(std::uint64_t issued, std::uint64_t entered, std::uint64_t left) {
  return json::array({json::array({0, issued, entered, left, left})});
}
/// The same where nobody knows whether the last step that began has ended.
json begun(std::uint64_t issued, std::uint64_t entered) {
  return json::array({json::array({0, issued, entered, entered - 1, entered})});
}

json ring(int rank, bool own, json records, std::uint64_t open = 0) {
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
std::string file(int rank, std::int64_t at,
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
json missing(const std::vector<int>& ranks, bool over = false) {
  return {{"why", "late"}, {"late", true}, {"missing", ranks}, {"over", over}};
}

Reading reading(const std::vector<std::string>& texts) {
  std::vector<std::pair<std::string, std::string>> files;
  for (const auto& text : texts) {
    files.emplace_back("file " + std::to_string(files.size()), text);
  }
  return read(files);
}
State one(const std::vector<std::string>& texts) {
  Reading all = reading(texts);
  for (const auto& note : all.notes) {
    UNSCOPED_INFO(note);
  }
  REQUIRE(all.notes.empty());
  REQUIRE(all.states.size() == 1);
  return all.states.front();
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
                                      "it is in no call of the state"));
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
  CHECK(verdict(state) ==
        "rank 2 differs in tp[0]: it made broadcast of f32(16) in launch #1 of graph 1 where the "
        "others made barrier");
}

TEST_CASE("a capture that was thrown away on one rank is no difference", "[cohort_trace]") {
  const auto rank = [](int r, std::uint64_t calls) {
    json mine = ring(r, true, reduces(calls), calls == 4 ? 4 : 0);
    mine["captured"] = {listed(1, "all_reduce", 11, 1, 1), listed(2, "all_gather", 12, 1, 2)};
    int at = 2;
    if (r == 1) {  // graph 1 again, as graph 2
      mine["captured"].push_back(listed(3, "all_reduce", 11, 2, 1));
      mine["captured"].push_back(listed(4, "all_gather", 12, 2, 2));
      at = 4;
    }
    mine["captured"].push_back(listed(at + 1, "all_gather", 12, r == 1 ? 3 : 2, 1));
    return file(r, 9, {{"tp[0]", {mine}}});
  };
  CHECK_THAT(verdict(one({rank(0, 4), rank(1, 4), rank(2, 3)})),
             contains("rank 2 is behind in tp[0]: it has not come to all_reduce #4"));
}

TEST_CASE("graphs with calls of some ranks only are told by those of all", "[cohort_trace]") {
  // Rank 2 takes no part in the send from rank 0 to 1, in front of the reduction of all.
  const auto rank = [](int r, int open) {
    json mine = ring(r, true, json::array({launch(1, 3, 7, 1, r == 2 ? 1 : 2, r == 2 ? 1 : 2)}), 0);
    mine["captured"] = json::array();
    if (r != 2) {
      mine["captured"].push_back(listed(1, r == 0 ? "send" : "recv", 20U + unsigned(r), 1, 0));
    }
    mine["captured"].push_back(listed(r == 2 ? 1 : 2, "all_reduce", 5, 1, 1));
    mine["progress"] = r == 2 ? progress(1, 0, 0) : progress(2, 2, 1);
    return file(r, 5 + open, {{"pp[0]", {mine}}});
  };
  CHECK(verdict(one({rank(0, 0), rank(1, 0), rank(2, 0)})) ==
        "the device of rank 2 is behind in pp[0]: it has not begun call 1 of 1 of graph 1, "
        "all_reduce of f32(16), while those of ranks 0 and 1 are in call 2 of 2 of graph 1, "
        "all_reduce of f32(16); its host has made all calls up to launch #1 of graph 1");
}

TEST_CASE("how far a replay came is told by its steps", "[cohort_trace]") {
  const auto rank = [](int r, std::uint64_t left) {
    json mine = ring(r, true, {launch(1, 1), launch(2, 3)}, 0);
    mine["captured"] = {listed(1, "all_reduce"), listed(2, "all_gather")};
    mine["progress"] = progress(4, left + (r == 1 ? 0 : 1), left);
    return file(r, 5, {{"tp[0]", {mine}}});
  };
  CHECK(verdict(one({rank(0, 3), rank(1, 2), rank(2, 3)})) ==
        "the device of rank 1 is behind in tp[0]: it has not begun call 1 of 2 of graph 1, "
        "all_reduce of f32(16), while those of ranks 0 and 2 are in call 2 of 2 of graph 1, "
        "all_gather of f32(16); its host has made all calls up to launch #2 of graph 1");
}

TEST_CASE("a list that lost its beginning names no wrong call", "[cohort_trace]") {
  const auto rank = [](int r, std::uint64_t left, int first) {
    json mine = ring(r, true, json::array({launch(1, 1, 7, 1, 100, 100)}), 0);
    for (int i = first; i <= 100; ++i) {
      mine["captured"].push_back(listed(i, i % 2 != 0 ? "all_reduce" : "all_gather", 1, 1, i));
    }
    mine["progress"] = progress(100, left + 1, left);
    return file(r, 5, {{"tp[0]", {mine}}});
  };
  CHECK_THAT(verdict(one({rank(0, 10, 51), rank(1, 11, 51)})),
             contains("the device of rank 0 is behind in tp[0]: it is in launch #1 of graph 1 "
                      "behind 10 of its 100 steps, in a part of its list of calls that was not "
                      "kept"));
  // Another rank has the whole list of the same launch.
  CHECK_THAT(verdict(one({rank(0, 10, 51), rank(1, 11, 1)})),
             contains("rank 0 is behind in tp[0]: it is in call 11 of 100 of graph 1, all_reduce"));
  CHECK_THAT(verdict(one({rank(0, 60, 51), rank(1, 61, 51)})),
             contains("rank 0 is behind in tp[0]: it is in call 61 of 100 of graph 1, all_reduce"));
}

TEST_CASE("the inboxes of a graph are told apart", "[cohort_trace]") {
  const auto rank = [](int r, std::uint64_t first, std::uint64_t second) {
    json mine = ring(r, true, json::array({launch(1, 1, 7, 1, 2, 2, 2)}), 0);
    mine["captured"] = {listed(1, "all_reduce", 1, 1, 1, 0), listed(2, "all_gather", 1, 1, 2, 1)};
    mine["progress"] =
        json::array({json::array({0, 1, 1, first, first}), json::array({1, 1, 1, second, second})});
    return file(r, 5, {{"tp[0]", {mine}}});
  };
  CHECK_THAT(verdict(one({rank(0, 0, 0), rank(1, 1, 0)})),
             contains("rank 0 is behind in tp[0]: it is in call 1 of 2 of graph 1, all_reduce of "
                      "f32(16), while that of rank 1 is in call 2 of 2 of graph 1, all_gather"));
}

TEST_CASE("where hosts ran ahead, devices say who is behind", "[cohort_trace]") {
  const auto rank = [](int r, std::uint64_t calls, std::uint64_t entered, std::uint64_t left) {
    json mine = ring(r, true, reduces(calls));
    mine["progress"] = progress(calls, entered, left);
    return file(r, 60, {{"tp[0]", {mine}}});
  };
  // Rank 1's host is one call behind, which matters to nobody: the card of rank 2 stands still.
  CHECK(verdict(one({rank(0, 10, 5, 4), rank(1, 9, 5, 4), rank(2, 10, 4, 4)})) ==
        "the device of rank 2 is behind in tp[0]: it has not begun all_reduce #5 of bf16(8,4), "
        "while those of ranks 0 and 1 are in all_reduce #5 of bf16(8,4); its host has made all "
        "calls up to all_reduce #10 of bf16(8,4)");
  // All cards are in one call.
  CHECK(verdict(one({rank(0, 10, 5, 4), rank(1, 9, 5, 4), rank(2, 10, 5, 4)})) ==
        "ranks 0, 1 and 2 are all in all_reduce #5 of bf16(8,4) of tp[0] for 56.0 s, and none has "
        "come to its end");
  // A card that has done all that its host gave it waits for its host.
  CHECK_THAT(verdict(one({rank(0, 10, 5, 4), rank(1, 4, 4, 4), rank(2, 10, 5, 4)})),
             contains("rank 1 is behind in tp[0]: it has not come to all_reduce #5 of bf16(8,4), "
                      "to which ranks 0 and 2 came"));
}

TEST_CASE("a call that has begun is not one that goes on", "[cohort_trace]") {
  // What the last launch of a graph of two calls left behind on each rank.
  struct Rank {
    json progress;
    bool grows = false;  ///< Its host is in the growth of an arena, the next call.
    std::uint64_t calls = 0;
  };
  const auto rank = [](int r, const Rank& of) {
    json records = json::array({launch(1, 1), launch(2, 2)});
    if (of.grows) {
      records.push_back(
          {3, kStart + 3 * kSecond, "agreement", 3, 3, "u8", "unknown", 2, 0, 0, 0, 1, 1, {4096}});
    }
    for (std::uint64_t i = 0; i < of.calls; ++i) {
      records.push_back(reduce(3 + i, 3));
    }
    json mine = ring(r, true, records, of.grows ? 3 : 0);
    mine["captured"] = {listed(1, "all_reduce"), listed(2, "all_gather")};
    mine["progress"] = of.progress;
    return file(r, 9, {{"tp[0]", {mine}}}, of.grows, {.ranks = {0, 1}, .hosts = {0, 0}});
  };
  const Rank unsure{.progress = begun(4, 4)};
  const Rank ended{.progress = progress(4, 4, 4)};
  const Rank inside{.progress = progress(4, 4, 3)};
  const std::string call = "call 2 of 2 of graph 1, all_gather of f32(16)";

  SECTION("a rank that is in something definite wins") {
    for (const Rank& late : {unsure, ended}) {
      for (const Rank& grows : {unsure, ended}) {
        CHECK(verdict(one({rank(0, {.progress = grows.progress, .grows = true}), rank(1, late)})) ==
              "rank 1 is behind in tp[0]: it has not come to agreement #3 on growth of arena "
              "tp[0], to which rank 0 came at 22:13:23.000 UTC, 6.0 s before the end; its last "
              "call there is launch #2 of graph 1, and it is in no call of the state");
      }
    }
  }
  SECTION("so does one that lacks a call") {
    CHECK_THAT(verdict(one({rank(0, {.progress = begun(5, 5), .calls = 1}), rank(1, unsure)})),
               contains("rank 1 is behind in tp[0]: it has not come to all_reduce #3 of bf16(8,4), "
                        "to which rank 0 came at "));
  }
  SECTION("nobody ends a call that another has not begun") {
    for (const json& late : {progress(4, 3, 3), begun(4, 3)}) {
      CHECK(verdict(one({rank(0, unsure), rank(1, {.progress = late})})) ==
            "the device of rank 1 is behind in tp[0]: it has not begun " + call +
                ", while that of rank 0 is in " + call +
                "; its host has made all calls up to launch #2 of graph 1");
    }
  }
  SECTION("where one is in it, the others may be") {
    const State state = one({rank(0, unsure), rank(1, inside)});
    CHECK(verdict(state) == "rank 1 is in " + call +
                                " of tp[0] for 7.0 s, which rank 0 has begun as well, and its end "
                                "is not recorded there");
    CHECK(json::parse(to_json(state)).at("findings").at(0).at("kind") == "all in one call");
  }
  SECTION("where one has ended it, the other may have") {
    CHECK(findings(one({rank(0, unsure), rank(1, ended)})).empty());
  }
  SECTION("where nothing else is known, that is said") {
    const State state = one({rank(0, unsure), rank(1, unsure)});
    CHECK(verdict(state) ==
          "no rank is behind another, and no calls differ, as far as is known; ranks 0 and 1 have "
          "all begun " +
              call + " of tp[0], 7.0 s before the end, and its end is not recorded");
    CHECK(json::parse(to_json(state)).at("findings").at(0).at("kind") == "all have begun");
    CHECK(findings(one({rank(0, ended), rank(1, ended)})).empty());
  }
}

TEST_CASE("a call whose end is not recorded explains no other group's hang", "[cohort_trace]") {
  // Rank 1 does not come to a call of tp; in dp all have begun the last one, whose cards are busy.
  const auto rank = [](int r, std::uint64_t calls) {
    json dp = ring(r, true, reduces(2));
    dp["progress"] = begun(2, 2);
    json tp = ring(r, true, reduces(calls, 10));
    tp["progress"] = begun(calls, calls);
    return file(r, 60, {{"dp[0]", {dp}}, {"tp[0]", {tp}}});
  };
  const State state = one({rank(0, 4), rank(1, 3), rank(2, 4)});
  CHECK_THAT(verdict(state),
             contains("rank 1 is behind in tp[0]: it has not come to all_reduce #4 of bf16(8,4)",
                      "and its device has begun all_reduce #2 of bf16(8,4) of dp[0], the end of "
                      "which is not recorded"));
  REQUIRE(findings(state).size() == 2);
  CHECK(findings(state)[1].kind == Finding::Kind::begun);
}

TEST_CASE("what another rank saw of a device is old", "[cohort_trace]") {
  const auto rank = [](int r, std::uint64_t entered) {
    json mine = ring(r, true, reduces(10));
    mine["progress"] = progress(10, entered, entered - 1);
    json third = ring(2, false, reduces(10));
    third["progress"] = progress(10, 0, 0);
    return file(r, 60, {{"tp[0]", {mine, third}}});
  };
  CHECK_THAT(verdict(one({rank(0, 9), rank(1, 10)})),
             contains("the device of rank 0 is behind in tp[0]: it is in all_reduce #9"));
}

TEST_CASE("the cause is a rank that waits for nobody", "[cohort_trace]") {
  // Rank 0 waits in dp for rank 1, which waits in tp for rank 2, which comes to neither.
  const auto rank = [](int r, std::uint64_t dp, std::uint64_t tp, std::uint64_t open_dp,
                       std::uint64_t open_tp) {
    json first = json::array();
    json second = json::array();
    for (std::uint64_t i = 1; i <= dp; ++i) {
      first.push_back(reduce(i, 1));
    }
    for (std::uint64_t i = 1; i <= tp; ++i) {
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
  CHECK_THAT(found[0].text, contains("rank 2 is behind in dp[0]", "it is in no call of the state",
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
                           file(1, 5, {{"tp[0]", {ring(1, true, come)}}}),
                           file(2, 5, {{"tp[0]", {ring(2, true, come)}}})});
  CHECK(findings(state).empty());
  CHECK_THAT(verdict(state), contains("no rank is behind"));
  const std::string text = to_text(state, 40);
  CHECK_THAT(text,
             contains("rank   0 R                  R  ", "tp[0], the last 5000.000 ms in order"));
  CHECK_THAT(to_svg(state), contains("<svg", "all_reduce #2 of bf16(8,4)"));
}

TEST_CASE("what is no trace is left out with its name", "[cohort_trace]") {
  const std::string good = file(0, 5, {{"tp[0]", {ring(0, true, reduces(2))}}});
  std::string rank_of_nobody = file(0, 5, {{"tp[0]", {ring(7, true, reduces(2))}}});
  for (const std::string& text :
       {std::string(), std::string("{}"), std::string("[]"), std::string("[1]"),
        std::string(R"({"cohort_trace":2})"), std::string(R"({"cohort_trace":3})"),
        good.substr(0, good.size() / 2), rank_of_nobody}) {
    const Reading all = reading({good, text});
    CHECK(all.states.size() == 1);
    REQUIRE(all.notes.size() == 1);
    CHECK_THAT(all.notes.front(), contains("left out: file 1: "));
  }
}

TEST_CASE("runs in one folder are told apart", "[cohort_trace]") {
  const Common yesterday{.run = "00000000000000bb"};
  const Reading all =
      reading({file(0, 10, {{"tp[0]", {ring(0, true, reduces(9))}}}, true, yesterday),
               file(0, 86400, {{"tp[0]", {ring(0, true, reduces(3), 3)}}}),
               file(1, 86400, {{"tp[0]", {ring(1, true, reduces(2))}}})});
  REQUIRE(all.states.size() == 2);
  CHECK(all.states[0].run == yesterday.run);
  CHECK_THAT(verdict(all.states[1]), contains("rank 1 is behind", "not come to all_reduce #3"));
  CHECK(all.states[1].reasons.size() == 2);
}

TEST_CASE("of two files of a rank the newer counts", "[cohort_trace]") {
  const State state = one({file(0, 5, {{"tp[0]", {ring(0, true, reduces(1))}}}),
                           file(0, 9, {{"tp[0]", {ring(0, true, reduces(4), 4)}}}),
                           file(1, 9, {{"tp[0]", {ring(1, true, reduces(3))}}})});
  CHECK_THAT(verdict(state), contains("rank 1 is behind", "not come to all_reduce #4"));
}

TEST_CASE("a machine that left no trace is named", "[cohort_trace]") {
  const Common common{.ranks = {0, 1, 2, 3}, .hosts = {0, 0, 1, 1}, .failure = missing({})};
  const auto rank = [&](int r) {
    return file(r, 30,
                {{"tp[0]", {ring(0, r == 0, reduces(5), 5), ring(1, r == 1, reduces(5), 5)}}}, true,
                common);
  };
  const State state = one({rank(0), rank(1)});
  CHECK(unknown_ranks(state) == std::vector{2, 3});
  CHECK(verdict(state) ==
        "nothing is known of ranks 2 and 3 in tp[0], of which no trace was found, nor one of "
        "another rank of their machines: ranks 0 and 1 have waited in all_reduce #5 of bf16(8,4) "
        "for 26.0 s, to which no other rank is known to be late");
  CHECK_THAT(to_text(state, 40), contains("no trace was found of ranks 2, 3"));

  const auto unsure = [&](int r) {
    json mine = ring(r, true, reduces(5));
    mine["progress"] = begun(5, 5);
    return file(r, 30, {{"tp[0]", {mine}}}, true, common);
  };
  CHECK_THAT(verdict(one({unsure(0), unsure(1)})),
             contains("nothing is known of ranks 2 and 3 in tp[0]",
                      "ranks 0 and 1 have begun all_reduce #5 of bf16(8,4) 26.0 s before the end, "
                      "the end of which is not recorded, to which no other rank"));

  // A time-out that names them says more.
  Common named = common;
  named.failure = missing({2, 3});
  CHECK_THAT(verdict(one({file(0, 30, {{"tp[0]", {ring(0, true, reduces(5), 5)}}}, true, named)})),
             contains("ranks 2 and 3 are behind in tp[0]: they have not come to all_reduce #5",
                      "they left no trace, nor did another rank of their machines"));

  // Nobody waits for them.
  CHECK(verdict(one({file(0, 30, {{"tp[0]", {ring(0, true, reduces(5))}}}, false,
                          {.hosts = {0, 1, 1}})})) ==
        "no rank is behind another, and no calls differ, as far as is known; nothing is known of "
        "ranks 1 and 2, of which no trace was found");
}

TEST_CASE("clocks of different machines are not compared", "[cohort_trace]") {
  const auto on = [](int r, std::int64_t at, std::int64_t shift, std::uint64_t calls, bool late,
                     const json& failure = nullptr) {
    const std::uint64_t open = late ? calls : 0;
    return file(
        r, at + shift, {{"tp[0]", {ring(r, true, reduces(calls, shift), open)}}}, late,
        {.machine = "machine " + std::to_string(r), .hosts = {0, 1, 2}, .failure = failure});
  };
  // Rank 1's clock is an hour ahead; it waits for rank 0.
  for (const std::int64_t shift : {-3600, 0, 3600}) {
    CHECK_THAT(verdict(one({on(0, 30, 0, 3, false), on(1, 30, shift, 4, true)})),
               contains("rank 0 is behind in tp[0]: it has not come to all_reduce #4 of bf16(8,4), "
                        "to which rank 1 came at ",
                        ", 27.0 s before the end; its last call there is all_reduce #3"));
  }
  // Rank 0 came after all, when the others had given up: they say so.
  CHECK_THAT(verdict(one({on(0, 60, 0, 5, false), on(1, 30, 3600, 4, true, missing({0})),
                          on(2, 30, -3600, 4, true, missing({0}))})),
             contains("rank 0 is behind in tp[0]: it has not come to all_reduce #4 of bf16(8,4), "
                      "to which ranks 1 and 2 came"));
}

TEST_CASE("ranks that run are not behind for being looked at later", "[cohort_trace]") {
  for (const bool same : {true, false}) {
    const auto rank = [&](int r, std::uint64_t first, std::int64_t at) {
      json records = json::array();
      for (std::uint64_t i = 0; i < 100; ++i) {
        json call = reduce(first + i, 0);
        call[1] = kStart + at * kSecond - std::int64_t(100 - i) * 1'000'000;
        records.push_back(call);
      }
      std::vector<json> rings{ring(r, true, records)};
      if (r == 0 && same) {
        rings.push_back(ring(1, false, records));
      }
      return file(r, at, {{"tp[0]", rings}}, false,
                  {.machine = same ? "here" : "machine " + std::to_string(r)});
    };
    CHECK(findings(one({rank(0, 1000, 10), rank(1, 3000, 12)})).empty());
  }
}

TEST_CASE("a rank that is still in an earlier call is said to be in it", "[cohort_trace]") {
  const auto rank = [](int r, std::uint64_t calls) {
    return file(r, 30, {{"tp[0]", {ring(r, true, reduces(calls), calls)}}});
  };
  CHECK_THAT(verdict(one({rank(0, 4), rank(1, 4), rank(2, 3)})),
             contains("rank 2 is behind", "and it is in all_reduce #3 of bf16(8,4) of tp[0]"));
}

TEST_CASE("of a rank without a file nothing is made up", "[cohort_trace]") {
  const auto rank = [](int r, bool gone_later) {
    json third = ring(2, false, reduces(3));
    third["gone"] = gone_later && r == 1;
    return file(r, 30 + r, {{"tp[0]", {ring(r, true, reduces(4), 4), third}}});
  };
  CHECK_THAT(verdict(one({rank(0, false), rank(1, false)})),
             contains("and as it wrote no trace itself, nothing else is known of it"));
  // The launcher killed it after the first rank had given up.
  CHECK_THAT(verdict(one({rank(0, true), rank(1, true)})),
             contains("; its process was there when the first rank wrote, and gone within 1.0 s"));
}

TEST_CASE("a process that has not quite ended when its connections close is gone",
          "[cohort_trace]") {
  const auto rank = [](int r) {
    json third = ring(2, false, reduces(3));
    third["gone"] = r == 1;
    json text = json::parse(file(r, 30, {{"tp[0]", {ring(r, true, reduces(4), 4), third}}}, false));
    text["written"] = text["written"].get<std::int64_t>() + r * 1'000'000;
    text["groups"][0]["failure"] = {
        {"why", "closed"}, {"late", false}, {"missing", json::array()}, {"over", false}};
    return text.dump();
  };
  CHECK_THAT(verdict(one({rank(0), rank(1)})),
             contains("rank 2 is behind in tp[0]", "and its process is gone"));
}

TEST_CASE("where ranks are evenly split nobody is blamed", "[cohort_trace]") {
  const auto rank = [](int r, unsigned signature, int rows) {
    json records = reduces(3);
    records.push_back(reduce(4, 3, signature, rows));
    return file(r, 9, {{"tp[0]", {ring(r, true, records, 4)}}});
  };
  const State state = one({rank(0, 9, 6), rank(1, 1, 8)});
  CHECK(verdict(state) ==
        "ranks 0 and 1 make different calls in tp[0]: rank 0 made all_reduce #4 of bf16(6,4) where "
        "rank 1 made all_reduce #4 of bf16(8,4); what differs: extent 0 of x, 6 and 8");
  CHECK(findings(state).front().ranks == std::vector{0, 1});
}

TEST_CASE("a difference behind which all went on is not why they hang", "[cohort_trace]") {
  const auto rank = [](int r, unsigned signature, std::uint64_t calls) {
    json records = reduces(calls);
    records[1] = reduce(2, 1, signature, signature == 1 ? 8 : 6);
    return file(r, 30, {{"tp[0]", {ring(r, true, records, calls == 9 ? 9 : 0)}}});
  };
  const State state = one({rank(0, 1, 9), rank(1, 5, 9), rank(2, 1, 8)});
  CHECK_THAT(verdict(state), contains("rank 2 is behind in tp[0]", "all_reduce #9"));
  REQUIRE(findings(state).size() == 2);
  CHECK_THAT(findings(state)[1].text, contains("rank 1 differs", "later calls are alike"));
}

TEST_CASE("who does not meet a send or recv is behind", "[cohort_trace]") {
  const auto pair = [](const char* call, int peer) {
    return json{4, kStart + 3 * kSecond, call, 0, 1, "f32", "mapped", 0, 0, 1, 0, peer, 1, {16}};
  };
  const auto rank = [&](int r, const json& last) {
    json records = reduces(3);
    if (!last.is_null()) {
      records.push_back(last);
    }
    return file(r, 9, {{"pp[0]", {ring(r, true, records, last.is_null() ? 0 : 4)}}});
  };
  CHECK(verdict(one({rank(0, pair("recv", 2)), rank(1, nullptr), rank(2, nullptr)})) ==
        "rank 2 is behind in pp[0]: rank 0 has waited for it in recv of f32(16) from it for 6.0 s; "
        "it is in no call of the state");
  // Rank 0 waits for 1, which waits for 2.
  CHECK_THAT(verdict(one({rank(0, pair("recv", 1)), rank(1, pair("recv", 2)), rank(2, nullptr)})),
             contains("rank 2 is behind in pp[0]: rank 1 has waited for it in recv of f32(16)"));
  CHECK_THAT(verdict(one({rank(0, pair("recv", 1)), rank(1, pair("recv", 0))})),
             contains("ranks wait for one another, in pp[0]: ", "rank 0", "rank 1"));
  // Both halves of one exchange.
  CHECK_THAT(verdict(one({rank(0, pair("recv", 1)), rank(1, pair("send", 0)), rank(2, nullptr)})),
             contains("no rank is behind another"));
}

TEST_CASE("numbers beyond 32 bits are told apart", "[cohort_trace]") {
  const std::uint64_t wide = std::uint64_t{1} << 32;
  const auto rank = [&](int r, std::uint64_t calls) {
    json records = json::array();
    for (std::uint64_t i = 0; i < calls; ++i) {
      records.push_back(reduce(wide - 1 + i, static_cast<std::int64_t>(i)));
    }
    return file(r, 30, {{"tp[0]", {ring(r, true, records)}}});
  };
  CHECK_THAT(verdict(one({rank(0, 3), rank(1, 2)})),
             contains("rank 1 is behind in tp[0]: it has not come to all_reduce #4294967297"));
}

TEST_CASE("graphs that the engine does not number are told by steps", "[cohort_trace]") {
  const auto rank = [](int r, std::uint64_t entered) {
    json mine = ring(r, true, reduces(3));
    mine["progress"] = progress(3, entered, entered - 1);
    return file(r, 30, {{"tp[0]", {mine}}});
  };
  CHECK_THAT(verdict(one({rank(0, 40), rank(1, 39), rank(2, 40)})),
             contains("rank 1 is behind in tp[0]: it has made the same calls as ranks 0 and 2, as "
                      "far as is known, but begun 1 step fewer"));
}

TEST_CASE("the end of a wait that was over does not count", "[cohort_trace]") {
  const auto rank = [](int r, std::uint64_t calls, const json& failure) {
    return file(r, 30, {{"tp[0]", {ring(r, true, reduces(calls), calls)}}}, true,
                {.failure = failure});
  };
  CHECK_THAT(
      verdict(one({rank(0, 9, missing({1}, true)), rank(1, 9, nullptr), rank(2, 8, nullptr)})),
      contains("rank 2 is behind in tp[0]", "all_reduce #9"));
}
