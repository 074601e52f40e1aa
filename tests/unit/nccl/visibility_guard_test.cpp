#include "cohort/nccl/visibility_guard.hpp"

#include "support/catch.hpp"

using cohort::has_visibility_fault;
using cohort::needs_visibility_guard;

TEST_CASE("the fault is in NCCL 2.28.0 up to, but not including, 2.30.7", "[visibility_guard]") {
  for (const int version : {22800, 22803, 22809, 22900, 22907, 23000, 23006}) {
    CAPTURE(version);
    CHECK(has_visibility_fault(version));
  }
  for (const int version : {21805, 22700, 22799, 23007, 23008, 23100, 30000}) {
    CAPTURE(version);
    CHECK_FALSE(has_visibility_fault(version));
  }
}

TEST_CASE("only calls on the symmetric path need the guard", "[visibility_guard]") {
  constexpr int kFaulty = 22803;
  constexpr int kSound = 23007;
  for (const bool in : {false, true}) {
    for (const bool out : {false, true}) {
      CAPTURE(in, out);
      CHECK(needs_visibility_guard(kFaulty, in, out) == (in && out));
      CHECK_FALSE(needs_visibility_guard(kSound, in, out));
    }
  }
}

TEST_CASE("the decision can be made by the compiler", "[visibility_guard]") {
  STATIC_REQUIRE(needs_visibility_guard(22800, true, true));
  STATIC_REQUIRE_FALSE(needs_visibility_guard(22707, true, true));
}
