// SPDX-License-Identifier: Apache-2.0
#include <cohort/error.hpp>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using cohort::test::says;

namespace {

std::string error_words() {
  return "rank 1 gave up: send failed with code 3 on rank 1: broken pipe";
}

}  // namespace

TEST_CASE("every exception is an Error, and an Error is a runtime_error", "[error]") {
  STATIC_REQUIRE(std::is_base_of_v<std::runtime_error, Error>);
  STATIC_REQUIRE(std::is_base_of_v<Error, ConfigError>);
  STATIC_REQUIRE(std::is_base_of_v<Error, UsageError>);
  STATIC_REQUIRE(std::is_base_of_v<Error, TransportError>);
  STATIC_REQUIRE(std::is_base_of_v<Error, SymmetryError>);
  STATIC_REQUIRE(std::is_base_of_v<Error, TimeoutError>);
}

TEST_CASE("kinds of error do not catch one another", "[error]") {
  STATIC_REQUIRE_FALSE(std::is_base_of_v<UsageError, ConfigError>);
  STATIC_REQUIRE_FALSE(std::is_base_of_v<TransportError, TimeoutError>);
  STATIC_REQUIRE_FALSE(std::is_base_of_v<SymmetryError, TimeoutError>);
  bool caught_as_error = false;
  try {
    throw UsageError("dim: expected 0 to 2, got 3");
  } catch (const ConfigError&) {
    FAIL("a UsageError was caught as a ConfigError");
  } catch (const Error& error) {
    caught_as_error = true;
    CHECK(std::string(error.what()) == "dim: expected 0 to 2, got 3");
  }
  CHECK(caught_as_error);
}

TEST_CASE("exceptions can be copied without throwing, as throwing them requires", "[error]") {
  STATIC_REQUIRE(std::is_copy_constructible_v<TransportError>);
  STATIC_REQUIRE(std::is_copy_constructible_v<SymmetryError>);
  STATIC_REQUIRE(std::is_copy_constructible_v<TimeoutError>);
}

TEST_CASE("a TransportError says which call failed, how and where", "[error]") {
  const TransportError error(
      {.call = "ncclAllGather", .native_code = 3, .rank = 5, .group = "dcp1"}, "internal error");
  CHECK(std::string(error.what()) ==
        "ncclAllGather failed with code 3 in group dcp1 on rank 5: internal error");
  CHECK(std::string(error.detail()) == "internal error");
  CHECK(error.site().call == "ncclAllGather");
  CHECK(error.site().native_code == 3);
  CHECK(error.site().rank == 5);
  CHECK(error.site().group == "dcp1");
}

TEST_CASE("what another rank said is said once", "[error]") {
  const auto error = TransportError::relayed({.call = "wait", .native_code = 3}, error_words());
  CHECK(std::string(error.what()) == error_words());
  CHECK(std::string(error.detail()) == error_words());
  CHECK(error.site().native_code == 3);
}

TEST_CASE("a TransportError without a group leaves group and rank out", "[error]") {
  const TransportError error({.call = "mmap", .native_code = 12}, "Cannot allocate memory");
  CHECK(std::string(error.what()) == "mmap failed with code 12: Cannot allocate memory");
  CHECK(error.site().rank == -1);
  CHECK(error.site().group.empty());
}

TEST_CASE("rank 0 and negative native codes are named", "[error]") {
  const TransportError error({.call = "poll", .native_code = -1, .rank = 0}, "interrupted");
  CHECK(std::string(error.what()) == "poll failed with code -1 on rank 0: interrupted");
}

TEST_CASE("SymmetryError and TimeoutError keep the ranks they are about", "[error]") {
  const SymmetryError differs("rank 2 allocated 4096 bytes", {2});
  CHECK(differs.ranks() == std::vector{2});
  CHECK_THROWS_MATCHES(throw differs, SymmetryError, says("rank 2", "4096"));

  const TimeoutError late("barrier: ranks 1 and 3 did not arrive", {1, 3});
  CHECK(late.missing() == std::vector{1, 3});
  CHECK(TimeoutError("stream", {}).missing().empty());
  CHECK_THROWS_MATCHES(throw late, TimeoutError, says("barrier", "1 and 3"));
}
