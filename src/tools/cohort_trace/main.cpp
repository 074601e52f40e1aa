// SPDX-License-Identifier: Apache-2.0
// What ranks did before they hung: the traces that they wrote, side by side.
//
//   cohort_trace /tmp/traces                 every trace of a folder
//   cohort_trace --svg picture.svg a b       these files, and the picture as SVG

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "analysis.hpp"
#include "command_line/cli11.hpp"
#include "command_line/command_line.hpp"

namespace {

using namespace cohort;

struct Options {
  std::vector<std::string> paths;
  std::string svg;
  bool json = false;
  bool all = false;
  int width = 100;
};

/// What lies at the paths.
struct Found {
  std::vector<std::pair<std::string, std::string>> files;  ///< Names and texts.
  std::vector<std::string> notes;
};

Found files_at(const std::vector<std::string>& paths) {
  std::vector<std::filesystem::path> names;
  Found found;
  for (const std::filesystem::path path : paths) {
    if (!std::filesystem::is_directory(path)) {
      names.push_back(path);
      continue;
    }
    for (const auto& entry : std::filesystem::directory_iterator(path)) {
      const std::string name = entry.path().filename().string();
      if (name.starts_with("cohort.rank") && name.ends_with(".json")) {
        names.push_back(entry.path());
      } else if (name.starts_with("cohort.rank") && name.ends_with(".part")) {
        found.notes.push_back(
            fmt::format("left out: {}: unfinished; its rank writes it, or was stopped then",
                        entry.path().string()));
      }
    }
  }
  std::sort(names.begin(), names.end());
  for (const auto& path : names) {
    std::ifstream file(path);
    std::ostringstream text;
    if (!file || !(text << file.rdbuf())) {
      found.notes.push_back(fmt::format("left out: {}: cannot be read", path.string()));
      continue;
    }
    found.files.emplace_back(path.string(), text.str());
  }
  return found;
}

std::string ranks_of(const trace::State& state) {
  std::vector<int> ranks;
  for (const auto& [rank, reason] : state.reasons) {
    ranks.push_back(rank);
  }
  return fmt::format("rank{} {}", ranks.size() == 1 ? "" : "s", fmt::join(ranks, ", "));
}

/// One line about a state that is not the newest.
std::string in_short(const trace::State& state, const trace::State& newest) {
  return fmt::format("run {}, {} before, of {}: {}\n", state.run,
                     trace::duration(newest.written - state.written), ranks_of(state),
                     trace::verdict(state));
}

int run(const Options& options) {
  Found found = files_at(options.paths);
  trace::Reading reading = trace::read(found.files);
  std::move(reading.notes.begin(), reading.notes.end(), std::back_inserter(found.notes));
  const auto& states = reading.states;
  if (states.empty()) {
    for (const auto& note : found.notes) {
      fmt::print(stderr, "{}\n", note);
    }
    throw std::runtime_error("no traces: expected files cohort.rank*.json");
  }
  const std::size_t first = options.all ? 0 : states.size() - 1;
  std::string pages;
  for (std::size_t i = states.size(); i-- > first;) {
    pages += options.json ? trace::to_json(states[i]) : trace::to_text(states[i], options.width);
    pages += options.json || i > first ? "\n" : "";
  }
  std::string aside;
  if (first > 0) {
    aside = fmt::format("\nthis is the newest run, {}, of {}; --all shows the others as well:\n",
                        states.back().run, ranks_of(states.back()));
    for (std::size_t i = first; i-- > 0;) {
      aside += "  " + in_short(states[i], states.back());
    }
  }
  for (const auto& note : found.notes) {
    aside += note + '\n';
  }
  tools::write_all(stdout, options.json ? pages : pages + aside);
  if (options.json) {  // which is alone on the standard output
    tools::write_all(stderr, aside);
  }
  if (!options.svg.empty()) {
    std::ofstream file(options.svg);
    if (!(file << trace::to_svg(states.back()) << std::flush)) {
      throw std::runtime_error(options.svg + ": cannot be written");
    }
  }
  return EXIT_SUCCESS;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app(
      "Puts the ranks' traces side by side and says who is behind, in which call, and where\n"
      "arguments differ; then shows the last calls of each rank over time.\n\n"
      "  cohort_trace --svg picture.svg /tmp/traces");
  app.add_option("paths", options.paths, "Traces, or folders with cohort.rank*.json");
  app.add_option("--svg", options.svg, "Where to write the picture of the newest state as SVG");
  app.add_option("--width", options.width, "Columns of the picture")
      ->check(CLI::Range(20, 1000))
      ->capture_default_str();
  app.add_flag("--all", options.all, "Every run whose traces lie there, not only the newest");
  app.add_flag("--json", options.json, "JSON instead of a page of text");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    const tools::Refusal refusal = tools::refusal(app, error);
    fmt::print(refusal.status == 0 ? stdout : stderr, "{}", refusal.text);
    return refusal.status;
  }
  if (options.paths.empty()) {
    fmt::print(stderr, "paths: expected traces, or folders with some; --help says more\n");
    return 2;
  }
  try {
    return run(options);
  } catch (const std::exception& error) {
    fmt::print(stderr, "cohort_trace: {}\n", error.what());
    return EXIT_FAILURE;
  }
}
