// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

/// \file
/// What the project's programs do alike with their command lines. A program's help is the one list
/// of its options: words that begin with two dashes.

namespace cohort::tools {

/// Letters to insert, take out or replace until one word is the other.
[[nodiscard]] inline std::size_t edits(std::string_view from, std::string_view to) {
  std::vector<std::size_t> row(to.size() + 1);
  for (std::size_t j = 0; j < row.size(); ++j) {
    row[j] = j;
  }
  for (std::size_t i = 0; i < from.size(); ++i) {
    std::size_t corner = row[0];
    row[0] = i + 1;
    for (std::size_t j = 0; j < to.size(); ++j) {
      const std::size_t replaced = corner + (from[i] == to[j] ? 0 : 1);
      corner = row[j + 1];
      row[j + 1] = std::min({replaced, corner + 1, row[j] + 1});
    }
  }
  return row.back();
}

/// The options that a help names, in its order.
[[nodiscard]] inline std::vector<std::string> options_in(std::string_view help) {
  std::vector<std::string> options;
  for (auto at = help.find("--"); at != std::string_view::npos; at = help.find("--", at)) {
    const auto end =
        std::min(help.size(), help.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789-", at));
    options.emplace_back(help.substr(at, end - at));
    at = end;
  }
  return options;
}

/// The option nearest to a word, or "" where none is near.
[[nodiscard]] inline std::string nearest_option(std::string_view word, std::string_view help) {
  std::string best;
  std::size_t least = 2 + word.size() / 4;  // more is another word
  for (const std::string& option : options_in(help)) {
    if (const std::size_t distance = edits(word, option); distance < least) {
      least = distance;
      best = option;
    }
  }
  return best;
}

/// What to say of a word that is no option: "--bakend: no such option; did you mean --backend?
/// --help lists them".
[[nodiscard]] inline std::string no_such_option(std::string_view word, std::string_view help) {
  const std::string_view name = word.substr(0, word.find('='));
  const std::string near = nearest_option(name, help);
  return std::string(name) + ": no such option; " +
         (near.empty() ? "" : "did you mean " + near + "? ") + "--help lists them";
}

/// Writes all of a text, and has it leave the program. Throws where the system refuses; at a limit
/// of the size of files too, where it would otherwise end the program by a signal.
inline void write_all(std::FILE* to, std::string_view text) {
  std::signal(SIGXFSZ, SIG_IGN);
  if (std::fwrite(text.data(), 1, text.size(), to) != text.size() || std::fflush(to) != 0) {
    throw std::system_error(errno, std::generic_category(), "the output cannot be written");
  }
}

/// Whether this process speaks for a launcher's: its first, or one that none started. For programs
/// that have not started MPI yet.
[[nodiscard]] inline bool speaks() noexcept {
  for (const char* variable : {"OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"}) {
    if (const char* const rank = std::getenv(variable); rank != nullptr) {
      return std::string_view(rank) == "0";
    }
  }
  return true;
}

/// Ends the program with its help where a word asks for it.
inline void help_if_asked(int argc, char** argv, std::string_view help) {
  for (int i = 1; i < argc; ++i) {
    if (const std::string_view word = argv[i]; word == "--help" || word == "-h") {
      if (speaks()) {
        static_cast<void>(std::fwrite(help.data(), 1, help.size(), stdout));
      }
      std::exit(EXIT_SUCCESS);
    }
  }
}

/// Ends the program with status 2 for what its command line says.
[[noreturn]] inline void refuse(const std::string& problem) {
  if (speaks()) {
    static_cast<void>(std::fprintf(stderr, "%s\n", problem.c_str()));
  }
  std::exit(2);
}

}  // namespace cohort::tools
