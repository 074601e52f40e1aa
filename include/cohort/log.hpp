// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <cstdio>
#include <exception>
#include <functional>
#include <mutex>
#include <string_view>
#include <utility>

#include "cohort/process_state.hpp"

/// \file
/// The library's few messages: one information line and at most one warning for each group, and
/// what a destructor could not throw. An engine routes them into its own log with `set_log_sink`.

namespace cohort {

/// How much a message matters.
enum class LogLevel { info, warning, error };

/// Such as "warning".
[[nodiscard]] constexpr std::string_view to_string(LogLevel level) noexcept {
  switch (level) {
    case LogLevel::info:
      return "info";
    case LogLevel::warning:
      return "warning";
    case LogLevel::error:
      return "error";
  }
  return "unknown";
}

/// Receives each message. Called under a lock, one message at a time; must not throw.
using LogSink = std::function<void(LogLevel, std::string_view)>;

namespace detail {

struct LogState {
  std::mutex mutex;
  LogLevel default_threshold = LogLevel::warning;
  LogSink sink = [this](LogLevel level, std::string_view text) {
    if (level >= default_threshold) {
      std::fprintf(stderr, "cohort: %s: %.*s\n", to_string(level).data(),
                   static_cast<int>(text.size()), text.data());
    }
  };
};

/// Never destroyed: destructors of static objects may still log.
inline LogState& log_state() { return process_wide<LogState>("log 1"); }

}  // namespace detail

/// Least level that the default sink prints; at first `warning`. An installed sink gets all
/// messages. `ParallelState::create` sets it from `COHORT_LOG`, where that is set. Thread-safe.
inline void set_default_log_level(LogLevel level) {
  auto& state = detail::log_state();
  const std::lock_guard lock(state.mutex);
  state.default_threshold = level;
}

/// Replaces the sink and returns the one before. The default prints to stderr what
/// `set_default_log_level` lets through. Thread-safe.
inline LogSink set_log_sink(LogSink sink) {
  auto& state = detail::log_state();
  const std::lock_guard lock(state.mutex);
  return std::exchange(state.sink, std::move(sink));
}

/// Sends one message to the sink. Thread-safe; never throws, so destructors may call it.
inline void log(LogLevel level, std::string_view text) noexcept {
  try {
    auto& state = detail::log_state();
    const std::lock_guard lock(state.mutex);
    if (state.sink) {
      state.sink(level, text);
    }
  } catch (...) {
    std::fputs("cohort: error: the log sink threw\n", stderr);
  }
}

/// The same of a format and its arguments; where no text can be made of them, as without memory, of
/// the format.
template <class First, class... More>
void log(LogLevel level, fmt::format_string<First, More...> format, First&& first,
         More&&... more) noexcept {
  const fmt::string_view words = format;
  try {
    fmt::memory_buffer text;
    fmt::format_to(fmt::appender(text), format, std::forward<First>(first),
                   std::forward<More>(more)...);
    log(level, std::string_view(text.data(), text.size()));
  } catch (const std::exception&) {
    log(level, std::string_view(words.data(), words.size()));
  }
}

}  // namespace cohort
