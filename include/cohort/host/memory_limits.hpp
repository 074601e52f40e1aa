// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>

#include "cohort/system_calls.hpp"

/// \file
/// How much memory can still be taken on this machine and in its containers, and taking it so that
/// several ranks that come at once get an error where it does not suffice. A kernel without memory
/// kills processes instead of failing the call.

namespace cohort::host::detail {

inline constexpr std::uint64_t kNoLimit = std::numeric_limits<std::uint64_t>::max();

// What the kernel writes, as text.

/// The number that a text begins with; nothing for "max" and for a file that is not there.
[[nodiscard]] inline std::optional<std::uint64_t> number_in(std::string_view text) noexcept {
  std::uint64_t value = 0;
  const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), value);
  return code == std::errc{} ? std::optional(value) : std::nullopt;
}

/// The number behind a name at the beginning of a line: "MemAvailable:   123 kB", "cache 123".
[[nodiscard]] inline std::optional<std::uint64_t> number_of(std::string_view text,
                                                            std::string_view name) noexcept {
  while (!text.empty()) {
    std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(text.size(), line.size() + 1));
    if (line.starts_with(name) && line.size() > name.size() && line[name.size()] == ' ') {
      line.remove_prefix(std::min(line.size(), line.find_first_not_of(' ', name.size())));
      return number_in(line);
    }
  }
  return std::nullopt;
}

/// Where a process stands in the hierarchies that count memory, from /proc/self/cgroup, whose lines
/// are number:controllers:path (cgroups(7)). Nothing where there is no such hierarchy.
struct CgroupPaths {
  std::optional<std::string> unified;  ///< Version 2, the line of number 0 without controllers.
  std::optional<std::string> memory;   ///< Version 1.
};

[[nodiscard]] inline CgroupPaths cgroup_paths(std::string_view text) {
  CgroupPaths paths;
  while (!text.empty()) {
    const std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(text.size(), line.size() + 1));
    const auto first = line.find(':');
    const auto second = first == std::string_view::npos ? first : line.find(':', first + 1);
    if (second == std::string_view::npos) {
      continue;
    }
    const std::string controllers =
        ',' + std::string(line.substr(first + 1, second - first - 1)) + ',';
    if (controllers == ",,") {
      paths.unified = std::string(line.substr(second + 1));
    } else if (controllers.find(",memory,") != std::string::npos) {
      paths.memory = std::string(line.substr(second + 1));
    }
  }
  return paths;
}

/// What a limit leaves, with the page cache that the kernel gives up before it kills anyone.
[[nodiscard]] constexpr std::uint64_t left_of(std::uint64_t limit, std::uint64_t used,
                                              std::uint64_t reclaimable) noexcept {
  const std::uint64_t taken = used > reclaimable ? used - reclaimable : 0;
  return limit > taken ? limit - taken : 0;
}

/// The least that any group from `path` up to the mount's root leaves. A container may see the
/// machine's path although its mount begins at its own group; the root then is what counts.
template <class Left>
[[nodiscard]] std::uint64_t least_on_path(std::string path, const Left& left) {
  std::uint64_t least = kNoLimit;
  if (path.find("/..") != std::string::npos) {
    path.clear();  // outside of this process's namespace, and so of its mount
  }
  for (bool leaf = true;; leaf = false) {
    if (path == "/") {
      path.clear();
    }
    least = std::min(least, left(path, leaf));
    if (path.empty()) {
      return least;
    }
    path.erase(path.rfind('/'));
  }
}

/// Bytes that can be taken without swapping or, in a container, without crossing its limit;
/// `kNoLimit` where the system does not say. `read` gives a file's text, "" where there is none.
/// Sources: proc_meminfo(5), and the kernel's admin guide on cgroup v2 and on v1's memory
/// controller.
template <class Read>
[[nodiscard]] std::uint64_t available_memory(const Read& read) {
  std::uint64_t available = kNoLimit;
  if (const auto kilobytes = number_of(read("/proc/meminfo"), "MemAvailable:")) {
    available = *kilobytes << 10;
  }
  const CgroupPaths paths = cgroup_paths(read("/proc/self/cgroup"));
  const auto left_in = [&](const std::string& folder, const char* limit_file, const char* used_file,
                           const char* reclaimable) {
    const auto limit = number_in(read(folder + limit_file));
    const auto used = number_in(read(folder + used_file));
    if (!limit || !used) {
      return kNoLimit;
    }
    return left_of(*limit, *used,
                   number_of(read(folder + "/memory.stat"), reclaimable).value_or(0));
  };
  if (paths.unified) {
    available =
        std::min(available, least_on_path(*paths.unified, [&](const std::string& path, bool) {
                   return left_in("/sys/fs/cgroup" + path, "/memory.max", "/memory.current",
                                  "inactive_file");
                 }));
  }
  if (paths.memory) {
    available =
        std::min(available, least_on_path(*paths.memory, [&](const std::string& path, bool leaf) {
                   const std::string folder = "/sys/fs/cgroup/memory" + path;
                   // Without hierarchy a group does not count those below it.
                   if (!leaf && number_in(read(folder + "/memory.use_hierarchy")) == 0U) {
                     return kNoLimit;
                   }
                   return left_in(folder, "/memory.limit_in_bytes", "/memory.usage_in_bytes",
                                  "total_inactive_file");
                 }));
  }
  return available;
}

[[nodiscard]] inline std::uint64_t available_memory() {
  return available_memory([](const std::string& path) { return os::read_text(path).text; });
}

// Taking it.

/// Memory is taken in pieces, and what is left is looked at before each.
inline constexpr std::size_t kCommitPiece = std::size_t{32} << 20;
/// With less than this left the ranks of a machine take turns from the look to the pages: 64 of
/// them may each have a piece on its way that the others have not seen.
inline constexpr std::uint64_t kAmple = 64 * std::uint64_t{kCommitPiece};
/// Stays free for everything else that the ranks do.
inline constexpr std::uint64_t kCommitMargin = std::uint64_t{16} << 20;

/// The turn of one process of the machine, or of those that share its /dev/shm. A lock of a folder
/// that is there anyway, so nothing is left behind. Whoever holds it has little to do; should it be
/// held for long all the same, or not be to be had, the turn is not waited for.
class CommitTurn {
 public:
  void take() {
    if (given_up_ || folder_) {
      return;
    }
    folder_ = os::open_file("/dev/shm", O_RDONLY | O_DIRECTORY);
    if (!folder_ || !os::lock_file(folder_.get(), std::chrono::steady_clock::now() + kPatience)) {
      folder_.reset();
      given_up_ = true;
    }
  }
  void end() noexcept { folder_.reset(); }

 private:
  static constexpr std::chrono::seconds kPatience{5};

  UniqueFd folder_;
  bool given_up_ = false;
};

struct CommitResult {
  int error = 0;                  ///< errno, or 0
  std::uint64_t left = kNoLimit;  ///< where the error is ENOMEM: bytes that were left, if known
};

/// Takes `bytes` by `take(first, bytes) -> errno`, piece by piece, unless less is left than what is
/// still wanted.
template <class Take, class Available>
[[nodiscard]] CommitResult commit(std::size_t bytes, const Take& take, const Available& available) {
  CommitTurn turn;
  for (std::size_t first = 0; first < bytes;) {
    const std::uint64_t wanted = std::uint64_t{bytes - first} + kCommitMargin;
    std::uint64_t left = available();
    if (left < kAmple) {
      turn.take();
      left = available();
    }
    if (left < wanted) {
      return {.error = ENOMEM, .left = left};
    }
    const std::size_t piece = std::min(bytes - first, kCommitPiece);
    if (const int code = take(first, piece); code != 0) {
      return {.error = code, .left = left};
    }
    turn.end();
    first += piece;
  }
  return {};
}

template <class Take>
[[nodiscard]] CommitResult commit(std::size_t bytes, const Take& take) {
  return commit(bytes, take, [] { return available_memory(); });
}

}  // namespace cohort::host::detail
