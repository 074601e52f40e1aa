// SPDX-License-Identifier: Apache-2.0
#include "cohort/fixed_text.hpp"

#include <array>
#include <string>

#include "support/catch.hpp"

using cohort::detail::copy_text;
using cohort::detail::text_of;

TEST_CASE("texts of fixed size end within their bounds", "[fixed_text]") {
  std::array<char, 4> text{};
  CHECK(text_of(text).empty());
  copy_text("ab", text);
  CHECK(text_of(text) == "ab");
  copy_text("abcdef", text);
  CHECK(text_of(text) == "abc");
  copy_text("", text);
  CHECK(text_of(text).empty());
  text.fill('x');  // what no honest sender writes
  CHECK(text_of(text) == "xxxx");
}
