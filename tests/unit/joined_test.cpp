// SPDX-License-Identifier: Apache-2.0
#include <cohort/joined.hpp>
#include <cstdint>
#include <span>
#include <vector>

#include "support/catch.hpp"

using cohort::detail::joined;

TEST_CASE("numbers are joined in order, with separators only between them", "[joined]") {
  CHECK(joined(std::vector<int>{}, ", ").empty());
  CHECK(joined(std::vector{7}, ", ") == "7");
  const std::vector<std::int64_t> numbers{-1, 0, std::int64_t{1} << 40};
  CHECK(joined(std::span<const std::int64_t>(numbers), ",") == "-1,0,1099511627776");
}
