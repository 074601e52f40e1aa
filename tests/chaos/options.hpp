// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "command_line/command_line.hpp"

/// \file
/// Which rounds a chaos program runs.

namespace cohort::chaos {

/// What every chaos program's help says of its options.
inline constexpr std::string_view kOptionHelp =
    "  --rounds N     of one seed each, 20\n"
    "  --seconds MOST after which none begins\n"
    "  --seed S       of the first round, 1\n"
    "  --ranks MOST   2 to 8, 4\n"
    "  --limit-ms MS  of every wait, 1000\n"
    "  --fault NAME   only rounds with that fault\n"
    "  --phase NAME   only rounds whose fault comes in that phase\n"
    "  --verbose      also what the ranks say\n";

struct Options {
  int rounds = 20;
  int seconds = 0;  ///< No round begins after these; 0 for no such end.
  std::uint64_t seed = 1;
  int ranks = 4;
  int limit_ms = 1000;
  std::string fault;  ///< Only rounds with this one, where not empty.
  std::string phase;
  bool verbose = false;
};

/// @param help  The program's, whose options these are.
inline Options parse(int argc, char** argv, std::string_view help) {
  tools::help_if_asked(argc, argv, help);
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view name = argv[i];
    const auto text = [&]() -> const char* {
      if (++i >= argc) {
        tools::refuse(std::string(name) + ": expected a value");
      }
      return argv[i];
    };
    const auto value = [&] { return std::atoll(text()); };
    if (name == "--rounds") {
      options.rounds = static_cast<int>(value());
    } else if (name == "--seconds") {
      options.seconds = static_cast<int>(value());
    } else if (name == "--seed") {
      options.seed = static_cast<std::uint64_t>(value());
    } else if (name == "--ranks") {
      options.ranks = static_cast<int>(value());
    } else if (name == "--limit-ms") {
      options.limit_ms = static_cast<int>(value());
    } else if (name == "--fault") {
      options.fault = text();
    } else if (name == "--phase") {
      options.phase = text();
    } else if (name == "--verbose") {
      options.verbose = true;
    } else {
      tools::refuse(tools::no_such_option(name, help));
    }
  }
  if (options.rounds < 1 || options.ranks < 2 || options.ranks > 8 || options.limit_ms < 1000) {
    tools::refuse("expected 1 round or more, 2 to 8 ranks, a limit of 1000 ms or more");
  }
  return options;
}

}  // namespace cohort::chaos
