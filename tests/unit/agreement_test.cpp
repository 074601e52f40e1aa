// SPDX-License-Identifier: Apache-2.0
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
      {[](Intent& i) { i.failure = "no memory"; }, "rank 1 failed: no memory"},
  }));
  const auto found = compare(std::vector{kGrowth, with(kGrowth, change.first), kGrowth});
  REQUIRE(found);
  CHECK(found->ranks == std::vector{1});
  CHECK_THAT(found->text, contains(change.second));
  const bool elsewhere = found->text.find("failed") == std::string::npos;
  CHECK((found->text.find("most are at growth of arena dcp[0] #3") != std::string::npos) ==
        elsewhere);
}

TEST_CASE("ranks that fail alike are told in one breath") {
  const auto failed = [](const std::string& why) {
    return with(kGrowth, [&](Intent& i) { i.failure = why; });
  };
  const auto text = [](const std::vector<Intent>& intents) {
    return compare(intents).value().text;
  };
  CHECK(text({failed("no memory"), failed("no memory")}) == "every rank failed: no memory");
  CHECK(text({failed("no memory"), kGrowth, failed("no memory")}) == "rank 0, 2 failed: no memory");
  CHECK(text({failed("no memory"), failed("no file"), failed("no memory")}) ==
        "rank 0, 2 failed: no memory; rank 1 failed: no file");
  // Failing elsewhere is both.
  const auto both = with(failed("no memory"), [](Intent& i) { i.sequence = 4; });
  const auto found = compare(std::vector{kGrowth, both, kGrowth}).value();
  CHECK(found.ranks == std::vector{1});
  CHECK_THAT(found.text, contains("most are at growth of arena dcp[0] #3", "rank 1 is at",
                                  "rank 1 failed: no memory"));
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
      agree(plane, with(kGrowth, [&](Intent& i) { i.sequence = sequence; }));
    }
    plane.barrier();
  });
}

TEST_CASE("every rank gets the error that names who differs, and the group works on") {
  const int n = GENERATE(2, 3, 4, 8);
  run_ranks(n, [&](ControlPlane& plane) {
    const bool odd = plane.rank() == n - 1;
    try {
      agree(plane, with(kGrowth, [&](Intent& i) { i.bytes = odd ? 1 : 2; }));
      check(false, "agree throws");
    } catch (const SymmetryError& error) {
      check(error.ranks() == std::vector{n - 1}, "who differs");
      check_throws<SymmetryError>([] { throw; }, "growth of arena dcp[0]", "group world",
                                  fmt::format("rank {} is at", n - 1), "with 1 bytes");
    }
    agree(plane, kGrowth);
    plane.barrier();
  });
}

TEST_CASE("a rank that failed throws its own error, and the others quote it") {
  run_ranks(3, [](ControlPlane& plane) {
    if (plane.rank() == 0) {
      const auto own = std::make_exception_ptr(
          TransportError({.call = "memfd_create", .native_code = 12}, "cannot allocate 4096"));
      try {
        agree(plane, kGrowth, own);
        check(false, "agree throws");
      } catch (const TransportError& error) {
        check_equal(error.site().native_code, 12L, "the native code");
      }
    } else {
      check_throws<SymmetryError>([&] { agree(plane, kGrowth); }, "growth of arena dcp[0]",
                                  "rank 0 failed", "code 12", "cannot allocate 4096");
    }
    agree(plane, kGrowth);  // all have come, so the group works on
  });
}

TEST_CASE("a failure is known although the agreement itself times out") {
  const auto start = Clock::now();
  run_ranks(
      3,
      [](ControlPlane& plane) {
        if (plane.rank() == 0) {
          check_throws<TransportError>(
              [&] {
                agree(plane, kGrowth,
                      std::make_exception_ptr(TransportError({.call = "call"}, "the real cause")));
              },
              "the real cause");
        } else if (plane.rank() == 1) {
          try {
            agree(plane, kGrowth);
            check(false, "agree throws");
          } catch (const TimeoutError& error) {
            check(error.missing() == std::vector{2}, "who is missing");
            check_throws<TimeoutError>([] { throw; }, "growth of arena dcp[0] #3",
                                       "rank 2 did not arrive", "rank 0 failed", "the real cause");
          }
        }
      },
      500ms);
  CHECK(seconds_since(start) < 10);
}

TEST_CASE("after a time-out of its own a rank waits for nobody, quotes others and is quoted") {
  const auto start = Clock::now();
  run_ranks(
      3,
      [](ControlPlane& plane) {
        if (plane.rank() == 0) {  // has failed at once
          check_throws<TransportError>(
              [&] {
                agree(plane, kGrowth,
                      std::make_exception_ptr(TransportError({.call = "call"}, "the real cause")));
              },
              "the real cause");
        } else if (plane.rank() == 1) {  // has waited for long in the same step
          std::this_thread::sleep_for(1s);
          const auto own = std::make_exception_ptr(TimeoutError("call did not return", {}));
          const auto began = Clock::now();
          check_throws<TimeoutError>([&] { agree(plane, kGrowth, own); }, "call did not return",
                                     "rank 0 failed", "the real cause");
          check(seconds_since(began) < 10, "waits for nobody");
        } else {  // never comes
          std::this_thread::sleep_for(2s);
          try {
            agree(plane, kGrowth);
            check(false, "threw");
          } catch (const TimeoutError& error) {  // of the type of the first cause
            check(error.missing() == std::vector{1}, error.what());
            check_throws<TimeoutError>([&] { throw; }, "rank 1 gave up", "call did not");
          }
        }
      },
      20s);
  CHECK(seconds_since(start) < 10);
}

TEST_CASE("a rank that never comes is named on every rank that did, with the place") {
  const auto start = Clock::now();
  run_ranks(
      4,
      [](ControlPlane& plane) {
        if (plane.rank() != 2) {
          check_throws<TimeoutError>([&] { agree(plane, kGrowth); }, "growth of arena dcp[0] #3",
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
        check_throws<TimeoutError>([&] { agree(plane, kGrowth); }, "growth of arena dcp[0]",
                                   "rank 1 did not");
      },
      200ms);
}
