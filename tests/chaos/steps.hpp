// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cohort/cohort.hpp>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "chaos/allocations.hpp"
#include "chaos/plan.hpp"
#include "chaos/trouble.hpp"

/// \file
/// The steps of a rank as its supervisor hears of them: how each ended, after how long, and which
/// ranks of the world its error names.

namespace cohort::chaos {

/// Writes lines to the supervisor.
class Reporter {
 public:
  explicit Reporter(int fd) noexcept : fd_(fd) {}

  /// One line; tabs separate its fields. Signals interrupt and resume it.
  void line(std::string text) const {
    text += '\n';
    for (std::size_t written = 0; written < text.size();) {
      const auto now = ::write(fd_, text.data() + written, text.size() - written);
      if (now < 0 && errno != EINTR) {
        std::_Exit(70);  // the supervisor is gone
      }
      written += now > 0 ? static_cast<std::size_t>(now) : 0;
    }
  }

 private:
  int fd_;
};

/// World ranks of the group that an error's text speaks of first; of `otherwise` where it names
/// none.
[[nodiscard]] inline std::vector<int> group_in(const std::string& text, const Plan& plan,
                                               const std::vector<int>& otherwise) {
  const ParallelLayout layout{.tp = plan.tp, .pp = plan.pp, .dcp = plan.dcp};
  std::size_t first = std::string::npos;
  std::vector<int> ranks = otherwise;
  for (const GroupKind kind : {GroupKind::world, GroupKind::tensor_parallel,
                               GroupKind::pipeline_parallel, GroupKind::decode_context_parallel}) {
    for (int member = 0; member < plan.ranks; ++member) {
      const auto at = text.find("group " + group_name(kind, group_index(layout, kind, member)));
      if (at < first) {
        first = at;
        ranks = group_ranks(layout, kind, member);
      }
    }
  }
  return ranks;
}

/// World ranks that an error's text names as those: of the failure of another group, or of ranks of
/// other groups for whom those of this one wait.
[[nodiscard]] inline std::string world_ranks_in(const std::string& text) {
  constexpr std::string_view kBefore = " rank ";
  for (const std::string_view behind : {" of the world: ", " of group world did not arrive"}) {
    const auto end = text.find(behind);
    const auto begin = end == std::string::npos ? end : text.rfind(kBefore, end);
    if (begin != std::string::npos) {
      std::string ranks = text.substr(begin + kBefore.size(), end - begin - kBefore.size());
      std::erase(ranks, ' ');
      return ranks;
    }
  }
  return "";
}

/// World ranks that an error names, from its ranks in the group whose call threw it.
[[nodiscard]] inline std::string named_ranks(const std::vector<int>& in_group,
                                             const std::vector<int>& group) {
  std::string text;
  for (const int rank : in_group) {
    const bool known = rank >= 0 && static_cast<std::size_t>(rank) < group.size();
    text += fmt::format("{}{}", text.empty() ? "" : ",",
                        known ? group[static_cast<std::size_t>(rank)] : -1);
  }
  return text;
}

/// Runs the steps of one rank, on one thread.
class Steps {
 public:
  Steps(const Plan& plan, const Reporter& reporter) : plan_(plan), reporter_(reporter) {}

  /// Where a step threw, and it has been reported.
  struct Failed {};
  /// Runs one step of the ranks of `group` and reports it. Throws `Failed`, or what the engine
  /// does.
  template <class Call>
  void run(Phase phase, int index, const std::vector<int>& group, const std::string& name,
           const Call& call) {
    const auto start = Clock::now();
    const double queued = queued_ms();
    const auto say = [&](std::string_view outcome, const std::string& ranks, std::string text) {
      for (char& c : text) {
        c = c == '\n' || c == '\t' ? ' ' : c;
      }
      const auto took = std::chrono::duration<double, std::milli>(Clock::now() - start).count();
      reporter_.line(fmt::format("step\t{}\t{}\t{}\t{:.0f}\t{:.0f}\t{}\t{}\t{}", to_string(phase),
                                 index, name, took, queued_ms() - queued, outcome, ranks, text));
    };
    try {
      {
        const FailingAllocations until_here;
        call();
      }
      say("ok", "", "");
      return;
    } catch (const EngineFailure&) {
      throw;
    } catch (const TimeoutError& error) {
      say("TimeoutError", named_in(error.what(), error.missing(), group), error.what());
    } catch (const SymmetryError& error) {
      say("SymmetryError", named_in(error.what(), error.ranks(), group), error.what());
    } catch (const TransportError& error) {
      say("TransportError", "", error.what());
    } catch (const UsageError& error) {
      say("UsageError", "", error.what());
    } catch (const ConfigError& error) {
      say("ConfigError", "", error.what());
    } catch (const std::bad_alloc& error) {
      say("bad_alloc", "", error.what());
    } catch (const std::exception& error) {
      say("WRONG", "", error.what());
    }
    throw Failed();
  }

 private:
  using Clock = std::chrono::steady_clock;

  /// How long this thread could have run so far and had no processor. Read before a limit on
  /// descriptors forbids to open anything.
  [[nodiscard]] double queued_ms() const {
    char text[64] = {};
    unsigned long long ran = 0;
    unsigned long long queued = 0;
    if (::pread(schedule_.get(), text, sizeof(text) - 1, 0) <= 0 ||
        std::sscanf(text, "%llu %llu", &ran, &queued) != 2) {
      return 0;
    }
    return static_cast<double>(queued) / 1e6;
  }

  /// World ranks that an error of a call of `group` names.
  [[nodiscard]] std::string named_in(const std::string& text, const std::vector<int>& ranks,
                                     const std::vector<int>& group) const {
    const std::string world = world_ranks_in(text);
    return world.empty() ? named_ranks(ranks, group_in(text, plan_, group)) : world;
  }

  Plan plan_;
  Reporter reporter_;
  UniqueFd schedule_{::open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC)};
};

}  // namespace cohort::chaos
