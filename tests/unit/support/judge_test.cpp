// SPDX-License-Identifier: Apache-2.0
#include <chrono>
#include <csignal>
#include <string>
#include <utility>
#include <vector>

#include "chaos/judge.hpp"
#include "chaos/reports.hpp"
#include "support/catch.hpp"

// The judge of the chaos, who must find what is wrong: nobody else does.

using namespace cohort::chaos;
using namespace cohort::test;
using namespace std::chrono_literals;

namespace {

/// A round of three ranks, of which rank 2 is killed, as it should go.
struct Told {
  Plan plan{.ranks = 3, .fault = Fault::kill, .victim = 2};
  Kind kind{.make = {}, .slack = 100ms, .forming_slack = 500ms};
  std::vector<Child> children{3};

  Told() {
    for (Child& child : children) {
      take_line(child, "step\tcalling\t0\tcall\t10\t0\tok\t\t");
      child.gone = true;
    }
    for (int r = 0; r < 2; ++r) {
      say(r, "step\tcalling\t1\tcall\t1010\t0\tTimeoutError\t2\trank 2 did not arrive");
      say(r, "over");
      say(r, "step\tforming\t1\trecover\t50\t0\tok\t\t");
      say(r, "end");
    }
    children[2].status = SIGKILL;  // as waitpid tells it
  }

  void say(int rank, const std::string& line) {
    take_line(children[static_cast<std::size_t>(rank)], line);
  }
  void exits(int rank, int code) { children[static_cast<std::size_t>(rank)].status = code << 8; }

  /// What the judge finds, one after another.
  [[nodiscard]] std::string found() const {
    std::string all;
    for (const Problem& problem : Judge(plan, kind, 1000ms, children).problems()) {
      all += problem.text + (problem.of_time ? " (of time)\n" : "\n");
    }
    return all;
  }
};

}  // namespace

TEST_CASE("a round in which all blame the rank that was killed, and go on, is right") {
  const Told told;
  CHECK(told.children[0].ended);
  CHECK(told.children[0].over);
  CHECK_FALSE(told.children[2].over);
  CHECK(told.found().empty());
}

TEST_CASE("a wrong result, a late error and one that blames the innocent are found") {
  Told told;
  told.say(0, "step\tcalling\t2\tcall\t10\t0\tWRONG\t\ta sum");
  CHECK_THAT(told.found(), contains("rank 0, calling 2, call: a wrong result", "a sum"));
  Told late;
  late.say(1, "step\tcalling\t2\tcall\t1351\t0\tok\t\t");
  CHECK_THAT(late.found(), contains("rank 1, calling 2", "took too long", "(of time)"));
  Told forming;
  forming.say(1, "step\tforming\t0\tcreate\t1700\t0\tok\t\t");
  CHECK(forming.found().empty());
  Told blames;
  blames.plan.ranks = 4;
  blames.children.emplace_back().ended = true;
  blames.say(0, "step\tcalling\t2\tcall\t10\t0\tTimeoutError\t3\trank 3 did not arrive");
  CHECK_THAT(blames.found(), contains("blames rank 3, which did nothing wrong"));
  Told nobody;
  nobody.say(0, "step\tcalling\t2\tcall\t10\t0\tSymmetryError\t\tsomebody");
  CHECK_THAT(nobody.found(), contains("names nobody"));
  nobody.kind.cannot_name = [](const std::string& text) { return text == "somebody"; };
  CHECK(nobody.found().empty());
  Told untyped;
  untyped.say(0, "step\tcalling\t2\tcall\t10\t0\tbad_alloc\t\t");
  CHECK_THAT(untyped.found(), contains("not a typed error"));
}

TEST_CASE("ranks that blame only one another, or fail without a cause, are found") {
  Told circle;
  circle.children[2].ended = true;
  circle.children[2].status = 0;
  circle.plan.fault = Fault::stop;
  circle.children[0].steps[1].named = {1};
  circle.children[1].steps[1].named = {0};
  CHECK_THAT(circle.found(), contains("blames ranks that did not give up because of the victim"));
  Told none;
  none.plan.fault = Fault::hesitate;
  CHECK_THAT(none.found(), contains("nothing had failed"));
  Told recovery;
  recovery.say(0, "step\tforming\t1\trecover\t10\t0\tTimeoutError\t1\t");
  CHECK_THAT(recovery.found(), contains("those that live could not go on"));
}

TEST_CASE("a process ends as its fault says, and all others well") {
  Told told;
  told.exits(0, 1);
  CHECK_THAT(told.found(), contains("rank 0 left with status 1"));
  Told dies;
  dies.children[1].status = SIGSEGV;
  CHECK_THAT(dies.found(), contains("rank 1 died of signal 11"));
  Told throws;
  throws.plan.fault = Fault::throws;
  CHECK_THAT(throws.found(), contains("rank 2 died of signal 9"));
  throws.exits(2, 3);
  CHECK(throws.found().empty());
}
