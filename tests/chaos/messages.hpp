// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cohort/cohort.hpp>
#include <cstdio>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "chaos/steps.hpp"
#include "support/faulty_messenger.hpp"

/// \file
/// A rank dies at its k-th message, for each k, in each call that takes several: at once, after it
/// has stopped there, or after it was late. Ranks are threads. Each call of the others ends well or
/// with a typed error within 1.25 times the limit.

namespace cohort::chaos {

/// How the rank dies.
enum class Death : std::uint8_t { throws, stops, is_late_and_stops };
/// In which calls.
enum class Scene : std::uint8_t {
  create,
  reserve,
  reserve_for,
  audience,
  wide_audience,
  reclaim,
  staged_step,
  packed_step,
  all_reduce,
  shutdown
};

inline constexpr std::array kDeaths{Death::throws, Death::stops, Death::is_late_and_stops};
inline constexpr std::array<std::pair<Scene, std::string_view>, 10> kScenes{
    {{Scene::create, "create"},
     {Scene::reserve, "reserve"},
     {Scene::reserve_for, "reserve_for"},
     {Scene::audience, "audience"},
     {Scene::wide_audience, "wide audience"},
     {Scene::reclaim, "reclaim"},
     {Scene::staged_step, "staged step"},
     {Scene::packed_step, "packed step"},
     {Scene::all_reduce, "all_reduce"},
     {Scene::shutdown, "shutdown"}}};

/// One rank that dies, once.
class MessageCase {
 public:
  struct Setting {
    Scene scene = Scene::create;
    Death death = Death::throws;
    int victim = 1;
    int at = -1;  ///< Message at which it dies; never where negative.
    bool map_peers = true;
  };

  MessageCase(const Setting& setting, std::chrono::milliseconds limit)
      : setting_(setting), limit_(limit) {}

  /// What went wrong, a line each.
  std::vector<std::string> run() {
    const auto hub = std::make_shared<detail::ThreadHub>(kRanks);
    trap_->at = setting_.at;
    trap_->late = setting_.death == Death::is_late_and_stops && setting_.at > 0
                      ? limit_ * 9 / 10
                      : std::chrono::milliseconds(0);
    if (setting_.death != Death::throws) {
      trap_->stop = [this] {
        const auto longest = Clock::now() + 4 * limit_;
        while (finished_ < kRanks - 1 && Clock::now() < longest) {
          std::this_thread::sleep_for(std::chrono::milliseconds(2));
        }
      };
    }
    std::vector<std::thread> threads;
    for (int r = 0; r < kRanks; ++r) {
      threads.emplace_back([&, r] { be_rank(hub, r); });
    }
    for (auto& thread : threads) {
      thread.join();
    }
    return std::move(problems_);
  }

  /// Whether the ranks did not even come to the call: the machine had no time for them.
  [[nodiscard]] bool starved() const { return starved_; }
  /// Messages of the victim.
  [[nodiscard]] int messages() const { return trap_->messages; }

 private:
  static constexpr int kRanks = 4;
  /// Beyond 1.25 times the limit, for an oversubscribed machine.
  static constexpr std::chrono::milliseconds kSlack{400};

  void be_rank(const std::shared_ptr<detail::ThreadHub>& hub, int rank) {
    const bool is_victim = rank == setting_.victim;
    const auto trap = is_victim ? trap_ : std::make_shared<test::MessageTrap>();
    MessageControlPlane plane(std::make_shared<test::FaultyMessenger>(hub, rank, trap), limit_);
    std::optional<ParallelState> state;
    try {
      if (setting_.scene != Scene::create) {
        state.emplace(ParallelState::create(plane, options()));
      }
    } catch (const std::exception& error) {
      report(fmt::format("rank {}, before anything had failed: {}", rank, error.what()));
      starved_ = true;
    }
    meet();
    if (!starved_) {
      trap->armed = true;
      try {
        play(plane, state, rank);
      } catch (const std::exception& error) {
        report(fmt::format("rank {}: {}", rank, error.what()));
      }
    }
    if (!is_victim) {
      ++finished_;
    }
    meet();  // nobody destroys what others still look at
    trap->armed = false;
  }

  [[nodiscard]] ParallelOptions options() const {
    ParallelOptions options;
    options.layout = setting_.scene == Scene::wide_audience
                         ? ParallelLayout{.tp = 2, .pp = 2, .dcp = 2}
                         : ParallelLayout{.tp = 4, .pp = 1, .dcp = 2};
    options.backend = host_backend({.slot_bytes = 4096, .map_peers = setting_.map_peers});
    options.symmetric = {.enabled = true, .selection = Selection::all()};
    options.arena.growth_bytes = 1 << 16;
    options.merge.plan =
        setting_.scene == Scene::staged_step ? MergePlan::staged : MergePlan::packed;
    return options;
  }

  void meet() {
    const int round = met_++ / kRanks + 1;
    while (met_ < round * kRanks) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }

  void play(ControlPlane& plane, std::optional<ParallelState>& state, int rank) {
    const auto call = [&](std::string_view name, const std::function<void()>& body) {
      return judge(name, rank, body);
    };
    switch (setting_.scene) {
      case Scene::create:
        if (call("create", [&] { state.emplace(ParallelState::create(plane, options())); }) &&
            setting_.at >= 0) {
          // Of a rank that died at the last moment only some may know: they learn it here.
          if (call("first call", [&] { state->world().barrier(); })) {
            report(fmt::format("rank {} goes on without rank {}", rank, setting_.victim));
          }
        }
        return;
      case Scene::reserve:
        call("reserve", [&] { state->tp().reserve(300'000); });
        return;
      case Scene::reserve_for:
        call("reserve_for", [&] {
          state->dcp().reserve_for({.batch = 8, .heads = 8, .latent = 64, .rope = 8, .value = 64});
        });
        return;
      case Scene::audience:
        return grow({&state->tp(), &state->dcp()}, *state, call);
      case Scene::wide_audience:
        return grow({&state->tp(), &state->pp(), &state->world()}, *state, call);
      case Scene::reclaim:
        call("reclaim_graphs", [&] { state->reclaim_graphs(); });
        return;
      case Scene::staged_step:
      case Scene::packed_step:
        return step(state->dcp(), call);
      case Scene::all_reduce: {
        std::vector<float> x(5'000, 1.0F);
        call("all_reduce", [&] { state->tp().all_reduce({x.data(), DType::f32, {5'000}}); });
        return;
      }
      case Scene::shutdown:
        call("shutdown", [&] { state->shutdown(); });
    }
  }

  template <class Call>
  static void grow(const std::vector<GroupCoordinator*>& groups, ParallelState& state,
                   const Call& call) {
    ScopeTarget target;
    if (call("audience", [&] { target = state.audience(groups); })) {
      call("growth", [&] {
        const SymmetricScope scope(target);
        const Tensor t = empty({100'000}, DType::u8);
      });
    }
  }

  template <class Call>
  static void step(DecodeContextParallelGroup& dcp, const Call& call) {
    std::vector<float> memory(8 * 8 * 64, 0.5F);
    const auto view = [&](const Dims& shape) {
      return TensorView(memory.data(), DType::f32, shape);
    };
    if (call("gather_query", [&] { (void)dcp.gather_query(view({8, 4, 32}), view({8, 4, 8})); })) {
      call("merge_attention", [&] { (void)dcp.merge_attention(view({8, 8, 64}), view({8, 8})); });
    }
  }

  /// A failure of another group, or a wait for ranks of others: none of the one that the call was
  /// of.
  static bool names_elsewhere(const std::string& text) { return !world_ranks_in(text).empty(); }

  /// Whether the call ended well.
  bool judge(std::string_view name, int rank, const std::function<void()>& body) {
    const auto start = Clock::now();
    std::string outcome = "ok";
    std::string wrong;
    try {
      body();
    } catch (const TimeoutError& error) {
      outcome = error.what();
      wrong = error.missing().empty() && !names_elsewhere(outcome) ? "names nobody" : "";
    } catch (const SymmetryError& error) {
      outcome = error.what();
      wrong = error.ranks().empty() && !names_elsewhere(outcome) ? "names nobody" : "";
    } catch (const TransportError& error) {
      outcome = error.what();
    } catch (const std::exception& error) {
      outcome = error.what();
      wrong = "not an error of this kind";
    }
    if (rank == setting_.victim) {
      return outcome == "ok";
    }
    const auto took = Clock::now() - start;
    if (took > limit_ * 5 / 4 + kSlack) {
      wrong = "took too long";
    }
    if (outcome != "ok" && setting_.at < 0) {
      wrong = "nothing had failed";
    }
    if (!wrong.empty()) {
      report(fmt::format("rank {}, {}: {} (after {} ms: {})", rank, name, wrong,
                         std::chrono::duration_cast<std::chrono::milliseconds>(took).count(),
                         outcome));
    }
    return outcome == "ok";
  }

  void report(std::string problem) {
    const std::lock_guard lock(mutex_);
    problems_.push_back(std::move(problem));
  }

  Setting setting_;
  std::chrono::milliseconds limit_;
  std::shared_ptr<test::MessageTrap> trap_ = std::make_shared<test::MessageTrap>();
  std::atomic<int> met_{0};
  std::atomic<int> finished_{0};
  std::atomic<bool> starved_ = false;
  std::mutex mutex_;
  std::vector<std::string> problems_;
};

/// Runs `most` of all cases, always the same, or all where that is 0. Returns how many went wrong,
/// and says which.
inline int run_messages(int most, std::chrono::milliseconds limit) {
  set_default_log_level(LogLevel::error);
  std::vector<MessageCase::Setting> cases;
  int failed = 0;
  const auto say = [&](const MessageCase::Setting& setting,
                       const std::vector<std::string>& problems) {
    const auto name = kScenes[static_cast<std::size_t>(setting.scene)].second;
    std::printf("%s%s, rank %d dies at message %d, way %d\n", std::string(name).c_str(),
                setting.map_peers ? "" : ", apart", setting.victim, setting.at,
                static_cast<int>(setting.death));
    for (const auto& problem : problems) {
      std::printf("  %s\n", problem.c_str());
    }
    ++failed;
  };
  for (const auto& [scene, name] : kScenes) {
    for (const bool map_peers : {true, false}) {
      for (const int victim : {1, 2}) {
        MessageCase::Setting setting{.scene = scene, .victim = victim, .map_peers = map_peers};
        MessageCase whole(setting, limit);
        if (const auto problems = whole.run(); !problems.empty()) {
          say(setting, problems);
        }
        for (setting.at = 0; setting.at < whole.messages(); ++setting.at) {
          for (const Death death : kDeaths) {
            setting.death = death;
            cases.push_back(setting);
          }
        }
      }
    }
  }
  const std::size_t all = cases.size();
  if (most > 0) {
    std::shuffle(cases.begin(), cases.end(), std::mt19937_64(1));
    cases.resize(std::min(cases.size(), static_cast<std::size_t>(most)));
  }
  // They wait most of the time, so many go on at once.
  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  std::vector<std::thread> workers;
  for (int i = 0; i < 10; ++i) {
    workers.emplace_back([&] {
      for (std::size_t j = next++; j < cases.size(); j = next++) {
        std::vector<std::string> problems;
        bool starved = true;
        for (int attempt = 0; starved && attempt < 3; ++attempt) {
          MessageCase one(cases[j], limit);
          problems = one.run();
          starved = one.starved();
        }
        if (const std::lock_guard lock(mutex); !problems.empty()) {
          say(cases[j], problems);
        }
      }
    });
  }
  for (auto& worker : workers) {
    worker.join();
  }
  std::printf("%zu of %zu cases\n", cases.size(), all);
  std::printf("cohort-test: passed=%zu failed=%d skipped=0\n",
              cases.size() - std::min(cases.size(), static_cast<std::size_t>(failed)), failed);
  return failed;
}

}  // namespace cohort::chaos
