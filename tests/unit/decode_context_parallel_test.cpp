// SPDX-License-Identifier: Apache-2.0
#include "cohort/decode_context_parallel.hpp"

#include <atomic>
#include <chrono>
#include <thread>

#include "support/catch.hpp"
#include "support/counting_driver.hpp"
#include "support/decode_checks.hpp"
#include "support/partials_checks.hpp"
#include "support/query_checks.hpp"
#include "support/stand_in_backend.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::test;

TEST_CASE("merges are exact in every plan, type, base, layout and memory", "[dcp]") {
  for (const int n : {1, 2, 3, 4, 8}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_merges); }
  }
}

TEST_CASE("merges with exactly known answers", "[dcp]") {
  for (const int n : {1, 2, 3, 4, 8}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_exact_merges); }
  }
}

TEST_CASE("splits, sinks and ranks without tokens are merged exactly into every result", "[dcp]") {
  for (const int n : {1, 2, 3, 4, 5, 6, 7, 8}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_partials); }
  }
}

TEST_CASE("a sink counts once in the group", "[dcp]") {
  for (const int n : {1, 2, 4, 8}) {
    for (const auto& plan : partials_plans()) {
      run_ranks(n, [&](ControlPlane& world) {
        auto state = decode_state(world, plan.merge, plan.host);
        check_exact_partials(state.dcp());
      });
    }
  }
}

TEST_CASE("by head, by token and replicated are the same rows", "[dcp]") {
  for (const int n : {1, 2, 3, 8}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_results_agree); }
  }
}

TEST_CASE("what was reserved suffices for every result, eagerly and captured", "[dcp]") {
  for (const int n : {1, 2, 3}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_reserved_partials); }
  }
}

TEST_CASE("wrong partials are named, and the group works on", "[dcp]") {
  for (const int n : {1, 3}) {
    run_ranks(n, [](ControlPlane& world) {
      auto state = decode_state(world, {});
      check_wrong_partials(state.dcp());
    });
  }
}

TEST_CASE("a rank that merges otherwise than its peers is found", "[dcp]") {
  const auto found = [](MergePlan plan, bool map_peers, bool debug) {
    run_ranks(3, [=](ControlPlane& world) { check_other_partials(world, plan, map_peers, debug); });
  };
  found(MergePlan::one_kernel, true, false);
  found(MergePlan::one_kernel, true, true);
  for (const MergePlan plan : {MergePlan::packed, MergePlan::staged}) {
    found(plan, true, false);
    found(plan, false, false);
  }
}

TEST_CASE("queries of all heads are gathered in rank order", "[dcp]") {
  for (const int n : {1, 2, 3, 4, 8}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_gather_query); }
  }
}

TEST_CASE("quantised queries and their scales are gathered as rows of bytes", "[dcp]") {
  for (const int n : {1, 2, 3, 4, 8}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_gather_quantised); }
  }
}

TEST_CASE("all ranks' counts and slots of a step make up its sequences", "[dcp]") {
  for (const int n : {1, 2, 3, 4, 8}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_placed_steps); }
  }
}

TEST_CASE("what was reserved suffices for every plan", "[dcp]") {
  for (const int n : {1, 2, 3}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_reserved_decode); }
  }
}

TEST_CASE("steps of up to what was reserved run in a frozen arena and in graphs", "[dcp]") {
  for (const int n : {1, 2, 3}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_reserved_steps); }
  }
}

TEST_CASE("a rank that is late and then does not go on keeps nobody beyond the call's limit",
          "[dcp]") {
  // Eagerly one limit for the call; in a graph one for each of the two steps that were recorded.
  const bool captured = GENERATE(true, false);
  constexpr std::chrono::milliseconds kLimit(800);
  std::atomic<int> ended{0};
  run_ranks(
      3,
      [&](ControlPlane& world) {
        // The last rank takes part in the first step of its staged merge, and not in the second.
        bool stops = false;
        StandIns steps;
        steps.reduce_scatter = [&](const ControlPlane&) {
          while (stops && ended < 2) {
            std::this_thread::sleep_for(std::chrono::milliseconds(5));
          }
          if (stops) {
            throw TransportError({.call = "reduce_scatter"}, "stopped");
          }
        };
        auto state = make_state(world, {.tp = 3, .dcp = 3},
                                {.backend = std::make_shared<StandInBackend>(
                                     std::move(steps), HostOptions{.map_peers = captured}),
                                 .merge = {.plan = MergePlan::staged}});
        auto& dcp = state.dcp();
        dcp.reserve_for({.batch = 2, .heads = 6, .value = 8, .dtype = DType::f32});
        Site site(dcp, Memory::ordinary);
        const Partial p(dcp, site, {.batch = 2, .heads = 6, .dim = 8});
        HostStream stream;
        const auto merge = [&] { dcp.merge_attention_into(p.merged, p.out, p.lse, {}, stream); };
        auto graph = state.capture(stream, merge);
        world.barrier();
        if (world.rank() == 2) {
          std::this_thread::sleep_for(kLimit * 8 / 10);
          stops = true;
          check_throws<TransportError>(merge);
          return;
        }
        const auto start = Clock::now();
        check_throws<Error>([&] { captured ? graph.launch(stream) : merge(); });
        ++ended;
        const auto most = kLimit * (captured ? 2 : 1) * 5 / 4 + std::chrono::milliseconds(300);
        check(Clock::now() - start < most, "the limit");
      },
      kLimit);
}

TEST_CASE("a decode step asks its stream twice for its capture", "[dcp]") {
  run_ranks(2, [](ControlPlane& world) {
    for (const MergePlan plan : {MergePlan::staged, MergePlan::packed, MergePlan::one_kernel}) {
      for (const bool map_peers : {true, false}) {
        if (plan == MergePlan::one_kernel && !map_peers) {
          continue;
        }
        auto state = decode_state(world, {.plan = plan}, {.map_peers = map_peers});
        auto& dcp = state.dcp();
        Site site(dcp, Memory::ordinary);
        const DecodeCase c{.batch = 2, .heads = 4, .dim = 8};
        const Partial p(dcp, site, c);
        const auto q = site.tensor({2, 4, 12}, DType::f32);
        const auto nope = site.filled({2, 2, 8}, DType::f32);
        const auto pe = site.filled({2, 2, 4}, DType::f32);
        CountingDriver driver;
        HostStream host;
        const StreamRef stream = driver.ref(host);
        dcp.gather_query_into(q, nope, pe, stream);
        check_equal(driver.asked(), 1, "gather_query_into");
        dcp.merge_attention_into({p.merged, p.merged_lse}, {p.out, p.lse, c.base}, stream);
        check_equal(driver.asked(), 1, "merge_attention_into");
        (void)dcp.gather_query(nope, pe, stream);
        check_equal(driver.asked(), 1, "gather_query");
        (void)dcp.merge_attention(p.out, p.lse, c.base, stream);
        check_equal(driver.asked(), 1, "merge_attention");
        check_equal(driver.waits(), 0, "one stream");
      }
    }
  });
}

TEST_CASE("the merge that was taken can be read back", "[dcp]") {
  run_ranks(2, [](ControlPlane& world) {
    const DecodeCase c{.batch = 1, .heads = 2, .dim = 8};
    const auto taken = [&](const MergeOptions& options) {
      auto state = decode_state(world, options);
      check(state.dcp().last_merge_choice().reason.empty(), "before the first merge");
      (void)merge_once(state, c, "reasons");
      return state.dcp().last_merge_choice();
    };
    check(taken({}).reason == "every rank can address every other", "automatic");
    for (const MergePlan plan : {MergePlan::staged, MergePlan::packed, MergePlan::one_kernel}) {
      const MergeChoice choice = taken({.plan = plan});
      check(choice.plan == plan && choice.reason == "chosen by the user", choice.reason);
    }
    // What keeps the kernel from one shape is told, and gone with the next.
    auto state = decode_state(world, {}, {.slot_bytes = 4096});
    (void)merge_once(state, {.batch = 1, .heads = 2, .dim = 4096}, "too wide");
    const MergeChoice choice = state.dcp().last_merge_choice();
    check(choice.plan == MergePlan::packed, "packed");
    check(choice.reason.find("16388 bytes") != std::string::npos, choice.reason);
    (void)merge_once(state, c, "narrow");
    check(state.dcp().last_merge_choice().plan == MergePlan::one_kernel, "one_kernel");
  });
}

TEST_CASE("a forced plan that cannot run is refused", "[dcp]") {
  run_ranks(2, [](ControlPlane& world) {
    check_throws<ConfigError>(
        [&] { (void)decode_state(world, {.plan = MergePlan::one_kernel}, {.map_peers = false}); },
        "one_kernel", "no peer mapping", "ranks out of peer reach");
    // A row that no inbox slot has room for: known only at the call.
    auto state = decode_state(world, {.plan = MergePlan::one_kernel}, {.slot_bytes = 4096});
    Site site(state.dcp(), Memory::ordinary);
    const DecodeCase wide{.batch = 1, .heads = 2, .dim = 4096};
    const Partial partial(state.dcp(), site, wide);
    check_throws<ConfigError>(
        [&] { state.dcp().merge_attention_into(partial.merged, partial.out, partial.lse); },
        "one_kernel", "16388 bytes");
    (void)merge_once(state, {.batch = 1, .heads = 2, .dim = 8}, "afterwards");
  });
}

TEST_CASE("automatic falls back to packed and says why", "[dcp]") {
  run_ranks(2, [](ControlPlane& world) {
    auto far = decode_state(world, {}, {.map_peers = false});
    (void)merge_once(far, {.batch = 1, .heads = 2, .dim = 8}, "far");
    check(far.dcp().last_merge_choice().plan == MergePlan::packed, "packed");
    check(far.dcp().last_merge_choice().reason.find("no peer mapping") != std::string::npos,
          far.dcp().last_merge_choice().reason);
    auto off = ParallelState::create(world, {.layout = {.tp = 2, .dcp = 2},
                                             .backend = host_backend(),
                                             .symmetric = {.peer_mapping = false}});
    (void)merge_once(off, {.batch = 1, .heads = 2, .dim = 8}, "off");
    check(off.dcp().last_merge_choice().reason.find("disabled by user") != std::string::npos,
          off.dcp().last_merge_choice().reason);
  });
}

TEST_CASE("wrong decode arguments are named, and the group works on", "[dcp]") {
  for (const int n : {1, 2}) {
    run_ranks(n, [n](ControlPlane& world) {
      auto state = decode_state(world, {});
      auto& dcp = state.dcp();
      Site site(dcp, Memory::ordinary);
      const DecodeCase c{.batch = 2, .heads = 2 * n, .dim = 8};
      const Partial p(dcp, site, c);
      const auto merge = [&](const TensorView& merged, const TensorView& out, const TensorView& lse,
                             std::optional<TensorView> merged_lse = {}) {
        return [&dcp, merged, out, lse, merged_lse] {
          dcp.merge_attention_into({merged, merged_lse}, {out, lse});
        };
      };
      const auto i32 = site.tensor(p.out.shape(), DType::i32);
      const auto flat = p.out.reshape({2 * n, 16});
      check_throws<UsageError>(merge(p.merged, flat, p.lse), "merge_attention out", "[B, H, D]");
      check_throws<UsageError>(merge(p.merged, i32, p.lse), "merge_attention out", "i32");
      check_throws<UsageError>(merge(p.merged, p.out.transpose(0, 2), p.lse), "merge_attention");
      check_throws<UsageError>(merge(p.merged.slice(0, 0, 1), p.out, p.lse), "merged", "expected");
      check_throws<UsageError>(merge(p.merged, p.out, p.lse.slice(1, 0, 1)), "lse", "expected");
      check_throws<UsageError>(merge(p.merged, p.out, p.merged), "lse");
      check_throws<UsageError>(merge(p.merged, p.out, p.lse, p.merged), "merged_lse");
      if (n > 1) {
        check_throws<UsageError>(merge(p.merged, p.out.slice(1, 0, 3), p.lse), "2 ranks divide");
      }
      const auto gaps = site.tensor({2, 2 * n, 16}, DType::f32);
      const TensorView every_other(gaps.data(), DType::f32, {2, 2 * n, 8}, {32 * n, 16, 2});
      check_throws<UsageError>(merge(p.merged, every_other, p.lse), "without gaps");

      const auto q = site.tensor({2, 2 * n, 12}, DType::f32);
      const auto nope = site.tensor({2, 2, 8}, DType::f32);
      const auto pe = site.tensor({2, 2, 4}, DType::f32);
      // What else is wrong is in query_arguments_test.cpp and decode_room_test.cpp.
      check_throws<UsageError>([&] { dcp.gather_query_into(q.slice(2, 0, 8), nope, pe); },
                               "gather_query q:");
      check_throws<UsageError>([&] { (void)dcp.gather_query(nope, pe.slice(0, 0, 1)); },
                               "gather_query q_pe");
      check_throws<UsageError>([&] { dcp.reserve_for({.batch = -1, .heads = 2 * n}); },
                               "reserve_for", "-1");
      auto* const odd = static_cast<std::byte*>(nope.data()) + 1;
      check_throws<UsageError>(merge(p.merged, p.out, TensorView(odd, DType::f32, {2, 2 * n})),
                               "merge_attention lse", "a multiple of 4 bytes");

      (void)merge_once(state, c, "afterwards");
      state.shutdown();
      check_throws<UsageError>(merge(p.merged, p.out, p.lse), "dcp[0]", "after shutdown");
      check_throws<UsageError>([&] { (void)dcp.gather_query(nope, pe); }, "after shutdown");
      check_throws<UsageError>([&] { dcp.reserve_for({}); }, "after shutdown");
    });
  }
}
