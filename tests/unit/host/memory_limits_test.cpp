// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cohort/host/memory_limits.hpp>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using namespace cohort::host::detail;
using namespace cohort::test;

namespace {

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

/// A machine, as its files.
using Files = std::map<std::string, std::string>;

std::uint64_t available_on(const Files& files) {
  return available_memory([&](const std::string& path) {
    const auto found = files.find(path);
    return found == files.end() ? std::string() : found->second;
  });
}

std::string bytes(std::uint64_t mebibytes) { return std::to_string(mebibytes * kMiB) + "\n"; }

const std::string kMeminfo =
    "MemTotal:       65536000 kB\nMemFree:         1024 kB\nMemAvailable:   33554432 kB\n";

}  // namespace

TEST_CASE("numbers are found by their whole name", "[host]") {
  const std::string text = "total_cache 5\ncache 12\ninactive_file 7\n";
  CHECK(number_of(text, "cache") == 12U);
  CHECK(number_of(text, "inactive_file") == 7U);
  CHECK(number_of(text, "active_file") == std::nullopt);
  CHECK(number_of("MemAvailable:   123 kB", "MemAvailable:") == 123U);
  CHECK(number_of("cache", "cache") == std::nullopt);
  CHECK(number_of("cache \n", "cache") == std::nullopt);
  CHECK(number_in("max\n") == std::nullopt);
  CHECK(number_in("") == std::nullopt);
}

TEST_CASE("a process's groups are read in both versions", "[host]") {
  const auto both = cgroup_paths("9:name=systemd:/a\n4:cpu,memory:/docker/1:2\n0::/user.slice/x\n");
  CHECK(both.memory == "/docker/1:2");
  CHECK(both.unified == "/user.slice/x");
  const auto other = cgroup_paths("3:memory_other:/a\n2:hugetlb:/b\nnonsense\n");
  CHECK(other.memory == std::nullopt);
  CHECK(other.unified == std::nullopt);
}

TEST_CASE("a machine without containers has what meminfo says", "[host]") {
  CHECK(available_on({}) == kNoLimit);
  CHECK(available_on({{"/proc/meminfo", kMeminfo}}) == 32768 * kMiB);
  CHECK(available_on({{"/proc/meminfo", kMeminfo},
                      {"/proc/self/cgroup", "0::/\n"},
                      {"/sys/fs/cgroup/memory.max", "max\n"},
                      {"/sys/fs/cgroup/memory.current", bytes(100)}}) == 32768 * kMiB);
}

TEST_CASE("page cache does not count against a container", "[host]") {
  Files files{{"/proc/meminfo", kMeminfo},
              {"/proc/self/cgroup", "0::/\n"},
              {"/sys/fs/cgroup/memory.max", bytes(8192)},
              {"/sys/fs/cgroup/memory.current", bytes(8142)}};
  CHECK(available_on(files) == 50 * kMiB);
  files["/sys/fs/cgroup/memory.stat"] =
      "anon 1\nfile 2\ninactive_anon 3\nactive_file 4\ninactive_file " + bytes(6000);
  CHECK(available_on(files) == 6050 * kMiB);
  files["/sys/fs/cgroup/memory.current"] = bytes(9000);  // the limit was lowered
  CHECK(available_on(files) == 5192 * kMiB);
  files["/sys/fs/cgroup/memory.stat"] = "";
  CHECK(available_on(files) == 0);
}

TEST_CASE("the tightest group on the path counts", "[host]") {
  Files files{{"/proc/meminfo", kMeminfo},
              {"/proc/self/cgroup", "0::/job.slice/step/task\n"},
              {"/sys/fs/cgroup/job.slice/step/memory.max", bytes(1000)},
              {"/sys/fs/cgroup/job.slice/step/memory.current", bytes(100)},
              {"/sys/fs/cgroup/job.slice/step/task/memory.max", "max\n"},
              {"/sys/fs/cgroup/job.slice/step/task/memory.current", bytes(50)}};
  CHECK(available_on(files) == 900 * kMiB);
  files["/sys/fs/cgroup/job.slice/memory.max"] = bytes(500);
  files["/sys/fs/cgroup/job.slice/memory.current"] = bytes(400);
  CHECK(available_on(files) == 100 * kMiB);
}

TEST_CASE("a container that sees the machine's path has its limit at the mount's root", "[host]") {
  for (const char* path : {"/machine/docker-1", "/../other"}) {
    CHECK(available_on({{"/proc/self/cgroup", std::string("0::") + path + "\n"},
                        {"/sys/fs/cgroup/memory.max", bytes(700)},
                        {"/sys/fs/cgroup/memory.current", bytes(100)}}) == 600 * kMiB);
  }
}

TEST_CASE("version 1 counts as well, with what it has of hierarchy", "[host]") {
  Files files{{"/proc/meminfo", kMeminfo},
              {"/proc/self/cgroup", "5:cpu:/x\n4:memory:/a/b\n0::/\n"},
              {"/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", bytes(1024)},
              {"/sys/fs/cgroup/memory/a/b/memory.usage_in_bytes", bytes(1000)},
              {"/sys/fs/cgroup/memory/a/b/memory.stat",
               "inactive_file 1\ntotal_inactive_file " + bytes(300)},
              {"/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"},
              {"/sys/fs/cgroup/memory/memory.usage_in_bytes", bytes(40000)}};
  CHECK(available_on(files) == 324 * kMiB);
  files["/sys/fs/cgroup/memory/a/memory.limit_in_bytes"] = bytes(10);
  files["/sys/fs/cgroup/memory/a/memory.usage_in_bytes"] = bytes(5);
  files["/sys/fs/cgroup/memory/a/memory.use_hierarchy"] = "0\n";
  CHECK(available_on(files) == 324 * kMiB);
  files["/sys/fs/cgroup/memory/a/memory.use_hierarchy"] = "1\n";
  CHECK(available_on(files) == 5 * kMiB);
}

TEST_CASE("this machine says something that can be", "[host]") {
  CHECK(available_memory() > 0);
  CHECK(available_memory() < kNoLimit);
}

TEST_CASE("memory is taken in pieces while it lasts", "[host]") {
  std::uint64_t left = 300 * kMiB;
  std::vector<std::pair<std::size_t, std::size_t>> pieces;
  const auto take = [&](std::size_t first, std::size_t size) {
    pieces.emplace_back(first, size);
    left -= size;
    return 0;
  };
  const auto available = [&] { return left; };
  CHECK(commit(0, take, available).error == 0);
  CHECK(pieces.empty());
  CHECK(commit(70 * kMiB, take, available).error == 0);
  CHECK(pieces == std::vector<std::pair<std::size_t, std::size_t>>{
                      {0, 32 * kMiB}, {32 * kMiB, 32 * kMiB}, {64 * kMiB, 6 * kMiB}});
  const auto refused = commit(220 * kMiB, take, available);
  CHECK(refused.error == ENOMEM);
  CHECK(refused.left == 230 * kMiB);
  CHECK(pieces.size() == 3);
  CHECK(commit(
            kMiB, [](auto, auto) { return EIO; }, available)
            .error == EIO);
}

TEST_CASE("ranks that come at once never take more than there is", "[host]") {
  // As a machine would: what is taken beyond the end kills.
  constexpr std::uint64_t kTotal = 1000 * kMiB;
  constexpr std::size_t kEach = 300 * kMiB;
  std::atomic<std::uint64_t> used{0};
  std::atomic<int> killed{0};
  std::vector<int> errors(8);
  std::vector<std::thread> ranks;
  for (int& error : errors) {
    ranks.emplace_back([&] {
      std::uint64_t mine = 0;
      error = commit(
                  kEach,
                  [&](std::size_t, std::size_t size) {
                    mine += size;
                    killed += used.fetch_add(size) + size > kTotal ? 1 : 0;
                    return 0;
                  },
                  [&] {
                    const std::uint64_t left = kTotal - std::min(kTotal, used.load());
                    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // the look is old
                    return left;
                  })
                  .error;
      if (error != 0) {
        used -= mine;
      }
    });
  }
  for (auto& rank : ranks) {
    rank.join();
  }
  CHECK(killed == 0);
  const auto failed = std::count(errors.begin(), errors.end(), ENOMEM);
  CHECK(failed >= 5);
  CHECK(failed + std::count(errors.begin(), errors.end(), 0) == 8);
}
