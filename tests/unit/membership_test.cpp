// SPDX-License-Identifier: Apache-2.0
#include "cohort/membership.hpp"

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using namespace cohort::detail;
using namespace cohort::test;

namespace {

std::vector<int> listed(std::span<const int> members) { return {members.begin(), members.end()}; }

}  // namespace

TEST_CASE("the ranks of a messenger are members by the same numbers") {
  const Membership world("world", 2, 4);
  CHECK(world.name() == "world");
  CHECK(world.rank() == 2);
  CHECK(world.size() == 4);
  CHECK(listed(world.members()) == std::vector{0, 1, 2, 3});
  CHECK(listed(world.only(3)) == std::vector{3});
  CHECK(listed(world.from(2)) == std::vector{2, 3});
  CHECK(world.rank_of(1) == 1);
  CHECK(world.rank_of(7) == 4);
}

TEST_CASE("a subgroup counts its ranks as listed, and its members as the messenger does") {
  const Membership world("world", 4, 6);
  const Membership group = world.subgroup(std::vector{5, 4, 0}, 3, "group");
  CHECK(group.name() == "group");
  CHECK(group.rank() == 1);
  CHECK(listed(group.members()) == std::vector{5, 4, 0});
  CHECK(group.rank_of(0) == 2);
  CHECK(group.rank_of(1) == 3);
  const Membership nested = group.subgroup(std::vector{1, 2}, 0, "nested");
  CHECK(nested.rank() == 0);
  CHECK(listed(nested.members()) == std::vector{4, 0});
  CHECK(nested.member(1) == 0);
}

TEST_CASE("ranks that are not all of a group have numbers in the next larger one that holds them") {
  const Membership world("world", 4, 6);
  const Membership group = world.subgroup(std::vector{5, 4, 0}, 3, "group");
  const Membership nested = group.subgroup(std::vector{1, 2}, 0, "nested");
  CHECK(world.parent() == nullptr);
  CHECK(nested.parent()->name() == "group");
  CHECK(nested.home_of({}).name() == "nested");
  CHECK(nested.home_of(std::vector{4, 0}).name() == "nested");
  const Membership& home = nested.home_of(std::vector{5, 0});
  CHECK(&home == nested.parent());
  CHECK(home.rank_of(5) == 0);
  CHECK(nested.home_of(std::vector{0, 3}).name() == "world");
  CHECK(nested.home_of(std::vector{99}).name() == "world");  // nobody knows that one
}

TEST_CASE("each list and generation has messages of its own, by the same number on all ranks") {
  std::set<std::uint64_t> channels;
  const auto lists = {std::vector{0, 1}, std::vector{1, 0}, std::vector{0, 1, 2}};
  const Membership world("world", 0, 3);
  channels.insert(world.channel());
  for (const auto& list : lists) {
    for (const std::uint64_t generation : {0U, 1U, 2U}) {
      const Membership group = world.subgroup(list, generation, "a");
      channels.insert(group.channel());
      channels.insert(group.subgroup(std::vector{0, 1}, generation, "nested").channel());
      CHECK(Membership("other", 1, 3).subgroup(list, generation, "b").channel() == group.channel());
    }
  }
  CHECK(channels.size() == 1 + 2 * 3 * 3);
}

TEST_CASE("a list that is no set of ranks with this one makes no subgroup") {
  const Membership world("world", 0, 2);
  const auto subgroup = [&](const std::vector<int>& ranks) {
    return world.subgroup(ranks, 0, "odd");
  };
  CHECK_THROWS_MATCHES(subgroup({0, 2}), UsageError, says("odd", "0,2", "world"));
  CHECK_THROWS_MATCHES(subgroup({-1, 0, 1}), UsageError, says("odd", "-1"));
  CHECK_THROWS_MATCHES(subgroup({0, 1, 0}), UsageError, says("odd", "0,1,0"));
  CHECK_THROWS_MATCHES(subgroup({1}), UsageError, says("odd", "1 does not hold this rank, 0"));
  CHECK_THROWS_MATCHES(subgroup({}), UsageError, says("odd", "does not hold this rank"));
}

TEST_CASE("a number that is no rank of the group is named with the argument") {
  const Membership world("world", 0, 2);
  CHECK_NOTHROW(world.check_rank("root", 0));
  CHECK_NOTHROW(world.check_rank("root", 1));
  CHECK_THROWS_MATCHES(world.check_rank("root", 2), UsageError,
                       says("root", "group world", "[0, 2)", "got 2"));
  CHECK_THROWS_MATCHES(world.check_rank("root", -1), UsageError, says("got -1"));
}
