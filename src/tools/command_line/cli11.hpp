// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <CLI/CLI.hpp>
#include <sstream>
#include <string>

#include "command_line/command_line.hpp"

namespace cohort::tools {

/// What a program with CLI11 says instead of running, and its exit status: 0 for help, 2 for what
/// cannot be understood. CLI11 itself names no near option.
struct Refusal {
  std::string text;
  int status = 0;
};

[[nodiscard]] inline Refusal refusal(const CLI::App& app, const CLI::ParseError& error) {
  std::ostringstream out;
  const int status = app.exit(error, out, out);
  if (status == static_cast<int>(CLI::ExitCodes::ExtrasError)) {
    for (const std::string& word : app.remaining()) {  // options, and what were to be their values
      if (word.starts_with("--")) {
        return {no_such_option(word, app.help()) + "\n", 2};
      }
    }
  }
  return {out.str(), status == 0 ? 0 : 2};
}

}  // namespace cohort::tools
