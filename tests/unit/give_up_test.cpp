// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cohort/give_up.hpp>
#include <cstddef>
#include <exception>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::test;

TEST_CASE("what a transport error says reaches the others with its native code") {
  const detail::GiveUp why =
      detail::GiveUp::because(std::make_exception_ptr(TransportError(
                                  {.call = "send", .native_code = 32, .rank = 1}, "broken pipe")),
                              1);
  const auto told = detail::GiveUp::deserialize(why.serialize());
  try {
    told.raise("barrier", "tp[0]");
    FAIL("raise returned");
  } catch (const TransportError& error) {
    CHECK(error.site().native_code == 32);
    CHECK(error.site().rank == 1);
    CHECK(std::string(error.what()) ==
          "group tp[0]: rank 1 gave up: send failed with code 32 on rank 1: broken pipe");
  }
  // Bytes that are no reason are none of anyone's memory.
  CHECK_THROWS_AS(detail::GiveUp::deserialize(Bytes(5)).raise("barrier", "g"), SymmetryError);
  Bytes wild = why.serialize();
  std::fill(wild.begin() + 12, wild.begin() + 16, std::byte{0x7f});
  CHECK_THROWS_AS(detail::GiveUp::deserialize(wild).raise("barrier", "g"), Error);
  CHECK(detail::GiveUp{.text = std::string(100'000, 'x')}.serialize().size() < 4096);
}

TEST_CASE("who waits for another is not at fault, but those for whom it waits in the end") {
  using Waits = std::map<int, std::vector<int>>;
  struct Case {
    std::vector<int> missing;
    Waits waits_for;  // of those that said so
    std::vector<int> blamed;
  };
  const auto& [missing, waits_for, blamed] = GENERATE(values<Case>({
      {{}, {}, {}},
      {{1, 2}, {}, {1, 2}},
      {{1, 2}, {{1, {2}}}, {2}},
      {{1}, {{1, {2}}, {2, {3}}}, {3}},        // a chain
      {{1}, {{1, {0, 3}}}, {3}},               // for this rank as well
      {{3, 1}, {{1, {2}}}, {2, 3}},            // in ascending order
      {{1, 2}, {{1, {2}}, {2, {1}}}, {}},      // a circle
      {{1}, {{1, {0}}}, {}},                   // of two
      {{1, 2}, {{1, {2, 3}}, {2, {1}}}, {3}},  // out of one
      {{1}, {{1, {}}}, {}},                    // for nobody
  }));
  const auto said = [&waits = waits_for](int r) {
    const auto it = waits.find(r);
    return it != waits.end() ? std::optional(it->second) : std::nullopt;
  };
  CHECK(detail::at_fault(0, missing, said) == blamed);
}

TEST_CASE("a wait that is over names those at fault, of other groups too, and who waited as well") {
  const auto late = [](const std::vector<int>& missing, const detail::Fault& fault) {
    return detail::late_error("step 4 of group pp[0]", "20 ms", missing, fault);
  };
  const auto words = [](const std::exception_ptr& error) {
    return check_throws<TimeoutError>([&] { std::rethrow_exception(error); });
  };
  CHECK(words(late({1, 2}, {{1, 2}})) ==
        "step 4 of group pp[0]: rank 1, 2 did not arrive within 20 ms");
  CHECK(words(late({1, 2, 3}, {{2}})) ==
        "step 4 of group pp[0]: rank 2 did not arrive within 20 ms; rank 1, 3 waited as well");
  CHECK(words(late({1, 2}, {{2}, {3}, "tp[1]"})) ==
        "step 4 of group pp[0]: rank 2 and rank 3 of group tp[1] did not arrive within 20 ms; "
        "rank 1 waited as well");

  const auto elsewhere = late({1}, {{}, {3}, "world", true});
  CHECK(words(elsewhere) ==
        "step 4 of group pp[0]: rank 3 of group world did not arrive within 20 ms; rank 1 waited "
        "as well");
  const auto why = detail::GiveUp::because(elsewhere, 0);
  CHECK(why.kind == detail::GiveUp::Kind::timeout);
  CHECK(why.ranks.empty());  // not this rank either
  // The world's groups learn which rank it is, through whichever of them.
  const std::vector<int> pp{0, 2};
  const std::vector<int> tp{2, 3};
  const auto told = detail::GiveUp::deserialize(why.serialize());
  CHECK_THROWS_MATCHES(told.raise("wait", "pp[0]"), TimeoutError, says("rank 3 of group world"));
  const auto in_tp = told.across({"pp[0]", pp}, {"tp[1]", tp});
  CHECK(in_tp.ranks == std::vector{1});
  CHECK_THROWS_MATCHES(in_tp.raise("wait", "tp[1]"), TimeoutError,
                       says("group tp[1]: behind a failure in group pp[0] of rank 3 of the world"));
  const detail::Fault unlike{.ranks = {1}, .difference = "rank 0 in barrier #4, rank 1 in recv"};
  CHECK_THROWS_MATCHES(std::rethrow_exception(late({1}, unlike)), SymmetryError,
                       says("step 4 of group pp[0]: ranks waited for each other for 20 ms in "
                            "calls that differ: rank 0 in barrier #4, rank 1 in recv"));
  CHECK(detail::GiveUp::because(late({1}, unlike), 0).ranks == std::vector{1});
  // Numbers of another group than the world are words only.
  CHECK(detail::GiveUp::because(late({1}, {{}, {3}, "all", false}), 0).world.empty());
}

TEST_CASE("what another group failed with keeps its type, and names its ranks in the world") {
  const std::vector<int> tp{2, 3};
  const std::vector<int> pp{0, 2};
  const std::vector<int> all{0, 1, 2, 3};
  const auto late = detail::GiveUp::because(
      std::make_exception_ptr(TimeoutError("group tp[1]: rank 1 did not arrive", {1})), 0);
  const auto in_pp =
      detail::GiveUp::deserialize(late.across({"tp[1]", tp}, {"pp[0]", pp}).serialize());
  CHECK(in_pp.kind == detail::GiveUp::Kind::timeout);
  CHECK(in_pp.ranks.empty());  // rank 3 is none of its ranks
  CHECK(in_pp.finder == 1);
  CHECK_THROWS_MATCHES(in_pp.raise("barrier", "pp[0]"), TimeoutError,
                       says("group pp[0]: behind a failure in group tp[1] of rank 3 of the world: "
                            "rank 0 gave up: group tp[1]: rank 1 did not arrive"));
  // Passed on by a rank that only heard of it: the same words, and the rank again.
  const auto in_world = in_pp.across({"pp[0]", pp}, {"world", all});
  CHECK(in_world.ranks == std::vector{3});
  CHECK(in_world.text == in_pp.text);
  CHECK_THROWS_MATCHES(in_world.raise("barrier", "world"), TimeoutError,
                       says("group world: behind a failure in group tp[1] of rank 3 of the world"));
  CHECK(late.across({"tp[1]", tp}, {"tp[1]", tp}).text == late.text);
}
