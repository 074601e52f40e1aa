// SPDX-License-Identifier: Apache-2.0
#include "console.hpp"

#include <fmt/format.h>

#include <cerrno>
#include <csignal>
#include <cstring>
#include <span>

namespace cohort::bench {

// mpirun puts pipes and pseudo-terminals between its ranks and the user, so that isatty says
// nothing; the controlling terminal, where there is one, is the user's. A process in the background
// may write to it.
Console::Console(bool speaks) : speaks_(speaks) {
  if (speaks_) {
    static_cast<void>(std::signal(SIGTTOU, SIG_IGN));
    terminal_ = std::fopen("/dev/tty", "we");
  }
}

Console::~Console() {
  clear_progress();
  for (std::FILE* file : {file_, terminal_}) {
    if (file != nullptr) {
      static_cast<void>(std::fclose(file));
    }
  }
}

void Console::open(const std::string& path, const Meta& meta, ControlPlane& world) {
  std::string problem;
  if (speaks_ && !path.empty()) {
    file_ = std::fopen(path.c_str(), "we");
    if (file_ == nullptr) {
      problem = fmt::format("--json: cannot write {}: {}", path, std::strerror(errno));
    }
  }
  const Bytes told = world.broadcast(std::as_bytes(std::span(problem)), 0);
  if (!told.empty()) {
    throw ConfigError(std::string(reinterpret_cast<const char*>(told.data()), told.size()));
  }
  write_line(meta.to_json());
  print(meta.to_json() + "\n" + table_head() + "\n");
}

void Console::add(const Row& row) {
  rows_.push_back(row);
  print(table_line(row) + "\n");
  write_line(to_json(row));
}

void Console::note(const std::string& text) {
  if (notes_.insert(text).second) {
    print("# " + text + "\n");
  }
}

void Console::print(const std::string& text) {
  if (speaks_) {
    clear_progress();
    static_cast<void>(std::fwrite(text.data(), 1, text.size(), stdout));
    static_cast<void>(std::fflush(stdout));
  }
}

void Console::progress(const std::string& text) {
  if (terminal_ != nullptr) {
    static_cast<void>(std::fprintf(terminal_, "\r\033[K%.100s", text.c_str()));
    static_cast<void>(std::fflush(terminal_));
    has_progress_ = true;
  }
}

void Console::clear_progress() {
  if (terminal_ != nullptr && has_progress_) {
    static_cast<void>(std::fputs("\r\033[K", terminal_));
    static_cast<void>(std::fflush(terminal_));
    has_progress_ = false;
  }
}

/// Every line is on its way to the file before the next row is measured, so that a run that is
/// killed keeps what it has.
void Console::write_line(const std::string& line) {
  if (file_ != nullptr) {
    const std::string text = line + "\n";
    const bool written =
        std::fwrite(text.data(), 1, text.size(), file_) == text.size() && std::fflush(file_) == 0;
    if (!written) {
      throw Error("--json: the result file could not be written");
    }
  }
}

}  // namespace cohort::bench
