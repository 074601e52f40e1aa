// SPDX-License-Identifier: Apache-2.0
// What ranks did before they hung: the traces that they wrote, side by side.
//
//   cohort_trace /tmp/traces                 every trace of a folder
//   cohort_trace --svg picture.svg a b       these files, and the picture as SVG

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "analysis.hpp"
#include "command_line/cli11.hpp"

namespace {

using namespace cohort;

struct Options {
  std::vector<std::string> paths;
  std::string svg;
  bool json = false;
  int width = 100;
};

std::string content(const std::filesystem::path& path) {
  std::ifstream file(path);
  std::ostringstream text;
  if (!file || !(text << file.rdbuf())) {
    throw std::runtime_error(path.string() + ": cannot be read");
  }
  return text.str();
}

std::vector<std::pair<std::string, std::string>> files_at(const std::vector<std::string>& paths) {
  std::vector<std::filesystem::path> found;
  for (const std::filesystem::path path : paths) {
    if (!std::filesystem::is_directory(path)) {
      found.push_back(path);
      continue;
    }
    for (const auto& entry : std::filesystem::directory_iterator(path)) {
      const std::string name = entry.path().filename().string();
      if (name.starts_with("cohort.rank") && name.ends_with(".json")) {
        found.push_back(entry.path());
      }
    }
  }
  std::sort(found.begin(), found.end());
  std::vector<std::pair<std::string, std::string>> files;
  for (const auto& path : found) {
    files.emplace_back(path.string(), content(path));
  }
  return files;
}

int run(const Options& options) {
  const auto files = files_at(options.paths);
  if (files.empty()) {
    throw std::runtime_error("no traces: expected files cohort.rank*.json");
  }
  const auto states = trace::read(files);
  for (const trace::State& state : states) {
    fmt::print("{}{}", options.json ? trace::to_json(state) : trace::to_text(state, options.width),
               options.json ? "\n" : "");
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
