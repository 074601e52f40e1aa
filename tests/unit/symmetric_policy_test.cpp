// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cohort/symmetric_policy.hpp>
#include <string>
#include <utility>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using test::contains;

namespace {

constexpr GroupKind kKinds[] = {GroupKind::world, GroupKind::tensor_parallel,
                                GroupKind::pipeline_parallel, GroupKind::decode_context_parallel};
constexpr auto kDcp = GroupKind::decode_context_parallel;
constexpr auto kTp = GroupKind::tensor_parallel;
constexpr auto kPp = GroupKind::pipeline_parallel;

const ParallelLayout kLayout{.tp = 4, .pp = 2, .dcp = 2};

// One machine of NVLinked GPUs with a current NCCL.
SymmetricCapabilities good_cuda() {
  return {.backend = BackendKind::cuda,
          .transport_windows = true,
          .nccl_header_version = 22803,
          .nccl_runtime_version = 22803,
          .nccl_win_enable = true,
          .nccl_cumem_enabled = true,
          .nccl_hosts = 1,
          .nvlink_reach = true,
          .machines = 1,
          .peer_access = true,
          .peer_import = true};
}

SymmetricCapabilities good_host() {
  SymmetricCapabilities found;
  found.transport_windows = true;
  found.machines = 1;
  found.peer_access = true;
  found.peer_import = true;
  return found;
}

// Calls `use` with every combination of facts.
template <class Use>
void for_all_capabilities(const Use& use) {
  for (unsigned bits = 0; bits < (1U << 9); ++bits) {
    for (const int header : {0, 22702, 22703, 22803}) {
      for (const int runtime : {0, 22702, 22703, 23007}) {
        const auto bit = [bits](unsigned i) { return (bits >> i & 1U) != 0; };
        use(SymmetricCapabilities{.backend = bit(0) ? BackendKind::cuda : BackendKind::host,
                                  .transport_windows = bit(1),
                                  .nccl_header_version = header,
                                  .nccl_runtime_version = runtime,
                                  .nccl_win_enable = bit(2),
                                  .nccl_cumem_enabled = bit(3),
                                  .nccl_hosts = bit(4) ? 1 : 2,
                                  .nvlink_reach = bit(5),
                                  .machines = bit(6) ? 1 : 3,
                                  .peer_access = bit(7),
                                  .peer_import = bit(8)});
      }
    }
  }
}

// Options, with what each kind should find selected for a layout with dcp > 1 and one without.
struct Choice {
  SymmetricOptions options;
  std::vector<GroupKind> selected_with_dcp;
  std::vector<GroupKind> selected_without_dcp;
};

std::vector<Choice> choices() {
  const std::vector<GroupKind> all = {kTp, kPp, kDcp};
  std::vector<Choice> list;
  for (const bool enabled : {false, true}) {
    for (const bool peers : {false, true}) {
      const auto add = [&](Selection selection, std::vector<GroupKind> with,
                           std::vector<GroupKind> without) {
        list.push_back({{.enabled = enabled, .selection = selection, .peer_mapping = peers},
                        std::move(with),
                        std::move(without)});
      };
      add(Selection::automatic(), {kDcp}, all);
      add(Selection::all(), all, all);
      add(Selection::none(), {}, {});
      add(Selection::of({GroupKind::world}), {GroupKind::world}, {GroupKind::world});
      add(Selection::of({kTp, kDcp}), {kTp, kDcp}, {kTp, kDcp});
    }
  }
  return list;
}

// The first failing condition of a list, or `granted`.
using Conditions = std::vector<std::pair<bool, Reason>>;
Reason first_failing(const Conditions& conditions) {
  for (const auto& [fails, reason] : conditions) {
    if (fails) {
      return reason;
    }
  }
  return Reason::granted;
}

Conditions peer_conditions(const SymmetricCapabilities& found) {
  return {{found.machines > 1, Reason::out_of_peer_reach},
          {!found.peer_access, Reason::out_of_peer_reach},
          {!found.peer_import, Reason::out_of_peer_reach}};
}

Reason expected_windows(const Choice& choice, bool selected, int size,
                        const SymmetricCapabilities& found) {
  Conditions conditions = {{!choice.options.enabled, Reason::disabled_by_user},
                           {size == 1, Reason::single_rank},
                           {!selected, Reason::not_selected}};
  if (found.backend == BackendKind::host) {
    conditions.emplace_back(!found.transport_windows, Reason::no_window_support);
    for (const auto& condition : peer_conditions(found)) {
      conditions.push_back(condition);
    }
    return first_failing(conditions);
  }
  conditions.emplace_back(found.nccl_header_version < 22703, Reason::no_window_support);
  conditions.emplace_back(found.nccl_runtime_version < 22703, Reason::nccl_too_old);
  conditions.emplace_back(!found.transport_windows, Reason::no_window_support);
  conditions.emplace_back(!found.nccl_win_enable, Reason::no_window_support);
  conditions.emplace_back(!found.nccl_cumem_enabled, Reason::no_window_support);
  conditions.emplace_back(found.nccl_hosts > 1, Reason::out_of_nvlink_reach);
  conditions.emplace_back(!found.nvlink_reach, Reason::out_of_nvlink_reach);
  return first_failing(conditions);
}

Reason expected_peers(const Choice& choice, int size, const SymmetricCapabilities& found) {
  Conditions conditions = {{!choice.options.peer_mapping, Reason::disabled_by_user},
                           {size == 1, Reason::single_rank}};
  for (const auto& condition : peer_conditions(found)) {
    conditions.push_back(condition);
  }
  return first_failing(conditions);
}

}  // namespace

TEST_CASE("every combination of options and facts has the one right reason", "[policy]") {
  const auto list = choices();
  int combinations = 0;
  for (const ParallelLayout& layout :
       {kLayout, ParallelLayout{.tp = 2, .pp = 1, .dcp = 1}, ParallelLayout{}}) {
    for (const GroupKind kind : kKinds) {
      const int size = group_size(layout, kind);
      for (const Choice& choice : list) {
        const auto& kinds = layout.dcp > 1 ? choice.selected_with_dcp : choice.selected_without_dcp;
        const bool selected = std::ranges::find(kinds, kind) != kinds.end();
        for_all_capabilities([&](const SymmetricCapabilities& found) {
          const auto decision = decide(choice.options, kind, layout, found);
          const Reason windows = expected_windows(choice, selected, size, found);
          const Reason peers = expected_peers(choice, size, found);
          const bool requested = choice.options.enabled && selected && size > 1;
          const bool right =
              decision.kind == kind && decision.group_size == size &&
              decision.requested == requested && decision.nccl_windows.reason == windows &&
              decision.nccl_windows.on == (windows == Reason::granted) &&
              decision.peer_mapping.reason == peers &&
              decision.peer_mapping.on == (peers == Reason::granted) &&
              warning_due(decision) ==
                  (requested && (windows != Reason::granted || peers == Reason::out_of_peer_reach));
          ++combinations;
          if (!right) {  // REQUIRE alone would take minutes for so many
            FAIL(describe(decision) << " for " << to_string(layout) << ", expected "
                                    << to_string(windows) << " and " << to_string(peers));
          }
        });
      }
    }
  }
  CHECK(combinations == 3 * 4 * 20 * 512 * 16);
}

TEST_CASE("what one answer must not depend on", "[policy]") {
  SymmetricOptions on{.enabled = true, .selection = Selection::all()};
  SymmetricOptions off{.enabled = false, .selection = Selection::none()};
  for_all_capabilities([&](SymmetricCapabilities found) {
    const auto decision = decide(on, kDcp, kLayout, found);
    // symmetric off concerns callers' buffers: the inboxes' mapping remains
    const bool peers = decision.peer_mapping.on;
    bool same = decide(off, kDcp, kLayout, found).peer_mapping.on == peers;
    // NCCL_HOSTID and the rest of NCCL's view say nothing about peers
    SymmetricCapabilities other = found;
    other.nccl_hosts = 3 - found.nccl_hosts;
    other.nccl_runtime_version = 0;
    other.nccl_win_enable = !found.nccl_win_enable;
    other.nvlink_reach = !found.nvlink_reach;
    other.transport_windows = !found.transport_windows;
    same = same && decide(on, kDcp, kLayout, other).peer_mapping.on == peers;
    // nor does the machine's view say anything about NCCL's windows
    other = found;
    other.machines = 4 - found.machines;
    other.peer_access = !found.peer_access;
    other.peer_import = !found.peer_import;
    same = same && (found.backend == BackendKind::host ||
                    decide(on, kDcp, kLayout, other).nccl_windows.on == decision.nccl_windows.on);
    if (!same) {
      FAIL(describe(decision));
    }
  });
}

TEST_CASE("the user's one line turns DCP on", "[policy]") {
  struct Options {
    ParallelLayout layout;
    SymmetricOptions symmetric;
  };
  const Options options{.layout = {.tp = 8, .pp = 1, .dcp = 8}, .symmetric = {.enabled = true}};
  const auto dcp = decide(options.symmetric, kDcp, options.layout, good_cuda());
  CHECK(dcp.nccl_windows.on);
  CHECK(dcp.peer_mapping.on);
  CHECK(describe(dcp) == "dcp of 8 ranks: windows on; peer mapping on");
  const auto tp = decide(options.symmetric, kTp, options.layout, good_cuda());
  CHECK(tp.nccl_windows.reason == Reason::not_selected);
  CHECK(tp.peer_mapping.on);
  CHECK_FALSE(warning_due(tp));
}

TEST_CASE("without DCP automatic means TP and PP", "[policy]") {
  const ParallelLayout layout{.tp = 4, .pp = 2, .dcp = 1};
  const SymmetricOptions options{.enabled = true};
  CHECK(decide(options, kTp, layout, good_host()).nccl_windows.on);
  CHECK(decide(options, kPp, layout, good_host()).nccl_windows.on);
  CHECK(decide(options, kDcp, layout, good_host()).nccl_windows.reason == Reason::single_rank);
  CHECK(decide(options, GroupKind::world, layout, good_host()).nccl_windows.reason ==
        Reason::not_selected);
}

TEST_CASE("all lets TP, PP and DCP coexist", "[policy]") {
  const SymmetricOptions options{.enabled = true, .selection = Selection::all()};
  for (const GroupKind kind : {kTp, kPp, kDcp}) {
    CHECK(decide(options, kind, kLayout, good_cuda()).nccl_windows.on);
  }
}

TEST_CASE("facts that nobody filled in grant nothing", "[policy]") {
  const SymmetricOptions options{.enabled = true, .selection = Selection::all()};
  for (const auto backend : {BackendKind::host, BackendKind::cuda}) {
    SymmetricCapabilities nothing;
    nothing.backend = backend;
    const auto decision = decide(options, kDcp, kLayout, nothing);
    CHECK_FALSE(decision.nccl_windows.on);
    CHECK_FALSE(decision.peer_mapping.on);
    CHECK(warning_due(decision));
  }
}

TEST_CASE("refusals name the fact", "[policy]") {
  const SymmetricOptions options{.enabled = true};
  const auto line = [&](auto change) {
    SymmetricCapabilities found = good_cuda();
    change(found);
    return describe(decide(options, kDcp, kLayout, found));
  };
  CHECK_THAT(line([](auto& found) { found.nccl_runtime_version = 22605; }),
             contains("windows off (NCCL too old", "2.26.5", "2.27.3", "peer mapping on"));
  CHECK_THAT(line([](auto& found) { found.nccl_header_version = 22304; }),
             contains("no window support", "built with NCCL 2.23.4"));
  CHECK_THAT(line([](auto& found) { found.transport_windows = false; }),
             contains("no window support", "2.28.3"));
  CHECK_THAT(line([](auto& found) { found.nccl_win_enable = false; }),
             contains("no window support", "NCCL_WIN_ENABLE=0"));
  CHECK_THAT(line([](auto& found) { found.nccl_cumem_enabled = false; }),
             contains("no window support", "NCCL_CUMEM_ENABLE"));
  CHECK_THAT(line([](auto& found) { found.nccl_hosts = 2; }),
             contains("ranks out of NVLink reach", "2 hosts"));
  CHECK_THAT(line([](auto& found) { found.nvlink_reach = false; }),
             contains("ranks out of NVLink reach", "NVLink domain"));
  CHECK_THAT(line([](auto& found) { found.machines = 2; }),
             contains("windows on", "ranks out of peer reach", "2 machines"));
  CHECK_THAT(line([](auto& found) { found.peer_access = false; }), contains("every device"));
  CHECK_THAT(line([](auto& found) { found.peer_import = false; }), contains("import"));
}

TEST_CASE("a refusal carries the cause that the ranks found", "[policy]") {
  const SymmetricOptions options{.enabled = true};
  const std::string cause = "rank 1 with rank 0: readlink failed with code 13: Permission denied";
  SymmetricCapabilities found = good_cuda();
  found.peer_import = false;
  found.obstacle = cause;
  CHECK(decide(options, kDcp, kLayout, found).peer_mapping.detail == cause);
  found.backend = BackendKind::host;
  CHECK(decide(options, kDcp, kLayout, found).nccl_windows.detail == cause);
  found.peer_access = false;  // what was found out counts before what follows from it
  CHECK(decide(options, kDcp, kLayout, found).peer_mapping.detail == cause);
  found.transport_windows = false;
  CHECK(decide(options, kDcp, kLayout, found).nccl_windows.detail ==
        "segments are not memory files here: " + cause);
}

TEST_CASE("warnings are for what the machine denies, not for what the user chose", "[policy]") {
  SymmetricCapabilities far = good_cuda();
  far.nccl_hosts = 2;
  far.machines = 2;
  CHECK(warning_due(decide({.enabled = true}, kDcp, kLayout, far)));
  CHECK_FALSE(warning_due(decide({.enabled = true}, kTp, kLayout, far)));
  CHECK_FALSE(warning_due(decide({.enabled = false}, kDcp, kLayout, far)));
  CHECK_FALSE(warning_due(decide({.enabled = true}, kDcp, {}, far)));
  CHECK_FALSE(
      warning_due(decide({.enabled = true, .peer_mapping = false}, kDcp, kLayout, good_cuda())));
}

TEST_CASE("a layout that cannot work is refused", "[policy]") {
  CHECK_THROWS_AS(decide({}, kDcp, {.tp = 3, .pp = 1, .dcp = 2}, {}), ConfigError);
}
