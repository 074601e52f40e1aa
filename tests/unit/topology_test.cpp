// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cohort/topology.hpp>
#include <limits>
#include <string>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using test::says;
using Groups = std::vector<std::vector<int>>;

namespace {

constexpr GroupKind kKinds[] = {GroupKind::world, GroupKind::tensor_parallel,
                                GroupKind::pipeline_parallel, GroupKind::decode_context_parallel};

std::vector<ParallelLayout> valid_layouts() {
  std::vector<ParallelLayout> layouts;
  for (int tp = 1; tp <= 16; ++tp) {
    for (int pp = 1; pp <= 5; ++pp) {
      for (int dcp = 1; dcp <= tp; ++dcp) {
        if (tp % dcp == 0) {
          layouts.push_back({.tp = tp, .pp = pp, .dcp = dcp});
        }
      }
    }
  }
  return layouts;
}

}  // namespace

TEST_CASE("groups of a small world are the written ones", "[topology]") {
  const ParallelLayout layout{.tp = 4, .pp = 2, .dcp = 2};
  CHECK(all_groups(layout, GroupKind::world) == Groups{{0, 1, 2, 3, 4, 5, 6, 7}});
  CHECK(all_groups(layout, GroupKind::tensor_parallel) == Groups{{0, 1, 2, 3}, {4, 5, 6, 7}});
  CHECK(all_groups(layout, GroupKind::pipeline_parallel) == Groups{{0, 4}, {1, 5}, {2, 6}, {3, 7}});
  CHECK(all_groups(layout, GroupKind::decode_context_parallel) ==
        Groups{{0, 1}, {2, 3}, {4, 5}, {6, 7}});
  CHECK(group_ranks(layout, GroupKind::pipeline_parallel, 6) == std::vector<int>{2, 6});
  CHECK(group_ranks(layout, GroupKind::decode_context_parallel, 3) == std::vector<int>{2, 3});
}

TEST_CASE("sixteen ranks of TP hold two DCP groups of eight", "[topology]") {
  const ParallelLayout layout{.tp = 16, .pp = 1, .dcp = 8};
  CHECK(all_groups(layout, GroupKind::decode_context_parallel) ==
        Groups{{0, 1, 2, 3, 4, 5, 6, 7}, {8, 9, 10, 11, 12, 13, 14, 15}});
  CHECK(group_index(layout, GroupKind::decode_context_parallel, 11) == 1);
  CHECK(rank_in_group(layout, GroupKind::decode_context_parallel, 11) == 3);
}

TEST_CASE("a world of one rank has one group of each kind", "[topology]") {
  for (const GroupKind kind : kKinds) {
    CHECK(all_groups({}, kind) == Groups{{0}});
  }
}

TEST_CASE("with tp=1 the stages are the world", "[topology]") {
  const ParallelLayout layout{.tp = 1, .pp = 3, .dcp = 1};
  CHECK(all_groups(layout, GroupKind::pipeline_parallel) == Groups{{0, 1, 2}});
  CHECK(all_groups(layout, GroupKind::tensor_parallel) == Groups{{0}, {1}, {2}});
}

TEST_CASE("every kind partitions every world, and lookups agree with the lists", "[topology]") {
  for (const ParallelLayout& layout : valid_layouts()) {
    for (const GroupKind kind : kKinds) {
      INFO(to_string(layout) << " " << to_string(kind));
      const Groups groups = all_groups(layout, kind);
      REQUIRE(static_cast<int>(groups.size()) == group_count(layout, kind));
      std::vector<int> seen;
      int lowest_before = -1;
      for (std::size_t g = 0; g < groups.size(); ++g) {
        REQUIRE(static_cast<int>(groups[g].size()) == group_size(layout, kind));
        REQUIRE(std::ranges::is_sorted(groups[g]));
        REQUIRE(groups[g].front() > lowest_before);
        lowest_before = groups[g].front();
        for (std::size_t position = 0; position < groups[g].size(); ++position) {
          const int rank = groups[g][position];
          seen.push_back(rank);
          REQUIRE(group_index(layout, kind, rank) == static_cast<int>(g));
          REQUIRE(rank_in_group(layout, kind, rank) == static_cast<int>(position));
          REQUIRE(group_ranks(layout, kind, rank) == groups[g]);
        }
      }
      std::ranges::sort(seen);
      REQUIRE(static_cast<int>(seen.size()) == world_size(layout));
      for (std::size_t i = 0; i < seen.size(); ++i) {
        REQUIRE(seen[i] == static_cast<int>(i));
      }
    }
  }
}

TEST_CASE("DCP groups lie inside TP groups", "[topology]") {
  for (const ParallelLayout& layout : valid_layouts()) {
    for (const auto& group : all_groups(layout, GroupKind::decode_context_parallel)) {
      const int tp_group = group_index(layout, GroupKind::tensor_parallel, group.front());
      REQUIRE(group_index(layout, GroupKind::tensor_parallel, group.back()) == tp_group);
    }
  }
}

TEST_CASE("layouts that cannot work say which numbers", "[topology]") {
  CHECK_THROWS_MATCHES(world_size({.tp = 6, .pp = 1, .dcp = 4}), ConfigError,
                       says("tp=6", "dcp=4", "multiple"));
  CHECK_THROWS_MATCHES(world_size({.tp = 2, .pp = 1, .dcp = 4}), ConfigError,
                       says("tp=2", "dcp=4"));
  CHECK_THROWS_MATCHES(world_size({.tp = 0, .pp = 1, .dcp = 1}), ConfigError, says("tp=0"));
  CHECK_THROWS_MATCHES(world_size({.tp = 1, .pp = -3, .dcp = 1}), ConfigError, says("pp=-3"));
  CHECK_THROWS_MATCHES(world_size({.tp = 4, .pp = 1, .dcp = 0}), ConfigError, says("dcp=0"));
  CHECK_THROWS_MATCHES(validate({.tp = 4, .pp = 2, .dcp = 2}, 6), ConfigError,
                       says("tp=4", "pp=2", "dcp=2", "8", "6"));
  CHECK_THROWS_AS(validate({.tp = 4, .pp = 1, .dcp = 4}, 0), ConfigError);
  CHECK_NOTHROW(validate({.tp = 4, .pp = 2, .dcp = 2}, 8));
}

TEST_CASE("a product beyond int is an error, not a wrapped number", "[topology]") {
  CHECK_THROWS_MATCHES(world_size({.tp = 65536, .pp = 65536, .dcp = 1}), ConfigError,
                       says("4294967296"));
  CHECK_THROWS_AS(world_size({.tp = 65536, .pp = 32768, .dcp = 1}), ConfigError);
  CHECK(world_size({.tp = std::numeric_limits<int>::max(), .pp = 1, .dcp = 1}) ==
        std::numeric_limits<int>::max());
}

TEST_CASE("ranks and indices outside the world are refused", "[topology]") {
  const ParallelLayout layout{.tp = 4, .pp = 2, .dcp = 2};
  for (const GroupKind kind : kKinds) {
    CHECK_THROWS_MATCHES(group_ranks(layout, kind, 8), UsageError, says("world_rank", "7", "8"));
    CHECK_THROWS_MATCHES(group_index(layout, kind, -1), UsageError, says("world_rank", "-1"));
    CHECK_THROWS_AS(rank_in_group(layout, kind, 8), UsageError);
    const int count = group_count(layout, kind);
    CHECK_THROWS_MATCHES(group_ranks_of_index(layout, kind, count), UsageError,
                         says("index", std::to_string(count)));
    CHECK_THROWS_AS(group_ranks_of_index(layout, kind, -1), UsageError);
  }
  CHECK_THROWS_AS(all_groups({.tp = 3, .pp = 1, .dcp = 2}, GroupKind::world), ConfigError);
}

TEST_CASE("groups have names", "[topology]") {
  CHECK(group_name(GroupKind::world, 0) == "world");
  CHECK(group_name(GroupKind::tensor_parallel, 0) == "tp[0]");
  CHECK(group_name(GroupKind::pipeline_parallel, 3) == "pp[3]");
  CHECK(group_name(GroupKind::decode_context_parallel, 1) == "dcp[1]");
}
