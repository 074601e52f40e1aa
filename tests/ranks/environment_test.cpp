// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <fmt/format.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cohort/cohort.hpp>
#include <cohort/host/memory_limits.hpp>
#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "support/catch.hpp"
#include "support/fast_signals.hpp"
#include "support/ranks.hpp"

/// \file
/// Groups on machines that refuse something. Each case changes its process for good, so each is a
/// run of its own.

using namespace cohort;
using namespace cohort::test;

namespace {

/// The warnings of this rank while it lives.
class Warnings {
 public:
  Warnings() {
    set_log_sink([this](LogLevel level, std::string_view text) {
      if (level == LogLevel::warning) {
        texts_.emplace_back(text);
      }
    });
  }
  ~Warnings() { set_log_sink({}); }

  [[nodiscard]] const std::vector<std::string>& texts() const { return texts_; }

 private:
  std::vector<std::string> texts_;
};

/// A system call fails with `code` in this process from here on. False where that is not permitted.
bool refuse(unsigned call, unsigned code) {
  std::array<sock_filter, 4> filter{{BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
                                     BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 1),
                                     BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | code),
                                     BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)}};
  const sock_fprog program{.len = filter.size(), .filter = filter.data()};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

/// Only so many descriptors are left to this process while it lives.
class FewDescriptors {
 public:
  explicit FewDescriptors(std::size_t left) {
    getrlimit(RLIMIT_NOFILE, &before_);
    const rlimit few{.rlim_cur = std::min<rlim_t>(512, before_.rlim_max),
                     .rlim_max = before_.rlim_max};
    setrlimit(RLIMIT_NOFILE, &few);
    while (UniqueFd taken = os::open_file("/dev/null", O_RDONLY)) {
      taken_.push_back(std::move(taken));
    }
    taken_.resize(taken_.size() - left);
  }
  FewDescriptors(const FewDescriptors&) = delete;
  FewDescriptors& operator=(const FewDescriptors&) = delete;
  ~FewDescriptors() { setrlimit(RLIMIT_NOFILE, &before_); }

 private:
  rlimit before_{};
  std::vector<UniqueFd> taken_;
};

/// A group of the first version of control groups that holds the processes that joined it to a
/// limit. They return where they were.
class MemoryLimit {
 public:
  explicit MemoryLimit(std::size_t bytes) {
    const auto own = host::detail::cgroup_paths(os::read_text("/proc/self/cgroup").text).memory;
    const std::string pid = std::to_string(getpid());
    const auto name = world().broadcast(std::as_bytes(std::span(pid)), 0);
    if (own) {
      parent_ = "/sys/fs/cgroup/memory" + *own;
      folder_ = parent_ + "/cohort-test-" +
                std::string(reinterpret_cast<const char*>(name.data()), name.size());
    }
    if (world_rank() == 0 && own && mkdir(folder_.c_str(), 0700) == 0) {
      write(folder_ + "/memory.limit_in_bytes", std::to_string(bytes));
    }
    world().barrier();
    joined_ = own && write(folder_ + "/cgroup.procs", std::to_string(getpid()));
  }
  MemoryLimit(const MemoryLimit&) = delete;
  MemoryLimit& operator=(const MemoryLimit&) = delete;
  ~MemoryLimit() {
    if (joined_) {
      write(parent_ + "/cgroup.procs", std::to_string(getpid()));
    }
    world().barrier();
    if (world_rank() == 0) {
      rmdir(folder_.c_str());
    }
  }

  [[nodiscard]] bool joined() const { return joined_; }

 private:
  static bool write(const std::string& path, const std::string& text) {
    const UniqueFd file = os::open_file(path, O_WRONLY);
    return file &&
           ::write(file.get(), text.data(), text.size()) == static_cast<ssize_t>(text.size());
  }

  std::string parent_;
  std::string folder_;
  bool joined_ = false;
};

ParallelState form(bool windows) {
  return ParallelState::create(world(), {.layout = {.tp = world_size(), .dcp = world_size()},
                                         .backend = host_backend(),
                                         .symmetric = {.enabled = windows}});
}

/// A gather and a merge with answers that are known; everything that an engine's step does.
void check_steps(ParallelState& state) {
  auto& group = state.dcp();
  const int n = world_size();
  const Tensor x = state.backend().allocate({2, 3}, DType::f32, {});
  std::fill_n(x.data_as<float>(), 6, static_cast<float>(1 + world_rank()));
  const Tensor all = group.all_gather(x, 0);
  REQUIRE(all.shape() == Dims{2 * n, 3});
  for (int i = 0; i < 6 * n; ++i) {
    CHECK(all.data_as<float>()[i] == static_cast<float>(1 + i / 6));
  }

  const std::int64_t heads = 2 * n;
  group.reserve_for({.batch = 4, .heads = heads, .value = 8, .dtype = DType::f32});
  const Tensor out = state.backend().allocate({4, heads, 8}, DType::f32, {});
  const Tensor lse = state.backend().allocate({4, heads}, DType::f32, {});
  std::fill_n(out.data_as<float>(), out.numel(), static_cast<float>(world_rank()));
  std::fill_n(lse.data_as<float>(), lse.numel(), 0.0F);
  const Tensor merged = group.merge_attention(out, lse);
  REQUIRE(merged.shape() == Dims{4, 2, 8});
  for (int i = 0; i < merged.numel(); ++i) {
    CHECK(merged.data_as<float>()[i] == Approx(static_cast<float>(n - 1) / 2));  // ranks' mean
  }
}

}  // namespace

TEST_CASE("without memory files the control plane carries everything", "[.no_memory_files]") {
  if (skip_all_if(!refuse(SYS_memfd_create, EPERM), "seccomp filters are not permitted")) {
    return;
  }
  const Warnings warnings;
  {
    auto state = form(false);
    check_steps(state);
    state.shutdown();
  }
  CHECK(warnings.texts().empty());  // nobody asked for symmetric memory
  auto state = form(true);
  const auto& decision = state.dcp().decision();
  CHECK_FALSE(decision.nccl_windows.on);
  CHECK_FALSE(decision.peer_mapping.on);
  CHECK_THAT(decision.nccl_windows.detail,
             contains("segments are not memory files", "rank 0: memfd_create failed with code 1",
                      "Operation not permitted"));
  check_steps(state);
  state.shutdown();
  REQUIRE(warnings.texts().size() == (world_rank() == 0 ? 1 : 0));
  if (world_rank() == 0) {
    CHECK_THAT(warnings.texts()[0], contains("dcp", "memfd_create", "Operation not permitted"));
  }
}

TEST_CASE("a rank that runs out of descriptors is named with the cause", "[.no_descriptors]") {
  for (const std::size_t left : {0U, 1U}) {
    std::optional<ParallelState> state;
    {
      std::optional<FewDescriptors> few;
      if (world_rank() == 1) {
        few.emplace(left);
      }
      state.emplace(form(true));
    }
    const auto& why = state->dcp().decision().peer_mapping.detail;
    CHECK_THAT(why, contains("rank 1: ", "code 24", "Too many open files"));
    CHECK_THAT(why, !contains("machine"));
    check_steps(*state);
    state->shutdown();
  }
}

TEST_CASE("a rank without descriptors fails in growth with the cause, and the group works on",
          "[.no_descriptors]") {
  auto state = ParallelState::create(world(), {.layout = {.tp = world_size(), .dcp = world_size()},
                                               .backend = host_backend(),
                                               .symmetric = {.enabled = true},
                                               .arena = {.growth_bytes = 4096}});
  auto& group = state.dcp();
  int failed = 0;
  for (std::size_t left = 0; left < 8; ++left) {
    const std::size_t bytes = (left + 1) << 20;  // more than there is, so that the arena grows
    std::optional<FewDescriptors> few;
    if (world_rank() == 1) {
      few.emplace(left);
    }
    std::string text;
    int code = 0;
    try {
      group.reserve(bytes);
    } catch (const TransportError& error) {
      text = error.what();
      code = static_cast<int>(error.site().native_code);
    } catch (const SymmetryError& error) {
      text = error.what();
      CHECK(error.ranks() == std::vector{1});
    }
    few.reset();
    if (!text.empty()) {
      ++failed;
      CHECK_THAT(text, contains("Too many open files"));
      CHECK(code == (world_rank() == 1 ? EMFILE : 0));
    }
    check_steps(state);
  }
  CHECK(failed > 0);
  CHECK(failed < 8);
  state.shutdown();
}

TEST_CASE("ranks that together want more than their container has all get an error",
          "[.memory_limit]") {
  constexpr std::size_t kLimit = std::size_t{600} << 20;
  const MemoryLimit limit(kLimit);
  if (skip_all_if(!limit.joined(), "needs the right to make a control group of version 1")) {
    return;
  }
  CHECK(host::detail::available_memory() <= kLimit);
  auto state = form(true);
  std::string text = "nothing was thrown";
  try {
    state.dcp().reserve(kLimit / static_cast<std::size_t>(world_size()) * 5 / 4);
  } catch (const Error& error) {
    text = error.what();
  }
  CHECK_THAT(text, contains("Cannot allocate memory", "bytes left"));
  check_steps(state);
  state.shutdown();
}

TEST_CASE("groups form and grow under signals that come all the time", "[.signals]") {
  const FastSignals signals;
  auto state = form(true);
  CHECK(state.dcp().decision().nccl_windows.on);
  state.dcp().reserve(std::size_t{80} << 20);
  check_steps(state);
  state.shutdown();
}
