// SPDX-License-Identifier: Apache-2.0
#include "cohort/question_box.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "support/catch.hpp"
#include "support/forked.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::detail;

TEST_CASE("a question is answered by a wait in its group, and where there is none by another") {
  QuestionBox box;
  CHECK(box.take_questions(7).empty());
  box.store_question(1, {7, ControlCall::asks, 3});
  box.store_question(2, {8, ControlCall::asks, 4});
  box.begin_wait(7);
  box.begin_wait(8);
  box.begin_wait(8);
  const auto seven = box.take_questions(7);
  REQUIRE(seven.size() == 1);
  CHECK(seven.front().from == 1);
  CHECK(seven.front().trailer.channel == 7);
  CHECK(seven.front().trailer.call == ControlCall::waits);
  CHECK(seven.front().trailer.sequence == 3);
  box.end_wait(8);
  CHECK(box.take_questions(7).empty());  // another thread still waits there
  box.end_wait(8);
  const auto eight = box.take_questions(7);
  REQUIRE(eight.size() == 1);
  CHECK(eight.front().from == 2);
  CHECK(box.take_questions(8).empty());
  // What nobody answers has a bound.
  for (std::uint32_t i = 0; i < 5000; ++i) {
    box.store_question(1, {7, ControlCall::asks, i});
  }
  CHECK(box.take_questions(7).size() <= 4096);
}

TEST_CASE("answers are kept while their inquiry goes on") {
  QuestionBox box;
  const std::uint32_t number = box.begin_inquiry();
  const std::uint32_t other = box.begin_inquiry();
  box.store_answer(1, number, QuestionBox::Answer{1, {4, 3}}.serialize());
  box.store_answer(2, number, Bytes(0));  // no answer, as little as one of a rank that waits
  box.store_answer(3, number,
                   QuestionBox::Answer{3, {2}, true, 9, OpenCall{5, 6, "barrier #5"}}.serialize());
  box.store_answer(2, other + 1, Bytes(sizeof(int)));
  CHECK(box.take_answers(other).empty());
  const auto answers = box.take_answers(number);
  REQUIRE(answers.size() == 3);
  CHECK(answers[0].from == 1);
  CHECK(answers[0].waits_for == std::vector{4, 3});
  CHECK_FALSE(answers[0].gave_up);
  CHECK_FALSE(answers[0].call);
  CHECK(answers[1].from == 2);
  CHECK(answers[1].waits_for.empty());
  CHECK(answers[2].waits_for == std::vector{2});
  CHECK(answers[2].gave_up);
  CHECK(answers[2].channel == 9);
  REQUIRE(answers[2].call);
  CHECK(answers[2].call->number == 5);
  CHECK(answers[2].call->signature == 6);
  CHECK(answers[2].call->text == "barrier #5");
  Bytes wild = QuestionBox::Answer{1, {4}}.serialize();
  std::fill(wild.begin() + 8, wild.begin() + 16, std::byte{0x7f});  // of how many it speaks
  CHECK(QuestionBox::Answer::deserialize(1, wild).waits_for == std::vector{4});
  box.end_inquiry(number);
  box.store_answer(1, number, Bytes(sizeof(int)));
  CHECK(box.take_answers(number).empty());
}

TEST_CASE("a forked child does not wait for a thread that it has not got") {
  QuestionBox box;
  test::run_in_child([&] {
    const auto refused = [](const auto& call) {
      test::check_throws<UsageError>(call, "control plane", "forked child of its owner");
    };
    refused([&] { box.begin_wait(7); });
    refused([&] { box.end_wait(7); });
    refused([&] { (void)box.begin_inquiry(); });
    refused([&] { (void)box.take_answers(1); });
    test::check(box.take_questions(7).empty(), "nothing has been asked");
  });
}
