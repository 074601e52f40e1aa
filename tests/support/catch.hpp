// SPDX-License-Identifier: Apache-2.0
#pragma once

/// \file
/// Catch2, 2.13 or 3, behind one include. Tests use Catch's macros, and the names of
/// `cohort::test` for what the two versions call differently.

#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>
#endif

#include <exception>
#include <string>
#include <string_view>
#include <vector>

#include "support/skip.hpp"

namespace cohort::test {

#if __has_include(<catch2/catch_all.hpp>)
using Catch::Approx;
template <class T>
using MatcherBase = Catch::Matchers::MatcherBase<T>;
#else
using Catch::Detail::Approx;  // Catch::Approx is a matcher in Catch2 2
template <class T>
using MatcherBase = Catch::MatcherBase<T>;
#endif

/// Matches a string that contains every part.
class ContainsAll : public MatcherBase<std::string> {
 public:
  explicit ContainsAll(std::vector<std::string> parts) : parts_(std::move(parts)) {}

  bool match(const std::string& text) const override {
    for (const auto& part : parts_) {
      if (text.find(part) == std::string::npos) {
        return false;
      }
    }
    return true;
  }

 protected:
  std::string describe() const override {
    std::string text = "contains";
    for (const auto& part : parts_) {
      text += " \"" + part + "\"";
    }
    return text;
  }

 private:
  std::vector<std::string> parts_;
};

/// Matches an exception whose message contains every part: for
/// `CHECK_THROWS_MATCHES(f(), cohort::UsageError, says("dim", "expected 0 to 2", "3"))`.
class Says : public MatcherBase<std::exception> {
 public:
  explicit Says(std::vector<std::string> parts) : text_(std::move(parts)) {}

  bool match(const std::exception& error) const override { return text_.match(error.what()); }

 protected:
  std::string describe() const override { return "says: " + text_.toString(); }

 private:
  ContainsAll text_;
};

template <class... Parts>
[[nodiscard]] ContainsAll contains(Parts&&... parts) {
  return ContainsAll({std::string(std::forward<Parts>(parts))...});
}

template <class... Parts>
[[nodiscard]] Says says(Parts&&... parts) {
  return Says({std::string(std::forward<Parts>(parts))...});
}

}  // namespace cohort::test
