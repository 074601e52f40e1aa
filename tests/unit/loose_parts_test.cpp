// SPDX-License-Identifier: Apache-2.0
#include "cohort/loose_parts.hpp"

#include <array>

#include "support/catch.hpp"

using namespace cohort;

TEST_CASE("bytes lie in loose parts where any of them does", "[arena]") {
  std::array<char, 1000> memory{};
  LooseParts parts;
  CHECK_FALSE(parts.hold(memory.data(), 1000));
  parts.add(&memory[100], 200);
  parts.add(&memory[500], 100);
  CHECK(parts.hold(memory.data(), 1000));
  CHECK(parts.hold(&memory[299], 1));
  CHECK(parts.hold(&memory[50], 51));
  CHECK(parts.hold(&memory[150], 10));
  CHECK_FALSE(parts.hold(&memory[300], 200));
  CHECK_FALSE(parts.hold(memory.data(), 100));
  CHECK_FALSE(parts.hold(&memory[600], 400));
  parts.remove(&memory[100]);
  CHECK_FALSE(parts.hold(&memory[100], 200));
  CHECK(parts.hold(&memory[100], 401));
  parts.remove(&memory[101]);  // where none begins
  parts.remove(&memory[500]);
  CHECK_FALSE(parts.hold(memory.data(), 1000));
}
