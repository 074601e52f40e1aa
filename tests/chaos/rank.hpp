// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cohort/cohort.hpp>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <numeric>
#include <optional>
#include <set>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "chaos/machine.hpp"
#include "chaos/plan.hpp"
#include "chaos/steps.hpp"
#include "chaos/trouble.hpp"
#include "own_control_plane/unix_messenger.hpp"
#include "support/collective_checks.hpp"
#include "support/decode_cases.hpp"

/// \file
/// One rank of a round: an engine in miniature. It goes through all phases, checks every result,
/// and tells its supervisor how each step ended.

namespace cohort::chaos {

class Rank {
 public:
  Rank(MakeMachine make, const Plan& plan, int rank, std::string job,
       std::chrono::milliseconds limit, int to, int from)
      : machine_(make(plan, rank, limit)),
        plan_(plan),
        rank_(rank),
        limit_(limit),
        job_(std::move(job)),
        reporter_(to),
        from_(from) {}

  /// Exit status: 0, or 3 where the engine threw on purpose.
  int run() {
    if (machine_->starts_slowly()) {
      warm_up();
    }
    const auto messenger = std::make_shared<own_control_plane::UnixMessenger>(
        job_, rank_, plan_.ranks, std::chrono::milliseconds(20'000));
    MessageControlPlane world(messenger, limit_);
    world.barrier();
    const auto descriptors = entries_of("/proc/self/fd");
    const auto threads = entries_of("/proc/self/task");
    const Trouble trouble(plan_, rank_, limit_);
    {
      std::optional<ParallelState> state;
      go_through_phases(world, state, trouble);
      if (!plan_.keeps_state) {
        state.reset();
      }
      trouble.end();
      reporter_.line("over");
      recover(world);
    }
    if (machine_->leaves_nothing()) {
      expect_no_more("/proc/self/fd", descriptors);
      expect_no_more("/proc/self/task", threads);
    }
    reporter_.line("end");
    return 0;
  }

 private:
  using Clock = std::chrono::steady_clock;

  [[nodiscard]] static std::set<std::string> entries_of(const char* folder) {
    std::set<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
      std::error_code error;
      names.insert(std::filesystem::read_symlink(entry.path(), error).string() + " as " +
                   entry.path().filename().string());
    }
    return names;
  }

  /// Reports what is there that was not `before`.
  void expect_no_more(const char* folder, const std::set<std::string>& before) const {
    auto now = entries_of(folder);
    // A thread that has been joined may be listed a moment longer.
    for (const auto start = Clock::now();
         now.size() > before.size() && Clock::now() - start < std::chrono::seconds(1);
         now = entries_of(folder)) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    if (now.size() <= before.size()) {
      return;  // sockets of peers that have left are closed
    }
    std::string more;
    for (const auto& name : now) {
      more += before.contains(name) ? "" : " " + name;
    }
    reporter_.line(fmt::format("step\tleaving\t1\twhat is left\t0\t0\tWRONG\t\t{} more in {}:{}",
                               now.size() - before.size(), folder, more));
  }

  [[nodiscard]] std::vector<int> everyone() const {
    std::vector<int> ranks(static_cast<std::size_t>(plan_.ranks));
    std::iota(ranks.begin(), ranks.end(), 0);
    return ranks;
  }

  [[nodiscard]] ParallelOptions options(const ParallelLayout& layout) const {
    ParallelOptions options;
    options.layout = layout;
    options.backend = machine_->backend();
    options.symmetric = {.enabled = plan_.symmetric, .selection = Selection::all()};
    options.arena.growth_bytes = std::size_t{1} << 18;
    options.debug_checks = plan_.debug_checks;
    constexpr MergePlan kPlans[] = {MergePlan::automatic, MergePlan::staged, MergePlan::packed};
    options.merge.plan = kPlans[plan_.merge_plan];
    return options;
  }

  /// A state that no limit is judged by.
  void warm_up() {
    const std::chrono::seconds limit(20);
    const auto messenger = std::make_shared<own_control_plane::UnixMessenger>(
        job_ + "-first", rank_, plan_.ranks, limit);
    MessageControlPlane world(messenger, limit);
    auto state =
        ParallelState::create(world, options({.tp = plan_.ranks, .pp = 1, .dcp = plan_.ranks}));
    machine_->follow(state.world());
    test::Site site(state.world(), test::Memory::ordinary, machine_->stream());
    test::check_all_reduce(state.world(), site, {8}, DType::f32, test::Form::contiguous,
                           ReduceOp::sum, machine_->stream());
    state.shutdown();
    world.barrier();
  }

  void go_through_phases(ControlPlane& world, std::optional<ParallelState>& state,
                         const Trouble& trouble) {
    try {
      steps_.run(Phase::forming, 0, everyone(), "create", [&] {
        auto chosen = options({.tp = plan_.tp, .pp = plan_.pp, .dcp = plan_.dcp});
        if (trouble.at(Phase::forming, 0)) {
          chosen.arena.growth_bytes *= 2;
        }
        state.emplace(ParallelState::create(world, std::move(chosen)));
      });
      for (int i = 0; i < kSteps; ++i) {
        reserve(*state, i, trouble);
      }
      for (int i = 0; i < kSteps; ++i) {
        call(*state, Phase::calling, i, trouble);
      }
      replay(*state, trouble);
      steps_.run(Phase::leaving, 0, everyone(), plan_.shuts_down ? "shutdown" : "destroy", [&] {
        const bool other = trouble.at(Phase::leaving, 0);
        if (plan_.shuts_down != other) {
          state->shutdown();
        } else {
          state.reset();
        }
      });
    } catch (const Steps::Failed&) {
      // reported; the engine goes on to what its supervisor decides
    }
  }

  /// By turns a group's arena, room for decode steps, and growth of an arena of several groups.
  void reserve(ParallelState& state, int i, const Trouble& trouble) {
    auto& group = *state.groups()[static_cast<std::size_t>(i) % state.groups().size()];
    const auto bytes = [&] {
      const std::size_t other = trouble.at(Phase::reserving, i) ? std::size_t{1} << 22 : 0;
      return std::size_t{300'000} * static_cast<std::size_t>(i + 1) + other;
    };
    switch (i % 3) {
      case 0:
        return steps_.run(Phase::reserving, i, group.ranks(), "reserve", [&] {
          const std::size_t most = bytes();
          if (i == 0) {
            group.reserve(most);
          } else {
            const CollectiveShape call{.collective = Collective::all_gather,
                                       .shape = {static_cast<std::int64_t>(most)},
                                       .dtype = DType::u8};
            group.reserve_for_calls({&call, 1});
          }
        });
      case 1:
        return steps_.run(Phase::reserving, i, state.dcp().ranks(), "reserve_for", [&] {
          const std::int64_t batch = static_cast<std::int64_t>(bytes()) / 300'000;
          state.dcp().reserve_for(
              {.batch = batch, .heads = 8 * plan_.dcp, .latent = 64, .rope = 16, .value = 64});
        });
      default:
        return steps_.run(Phase::reserving, i, everyone(), "growth of an audience", [&] {
          const auto several = plan_.pp > 1
                                   ? state.audience({&state.tp(), &state.pp()})
                                   : state.audience({&state.tp(), &state.dcp(), &state.world()});
          const SymmetricScope scope(several);
          static_cast<void>(empty({static_cast<std::int64_t>(bytes())}, DType::u8));
        });
    }
  }

  /// A random collective of a random group; every rank draws the same one.
  void call(ParallelState& state, Phase phase, int i, const Trouble& trouble) {
    Random random(plan_.seed * 1000 + static_cast<std::uint64_t>(i) +
                  static_cast<std::uint64_t>(phase) * 100);
    auto& group = *state.groups()[static_cast<std::size_t>(random.below(4))];
    const auto memory = test::kMemories[random.below(plan_.mixed_memory ? 3 : 2)];
    const auto form = test::kForms[random.below(3)];
    const auto dtype = test::kFloats[random.below(3)];
    const int kind = random.below(8);
    const Dims shape{1 + random.below(5), 2 * group.size(), 1 + random.below(600)};
    const int dim = random.below(3);
    const int root = random.below(group.size());
    steps_.run(
        phase, i, kind == 7 ? state.dcp().ranks() : group.ranks(),
        fmt::format("call {} of {}", kind, kind == 7 ? state.dcp().name() : group.name()), [&] {
          Dims mine = shape;
          int mine_kind = kind;
          DType mine_dtype = dtype;
          if (trouble.at(phase, i)) {
            switch (plan_.other) {
              case Other::extent:
                mine[2] += 7;
                break;
              case Other::dtype:
                mine_dtype = dtype == DType::f32 ? DType::bf16 : DType::f32;
                mine[2] += kind == 7 ? 1 : 0;  // whose partials have one type
                break;
              case Other::call:
                mine_kind = kind == 7 ? 3 : (kind + 2) % 6;
                break;
              case Other::nothing:
                return;
            }
          }
          const StreamRef stream = machine_->stream();
          machine_->follow(group);
          test::Site site(group, memory, stream);
          switch (mine_kind) {
            case 0:
              return test::check_all_gather(group, site, mine, dim, equal(group, mine[dim]),
                                            mine_dtype, form, stream);
            case 1:
              return test::check_all_gather(group, site, mine, dim,
                                            test::uneven(mine[dim] * group.size(), group.size()),
                                            mine_dtype, form, stream);
            case 2:
              return test::check_reduce_scatter(group, site, mine, 1, equal(group, 2), mine_dtype,
                                                form, stream);
            case 3:
              return test::check_all_reduce(group, site, mine, mine_dtype, form, ReduceOp::sum,
                                            stream);
            case 4:
              return test::check_broadcast(group, site, mine, mine_dtype, form, root, stream);
            case 5:
              return test::check_all_to_all(group, site, mine, mine_dtype, form, stream);
            case 6:
              return test::check_send_recv(group, site, mine, mine_dtype, form, stream);
            default:
              return decode(state, mine[0] + mine[2] % 9, memory);
          }
        });
  }

  void decode(ParallelState& state, std::int64_t batch, test::Memory memory) {
    auto& dcp = state.dcp();
    machine_->follow(dcp);
    const test::DecodeCase c{.batch = batch, .heads = 4 * dcp.size(), .dim = 24, .memory = memory};
    gather_query(dcp, batch, memory);
    static_cast<void>(test::merge_once(state, c, "merge", false, machine_->stream()));
  }

  /// [B, 2 n, 8] of latents and 4 of positions from every rank's part.
  void gather_query(DecodeContextParallelGroup& dcp, std::int64_t batch, test::Memory memory) {
    constexpr std::int64_t kOwn = 2;
    constexpr std::int64_t kLatent = 8;
    constexpr std::int64_t kRope = 4;
    test::Site site(dcp, memory, machine_->stream());
    const auto nope = site.filled({batch, kOwn, kLatent}, DType::f32);
    const auto pe = site.filled({batch, kOwn, kRope}, DType::f32);
    const Tensor q = dcp.gather_query(nope, pe, machine_->stream());
    test::check_values(q, "gather_query", [&](std::int64_t flat) {
      const std::int64_t d = flat % (kLatent + kRope);
      const std::int64_t head = flat / (kLatent + kRope) % (kOwn * dcp.size());
      const std::int64_t row = flat / (kLatent + kRope) / (kOwn * dcp.size()) * kOwn + head % kOwn;
      return test::value_at(static_cast<int>(head / kOwn),
                            d < kLatent ? row * kLatent + d : row * kRope + d - kLatent);
    });
  }

  static std::vector<std::int64_t> equal(const GroupCoordinator& group, std::int64_t extent) {
    return std::vector<std::int64_t>(static_cast<std::size_t>(group.size()), extent);
  }

  /// A graph over two groups, captured in steps, then launched again and again.
  void replay(ParallelState& state, const Trouble& trouble) {
    const StreamRef stream = machine_->capture_stream();
    machine_->follow(state.world());
    const Tensor x = state.backend().allocate({96}, DType::f32, stream);
    const Tensor gathered = state.backend().allocate({96 * state.tp().size()}, DType::f32, stream);
    std::optional<CapturedGraph> graph;
    int i = 0;
    steps_.run(Phase::capturing, plan_.step, everyone(), "capture", [&] {
      graph.emplace(state.capture(stream, [&] {
        for (; i < kSteps; ++i) {
          const bool other = trouble.at(Phase::capturing, i);
          state.world().all_reduce(x.view().slice(0, 0, other ? 48 : 96), stream);
          state.tp().all_gather_into(gathered.view(), x.view(), 0, stream);
        }
      }));
    });
    for (int launch = 0; launch < kSteps; ++launch) {
      steps_.run(Phase::replaying, launch, everyone(), "launch", [&] {
        if (trouble.at(Phase::replaying, launch)) {
          return;  // makes one launch less than its peers
        }
        test::fill_with(x.view(), [](std::int64_t k) { return k % 3 == 0 ? 1 : 0; });
        graph->launch(stream);
        state.world().synchronize(stream, limit_);
        std::int64_t expected = 1;
        for (int k = 0; k < kSteps; ++k) {
          expected *= plan_.ranks;
        }
        test::check_values(gathered.view(), "a replay",
                           [expected](std::int64_t k) { return k % 96 % 3 == 0 ? expected : 0; });
      });
    }
    steps_.run(Phase::replaying, kSteps, everyone(), "reclaim_graphs", [&] {
      graph.reset();
      state.reclaim_graphs();
    });
  }

  /// The supervisor tells who is left; those form a new state and use it.
  void recover(ControlPlane& world) {
    const std::vector<int> left = survivors();
    if (std::find(left.begin(), left.end(), rank_) == left.end()) {
      return;
    }
    try {
      steps_.run(Phase::forming, 1, left, "recover", [&] {
        const auto again = world.subgroup(left, 7, "survivors");
        auto state = ParallelState::create(
            *again, options({.tp = again->size(), .pp = 1, .dcp = again->size()}));
        const StreamRef stream = machine_->stream();
        machine_->follow(state.tp());
        test::Site site(state.tp(), test::Memory::arena, stream);
        test::check_all_reduce(state.tp(), site, {3, 50}, DType::f32, test::Form::contiguous,
                               ReduceOp::sum, stream);
        test::check_all_gather(state.world(), site, {3, 5}, 1, equal(state.world(), 5), DType::bf16,
                               test::Form::transposed, stream);
        decode(state, 3, plan_.mixed_memory ? test::Memory::mixed : test::Memory::arena);
        state.shutdown();
      });
    } catch (const Steps::Failed&) {
    }
  }

  /// "survivors r r r", from the supervisor.
  std::vector<int> survivors() const {
    std::string text;
    for (char c = 0; c != '\n';) {
      const auto got = ::read(from_, &c, 1);
      if (got == 0 || (got < 0 && errno != EINTR)) {
        std::_Exit(71);
      }
      if (got == 1) {
        text += c;
      }
    }
    std::vector<int> ranks;
    for (const char c : text) {
      if (c >= '0' && c <= '9') {
        ranks.push_back(c - '0');
      }
    }
    return ranks;
  }

  std::unique_ptr<Machine> machine_;  // the first: a card starts before any limit runs
  Plan plan_;
  int rank_;
  std::chrono::milliseconds limit_;
  std::string job_;
  Reporter reporter_;
  int from_;
  Steps steps_{plan_, reporter_};
};

}  // namespace cohort::chaos
