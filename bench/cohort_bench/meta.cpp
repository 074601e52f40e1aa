// SPDX-License-Identifier: Apache-2.0
#include "meta.hpp"

#include <fmt/format.h>
#include <mpi.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <memory>
#include <set>
#include <string_view>
#include <thread>

namespace cohort::bench {

namespace {

/// The first line that a command prints, or "".
[[nodiscard]] std::string first_line_of(const std::string& command) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> pipe(popen(command.c_str(), "r"), pclose);
  std::array<char, 256> line{};
  if (pipe == nullptr ||
      std::fgets(line.data(), static_cast<int>(line.size()), pipe.get()) == nullptr) {
    return {};
  }
  std::string text = line.data();
  while (!text.empty() && text.back() == '\n') {
    text.pop_back();
  }
  return text;
}

/// Of the sources that were built, with "-dirty" where they were changed since. COHORT_BENCH_COMMIT
/// says it where the sources are no repository.
[[nodiscard]] std::string commit() {
  if (const char* given = std::getenv("COHORT_BENCH_COMMIT"); given != nullptr && *given != '\0') {
    return given;
  }
  const std::string text = first_line_of("git -C '" COHORT_BENCH_SOURCES
                                         "' describe --always --dirty --abbrev=12 2>/dev/null");
  return text.empty() ? "unknown" : text;
}

[[nodiscard]] std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (const auto colon = line.find(": ");
        line.starts_with("model name") && colon != std::string::npos) {
      return line.substr(colon + 2);
    }
  }
  return "unknown";
}

[[nodiscard]] std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  std::array<char, 32> text{};
  std::strftime(text.data(), text.size(), "%Y-%m-%dT%H:%M:%SZ", &parts);
  return text.data();
}

/// Cores that this process may use.
[[nodiscard]] std::int64_t cores() {
  return static_cast<std::int64_t>(std::thread::hardware_concurrency());
}

[[nodiscard]] std::string mpi_version() {
  std::array<char, MPI_MAX_LIBRARY_VERSION_STRING> text{};
  int length = 0;
  MPI_Get_library_version(text.data(), &length);
  const std::string_view all(text.data(), static_cast<std::size_t>(std::max(length, 0)));
  return std::string(all.substr(0, all.find_first_of(",\n")));
}

/// NAME=value of the variables that change what is measured, sorted.
[[nodiscard]] std::vector<std::string> environment() {
  std::vector<std::string> found;
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    for (const std::string_view prefix : {"NCCL_", "COHORT_", "CUDA_", "OMPI_MCA_", "TORCH_"}) {
      if (text.starts_with(prefix)) {
        found.emplace_back(text);
      }
    }
  }
  // What the launcher and the build of this machine add says nothing about the run.
  std::erase_if(found, [](const std::string& text) {
    return text.starts_with("OMPI_MCA_orte") || text.starts_with("OMPI_MCA_ess") ||
           text.starts_with("OMPI_MCA_pmix") || text.find('/') != std::string::npos;
  });
  std::sort(found.begin(), found.end());
  return found;
}

[[nodiscard]] std::int64_t count_hosts(ControlPlane& world) {
  std::array<char, 256> name{};
  gethostname(name.data(), name.size() - 1);
  const std::string_view mine(name.data());
  std::set<Bytes> hosts;
  for (auto& bytes : world.all_gather(std::as_bytes(std::span(mine)))) {
    hosts.insert(std::move(bytes));
  }
  return static_cast<std::int64_t>(hosts.size());
}

}  // namespace

Meta describe_run(std::string_view program, std::span<const std::string> command,
                  std::string_view backend, ControlPlane& world) {
  std::string line(program);  // folders say nothing of what was measured
  for (const auto& word : command.subspan(std::min<std::size_t>(1, command.size()))) {
    line += " " + (word.starts_with('/') ? word.substr(word.rfind('/') + 1) : word);
  }
  Meta meta;
  meta.text("command", line);
  meta.text("commit", world.rank() == 0 ? commit() : std::string());
  meta.text("date", utc_now());
  meta.text("backend", backend);
  meta.number("ranks", world.size());
  meta.number("hosts", count_hosts(world));
  meta.text("cpu", cpu_name());
  meta.number("cores", cores());
  meta.text("mpi", mpi_version());
  meta.list("environment", environment());
  return meta;
}

}  // namespace cohort::bench
