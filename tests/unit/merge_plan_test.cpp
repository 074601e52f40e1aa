// SPDX-License-Identifier: Apache-2.0
#include <cohort/merge_plan.hpp>
#include <set>
#include <string_view>

#include "support/catch.hpp"

using namespace cohort;

TEST_CASE("every merge plan's name leads back to it", "[merge_plan]") {
  std::set<std::string_view> names;
  for (const MergePlan plan : kMergePlans) {
    names.insert(to_string(plan));
    CHECK(merge_plan_from_string(to_string(plan)) == plan);
  }
  CHECK(names == std::set<std::string_view>{"automatic", "staged", "packed", "one_kernel"});
}

TEST_CASE("other names are no plan", "[merge_plan]") {
  for (const std::string_view name : {"", "Staged", "one-kernel", "packed ", "unknown"}) {
    CHECK_FALSE(merge_plan_from_string(name).has_value());
  }
}
