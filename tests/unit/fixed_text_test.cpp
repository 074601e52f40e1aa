// SPDX-License-Identifier: Apache-2.0
#include "cohort/fixed_text.hpp"

#include <array>
#include <cstddef>
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

TEST_CASE("a text is not cut within a character", "[fixed_text]") {
  using cohort::detail::cut_text;
  const std::string text = "a\xc3\xa4\xe2\x82\xac\xf0\x9f\x98\x80";  // 1, 2, 3 and 4 bytes
  const std::array<std::size_t, 11> kept{0, 1, 1, 3, 3, 3, 6, 6, 6, 6, 10};
  for (std::size_t bytes = 0; bytes < kept.size(); ++bytes) {
    CHECK(cut_text(text, bytes).size() == kept[bytes]);
  }
  CHECK(cut_text("\x80\x80\x80\x80\x80\x80", 5).size() == 2);  // no text at all
}
