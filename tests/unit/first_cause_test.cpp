// SPDX-License-Identifier: Apache-2.0
#include "cohort/first_cause.hpp"

#include <exception>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using namespace cohort::detail;

namespace {

constexpr int kSelf = 1;

/// An error as those who catch it see it.
struct Seen {
  std::string type;
  std::string text;
  std::vector<int> ranks = {};  ///< Missing or differing; or who found it.
  long code = 0;

  bool operator==(const Seen&) const = default;
};

Seen seen(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const TimeoutError& late) {
    return {"timeout", late.what(), late.missing()};
  } catch (const SymmetryError& unlike) {
    return {"symmetry", unlike.what(), unlike.ranks()};
  } catch (const TransportError& broken) {
    return {"transport", broken.what(), {broken.site().rank}, broken.site().native_code};
  } catch (const Error& other) {
    return {"other", other.what()};
  }
}

/// What another rank that is told `why` throws.
Seen told(const GiveUp& why) {
  try {
    GiveUp::deserialize(why.serialize()).raise("notice", "tp[0]");
  } catch (const Error&) {
    return seen(std::current_exception());
  }
}

std::exception_ptr of_nccl() {
  return std::make_exception_ptr(TransportError(
      {.call = "ncclAllReduce", .native_code = 6, .rank = kSelf, .group = "tp[0]"}, "remote"));
}
const std::string kOfNccl = "ncclAllReduce failed with code 6 in group tp[0] on rank 1: remote";

std::exception_ptr late() { return std::make_exception_ptr(TimeoutError("still busy", {})); }

FirstCause decide(const FailedWait& failed) { return first_cause(failed, kSelf, "wait", "tp[0]"); }

const std::vector<Suspect> kSuspects{Suspect::named, Suspect::self, Suspect::others};

}  // namespace

TEST_CASE("what has been said is passed on as it is, whatever was found out besides") {
  const std::vector<GiveUp> all{
      GiveUp::by(2, "the KV cache is exhausted"),
      GiveUp::because(std::make_exception_ptr(TimeoutError("rank 0 did not come", {0})), 2),
      GiveUp::because(std::make_exception_ptr(TransportError({"send", 32}, "its card is gone")), 2),
      GiveUp::because(std::make_exception_ptr(SymmetryError("ranks disagree", {0, 2})), 2)};
  for (const GiveUp& said : all) {
    for (const Suspect suspect : kSuspects) {
      for (const std::vector<int>& gone : {std::vector<int>{}, {2}, {0, 2}}) {
        for (const std::exception_ptr& error : {of_nccl(), late()}) {
          const FirstCause first = decide({error, suspect, said, gone});
          CHECK(first.why.serialize() == said.serialize());
          const Seen thrown = seen(first.error);
          CHECK(thrown.type == told(said).type);
          CHECK(thrown.ranks == told(said).ranks);
          CHECK(thrown.code == told(said).code);
          CHECK_THAT(thrown.text, Catch::Contains(said.text));
        }
      }
    }
  }
}

TEST_CASE("ranks that are gone are named by who throws and by whom it tells") {
  for (const Suspect suspect : {Suspect::self, Suspect::others}) {
    const Seen one{"timeout", kOfNccl + "; the process of rank 2 is gone", {2}};
    const FirstCause first = decide({of_nccl(), suspect, {}, {2}});
    CHECK(seen(first.error) == one);
    CHECK(told(first.why) == Seen{"timeout", "rank 1 gave up: " + one.text, {2}});

    const Seen two{"timeout", "still busy; the process of rank 0, 2 is gone", {0, 2}};
    const FirstCause both = decide({late(), suspect, {}, {0, 2}});
    CHECK(seen(both.error) == two);
    CHECK(told(both.why) == Seen{"timeout", "rank 1 gave up: " + two.text, {0, 2}});
  }
}

TEST_CASE("an error that knows whom to name keeps its names though others are gone") {
  const auto named = std::make_exception_ptr(TimeoutError("rank 0 did not come", {0}));
  const FirstCause first = decide({named, Suspect::named, {}, {2}});
  CHECK(seen(first.error) == Seen{"timeout", "rank 0 did not come", {0}});
  CHECK(told(first.why) == Seen{"timeout", "rank 1 gave up: rank 0 did not come", {0}});
}

TEST_CASE("where nobody is known to be gone the error stays, and blames the finder for its own") {
  for (const Suspect suspect : kSuspects) {
    const FirstCause first = decide({of_nccl(), suspect, {}, {}});
    CHECK(seen(first.error) == Seen{"transport", kOfNccl, {kSelf}, 6});
    CHECK(told(first.why).type == "transport");
    CHECK(told(first.why).code == 6);
    CHECK(first.why.finder == kSelf);
    CHECK(first.why.ranks ==
          (suspect == Suspect::others ? std::vector<int>{} : std::vector<int>{kSelf}));

    const FirstCause waited = decide({late(), suspect, {}, {}});
    CHECK(seen(waited.error) == Seen{"timeout", "still busy"});
    CHECK(told(waited.why) == Seen{"timeout", "rank 1 gave up: still busy", waited.why.ranks});
    CHECK(waited.why.ranks ==
          (suspect == Suspect::others ? std::vector<int>{} : std::vector<int>{kSelf}));
  }
}
