// SPDX-License-Identifier: Apache-2.0
#include "unit/tools/traces.hpp"

using namespace cohort::trace;
using namespace cohort::trace::test;
using cohort::test::contains;

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
