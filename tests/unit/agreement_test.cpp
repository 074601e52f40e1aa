#include <algorithm>
#include <chrono>
#include <cohort/agreement.hpp>
#include <cohort/control_plane.hpp>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "support/catch.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::test;
using namespace std::chrono_literals;

namespace {

const Intent kGrowth{
    .place = "growth of arena dcp[0]", .sequence = 3, .bytes = 4096, .history = 77};

Intent with(Intent intent, const std::function<void(Intent&)>& change) {
  change(intent);
  return intent;
}

// Ranks 0..3 as a grid of two rows (tp) and two columns (pp).
struct Grid {
  std::unique_ptr<ControlPlane> row;
  std::unique_ptr<ControlPlane> column;

  explicit Grid(ControlPlane& plane)
      : row(plane.subgroup(std::vector<int>{plane.rank() / 2 * 2, plane.rank() / 2 * 2 + 1}, 0,
                           fmt::format("tp[{}]", plane.rank() / 2))),
        column(plane.subgroup(std::vector<int>{plane.rank() % 2, plane.rank() % 2 + 2}, 0,
                              fmt::format("pp[{}]", plane.rank() % 2))) {}

  void agree(const Intent& intent) const {
    const std::vector<ControlPlane*> groups{row.get(), column.get()};
    cohort::agree(groups, intent);
  }
};

void agree_in(ControlPlane& plane, const Intent& intent) {
  ControlPlane* const group = &plane;
  agree(std::span(&group, 1), intent);
}

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

TEST_CASE("equal intents agree") {
  CHECK(!compare(std::vector<Intent>{}));
  for (const std::size_t n : {1U, 2U, 3U, 8U}) {
    CHECK(!compare(std::vector<Intent>(n, kGrowth)));
  }
}

TEST_CASE("each field that differs is found and told") {
  const auto change = GENERATE(values<std::pair<std::function<void(Intent&)>, std::string>>({
      {[](Intent& i) { i.place = "growth of arena tp[0]"; }, "rank 1 is at growth of arena tp[0]"},
      {[](Intent& i) { i.sequence = 4; }, "rank 1 is at growth of arena dcp[0] #4"},
      {[](Intent& i) { i.bytes = 8192; }, "with 8192 bytes"},
      {[](Intent& i) { i.history = 78; }, "history 000000000000004e"},
      {[](Intent& i) { i.failure = "no memory"; }, "rank 1 failed in"},
  }));
  const auto found = compare(std::vector{kGrowth, with(kGrowth, change.first), kGrowth});
  REQUIRE(found);
  CHECK(found->ranks == std::vector{1});
  CHECK_THAT(found->text, contains(change.second, "most are at growth of arena dcp[0] #3"));
}

TEST_CASE("who is not with the most is to blame; of equal sets the lowest rank's is right") {
  const auto other = with(kGrowth, [](Intent& i) { i.bytes = 1; });
  const auto third = with(kGrowth, [](Intent& i) { i.bytes = 2; });
  const auto blamed = [](const std::vector<Intent>& intents) {
    return compare(intents).value().ranks;
  };
  CHECK(blamed({other, kGrowth, kGrowth}) == std::vector{0});
  CHECK(blamed({kGrowth, other}) == std::vector{1});
  CHECK(blamed({kGrowth, kGrowth, other, other}) == std::vector{2, 3});
  CHECK(blamed({other, kGrowth, third, kGrowth}) == std::vector{0, 2});
}

TEST_CASE("an intent survives its serialisation; foreign bytes are no intent of anyone") {
  const auto intent = with(kGrowth, [](Intent& i) { i.failure = "memfd_create failed"; });
  const auto back = detail::deserialize(detail::serialize(intent));
  CHECK(back.place == intent.place);
  CHECK(back.sequence == intent.sequence);
  CHECK(back.bytes == intent.bytes);
  CHECK(back.history == intent.history);
  CHECK(back.failure == intent.failure);
  const auto foreign = compare(std::vector{kGrowth, detail::deserialize(Bytes(5))});
  REQUIRE(foreign);
  CHECK(foreign->ranks == std::vector{1});
  // A length beyond the message must not be read.
  Bytes wild = detail::serialize(kGrowth);
  std::fill(wild.begin() + 24, wild.begin() + 32, std::byte{0xff});
  CHECK(detail::deserialize(wild).place == kGrowth.place);
}

TEST_CASE("ranks that intend the same go on") {
  const int n = GENERATE(1, 2, 3, 4, 8);
  run_ranks(n, [](ControlPlane& plane) {
    for (std::uint64_t sequence = 0; sequence < 5; ++sequence) {
      agree_in(plane, with(kGrowth, [&](Intent& i) { i.sequence = sequence; }));
    }
    plane.barrier();
  });
}

TEST_CASE("every rank gets the error that names who differs, and the group works on") {
  const int n = GENERATE(2, 3, 4, 8);
  run_ranks(n, [&](ControlPlane& plane) {
    const bool odd = plane.rank() == n - 1;
    try {
      agree_in(plane, with(kGrowth, [&](Intent& i) { i.bytes = odd ? 1 : 2; }));
      check(false, "agree throws");
    } catch (const SymmetryError& error) {
      check(error.ranks() == std::vector{n - 1}, "who differs");
      check_throws<SymmetryError>([] { throw; }, "growth of arena dcp[0]", "group world",
                                  fmt::format("rank {} is at", n - 1), "with 1 bytes");
    }
    agree_in(plane, kGrowth);
    plane.barrier();
  });
}

TEST_CASE("a rank that failed tells why, itself included") {
  run_ranks(3, [](ControlPlane& plane) {
    const auto intent = with(
        kGrowth, [&](Intent& i) { i.failure = plane.rank() == 0 ? "cannot allocate 4096" : ""; });
    check_throws<SymmetryError>([&] { agree_in(plane, intent); }, "rank 0 failed",
                                "cannot allocate 4096");
  });
}

TEST_CASE("a rank that never comes is named on every rank that did, with the place") {
  const auto start = Clock::now();
  run_ranks(
      4,
      [](ControlPlane& plane) {
        if (plane.rank() != 2) {
          check_throws<TimeoutError>([&] { agree_in(plane, kGrowth); }, "growth of arena dcp[0] #3",
                                     "rank 2 did not arrive");
        }
      },
      300ms);
  CHECK(seconds_since(start) < 10);
}

TEST_CASE("a rank that comes after the others have given up does not go on alone") {
  run_ranks(
      2,
      [](ControlPlane& plane) {
        if (plane.rank() == 1) {
          std::this_thread::sleep_for(600ms);
        }
        check_throws<TimeoutError>([&] { agree_in(plane, kGrowth); }, "growth of arena dcp[0]",
                                   fmt::format("rank {} did not", 1 - plane.rank()));
      },
      200ms);
}

TEST_CASE("several groups agree") {
  run_ranks(4, [](ControlPlane& plane) {
    const Grid grid(plane);
    grid.agree(kGrowth);
    grid.agree(with(kGrowth, [](Intent& i) { i.sequence = 4; }));
    plane.barrier();
  });
}

TEST_CASE("a verdict reaches ranks that share no group with the one that differs") {
  const int odd = GENERATE(0, 1, 2, 3);
  run_ranks(4, [&](ControlPlane& plane) {
    const Grid grid(plane);
    const auto intent =
        with(kGrowth, [&](Intent& i) { i.failure = plane.rank() == odd ? "out of memory" : ""; });
    check_throws<SymmetryError>([&] { grid.agree(intent); }, "growth of arena dcp[0]",
                                "out of memory");
    // Everybody took part in every exchange, so the groups are still in step.
    grid.agree(kGrowth);
  });
}

TEST_CASE("several groups: a rank that never comes ends in an error everywhere, blaming it alone") {
  const int absent = GENERATE(0, 3);
  const auto start = Clock::now();
  run_ranks(
      4,
      [&](ControlPlane& plane) {
        if (plane.rank() == absent) {
          return;
        }
        const Grid grid(plane);
        const int row = absent / 2;
        const int column = absent % 2;
        try {
          grid.agree(kGrowth);
          check(false, "agree throws");
        } catch (const TimeoutError& error) {
          const bool in_row = plane.rank() / 2 == row;
          check(in_row || plane.rank() % 2 == column, "only its peers wait for the absent rank");
          check(error.missing() == std::vector{in_row ? absent % 2 : absent / 2}, "who is missing");
        } catch (const SymmetryError& error) {
          check(std::string(error.what()).find("did not arrive") != std::string::npos,
                "the quoted message tells of the absent rank");
          check(std::string(error.what()).find(fmt::format("group tp[{}]", row)) !=
                        std::string::npos ||
                    std::string(error.what()).find(fmt::format("group pp[{}]", column)) !=
                        std::string::npos,
                "the quoted message tells the group");
        }
      },
      400ms);
  CHECK(seconds_since(start) < 10);
}

TEST_CASE("a group that is out of step spoils the agreement of the others too") {
  run_ranks(4, [](ControlPlane& plane) {
    const Grid grid(plane);
    if (plane.rank() == 0) {
      check_throws<SymmetryError>([&] { grid.row->barrier(); }, "rank 1 is in all_gather");
      const std::vector<ControlPlane*> column{grid.row.get(), grid.column.get()};
      check_throws<TransportError>([&] { agree(column, kGrowth); }, "an earlier call");
    } else {
      check_throws<SymmetryError>([&] { grid.agree(kGrowth); }, "growth of arena dcp[0]");
    }
  });
}
