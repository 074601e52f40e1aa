// SPDX-License-Identifier: Apache-2.0
#include "cohort/notice_board.hpp"

#include <optional>
#include <span>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using namespace cohort::detail;

namespace {

const std::vector<int> kOthers{1, 2};

}  // namespace

TEST_CASE("a notice concerns the calls of its group that its rank had part in and not finished") {
  NoticeBoard board(0);
  CHECK_FALSE(board.any());
  CHECK_FALSE(board.first({7, kOthers, std::nullopt}));
  board.note(7, 1, 4, Bytes(5));
  CHECK(board.any());
  CHECK_FALSE(board.first({7, kOthers, 3}));
  CHECK(board.first({7, kOthers, 4}).value().reason.size() == 5);
  CHECK(board.first({7, kOthers, 5}).value().from == 1);
  CHECK(board.first({7, kOthers, std::nullopt}).value().sequence == 4);
  CHECK_FALSE(board.first({7, std::span(kOthers).subspan(1), std::nullopt}));
  CHECK_FALSE(board.first({8, kOthers, 5}));
  board.note(7, 2, 0, Bytes(6));
  CHECK(board.first({7, kOthers, 3}).value().from == 2);
  CHECK(board.first({7, kOthers, 4}).value().from == 1);  // the first of them
}

TEST_CASE("numbers of calls wrap around") {
  NoticeBoard board(0);
  board.note(7, 1, 0xffffffffU, {});
  CHECK_FALSE(board.first({7, kOthers, 0xfffffffeU}));
  CHECK(board.first({7, kOthers, 0xffffffffU}));
  CHECK(board.first({7, kOthers, 3}));
}

TEST_CASE("what this rank says concerns each of its calls, once, and is not counted") {
  NoticeBoard board(0);
  CHECK(board.note_own(7, Bytes(3)));
  CHECK(board.any());
  CHECK_FALSE(board.note_own(7, Bytes(4)));
  CHECK(board.note_own(8, Bytes(4)));
  CHECK(board.first({7, {}, 0}).value().reason.size() == 3);
  CHECK(board.first({8, {}, 0xffffffffU}).value().from == 0);
  CHECK(board.held() == 0);
  board.note(7, 2, 1, {});
  CHECK(board.held() == 1);
}

TEST_CASE("a group that has ended is forgotten alone") {
  NoticeBoard board(0);
  board.note(7, 1, 0, {});
  board.note(8, 1, 0, {});
  board.forget(7);
  board.forget(9);
  CHECK_FALSE(board.first({7, kOthers, std::nullopt}));
  CHECK(board.first({8, kOthers, std::nullopt}));
  CHECK(board.any());
  board.forget(8);
  CHECK_FALSE(board.any());
  CHECK_FALSE(board.first({8, kOthers, std::nullopt}));
  CHECK(board.held() == 0);
}
