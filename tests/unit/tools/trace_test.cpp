// SPDX-License-Identifier: Apache-2.0
#include "unit/tools/traces.hpp"

using namespace cohort::trace;
using namespace cohort::trace::test;
using cohort::test::contains;

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

TEST_CASE("the end of a wait that was over does not count", "[cohort_trace]") {
  const auto rank = [](int r, std::uint64_t calls, const json& failure) {
    return file(r, 30, {{"tp[0]", {ring(r, true, reduces(calls), calls)}}}, true,
                {.failure = failure});
  };
  CHECK_THAT(
      verdict(one({rank(0, 9, missing({1}, true)), rank(1, 9, nullptr), rank(2, 8, nullptr)})),
      contains("rank 2 is behind in tp[0]", "all_reduce #9"));
}
