// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cohort/give_up.hpp>
#include <cstddef>
#include <exception>
#include <string>

#include "support/catch.hpp"

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
    CHECK_THAT(std::string(error.what()), contains("group tp[0]", "rank 1 gave up", "broken pipe"));
  }
  // Bytes that are no reason are none of anyone's memory.
  CHECK_THROWS_AS(detail::GiveUp::deserialize(Bytes(5)).raise("barrier", "g"), SymmetryError);
  Bytes wild = why.serialize();
  std::fill(wild.begin() + 12, wild.begin() + 16, std::byte{0x7f});
  CHECK_THROWS_AS(detail::GiveUp::deserialize(wild).raise("barrier", "g"), Error);
  CHECK(detail::GiveUp{.text = std::string(100'000, 'x')}.serialize().size() < 4096);
}
