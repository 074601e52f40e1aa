// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cohort/error.hpp"

/// \file
/// The words of a command line: names, sizes, counts and lists of them. Pure.

namespace cohort::bench {

/// A value of an option with its name on the command line and in rows.
template <class T>
struct Named {
  T value;
  std::string_view name;
};
template <class T>
Named(T, const char*) -> Named<T>;

namespace detail {

template <class T, std::size_t N>
[[nodiscard]] constexpr std::string_view name_in(const std::array<Named<T>, N>& table, T value) {
  for (const auto& entry : table) {
    if (entry.value == value) {
      return entry.name;
    }
  }
  return "unknown";
}

template <class T, std::size_t N>
[[nodiscard]] std::string names(const std::array<Named<T>, N>& table, std::string_view separator) {
  std::string text;
  for (const auto& entry : table) {
    text += (text.empty() ? std::string_view{} : separator);
    text += entry.name;
  }
  return text;
}

template <class T, std::size_t N>
[[nodiscard]] std::vector<T> values(const std::array<Named<T>, N>& table) {
  std::vector<T> all;
  for (const auto& entry : table) {
    all.push_back(entry.value);
  }
  return all;
}

/// "64", "2K", "4MiB", "1G".
[[nodiscard]] inline std::int64_t parse_size(std::string_view option, std::string_view text) {
  std::int64_t value = 0;
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  std::string_view suffix(stop, static_cast<std::size_t>(end - stop));
  int shift = 0;
  for (const auto& [letter, bits] : {std::pair{'K', 10}, {'M', 20}, {'G', 30}}) {
    if (!suffix.empty() && suffix.front() == letter) {
      shift = bits;
      suffix.remove_prefix(1);
      if (suffix == "iB") {
        suffix = {};
      }
      break;
    }
  }
  const bool fits = value <= (std::numeric_limits<std::int64_t>::max() >> shift);
  if (error != std::errc{} || !suffix.empty() || value < 1 || !fits) {
    throw ConfigError(
        fmt::format("{}: expected a size such as 2048, 2K or 4M, got \"{}\"", option, text));
  }
  return value << shift;
}

[[nodiscard]] inline std::int64_t parse_count(std::string_view option, std::string_view text,
                                              std::int64_t min, std::int64_t max) {
  std::int64_t value = 0;
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (text.empty() || error != std::errc{} || stop != end || value < min || value > max) {
    throw ConfigError(
        fmt::format("{}: expected an integer from {} to {}, got \"{}\"", option, min, max, text));
  }
  return value;
}

[[nodiscard]] inline std::vector<std::string_view> split_list(std::string_view text) {
  std::vector<std::string_view> parts;
  while (true) {
    const auto comma = text.find(',');
    parts.push_back(text.substr(0, comma));
    if (comma == std::string_view::npos) {
      return parts;
    }
    text.remove_prefix(comma + 1);
  }
}

template <class T, std::size_t N>
[[nodiscard]] T parse_name(std::string_view option, std::string_view text,
                           const std::array<Named<T>, N>& table) {
  for (const auto& entry : table) {
    if (entry.name == text) {
      return entry.value;
    }
  }
  throw ConfigError(fmt::format("{}: expected {}, got \"{}\"", option, names(table, ", "), text));
}

template <class T, std::size_t N>
[[nodiscard]] std::vector<T> parse_names(std::string_view option, std::string_view text,
                                         const std::array<Named<T>, N>& table) {
  std::vector<T> chosen;
  if (text == "all") {
    return values(table);
  }
  for (const auto part : split_list(text)) {
    const T value = parse_name(option, part, table);
    if (std::find(chosen.begin(), chosen.end(), value) == chosen.end()) {
      chosen.push_back(value);
    }
  }
  return chosen;
}

}  // namespace detail

}  // namespace cohort::bench
