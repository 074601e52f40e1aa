// SPDX-License-Identifier: Apache-2.0
#include "cohort/merge_choice.hpp"

#include <optional>
#include <string>

#include "support/catch.hpp"

using namespace cohort;
using detail::ChosenMerge;
using Why = ChosenMerge::Why;
using test::says;

// What groups say of merges that they made: decode_context_parallel_test.cpp.

namespace {

constexpr std::string_view kNoMap = "ranks out of peer reach";

[[nodiscard]] ChosenMerge choose(MergePlan wanted, std::optional<std::string> obstacle) {
  return detail::choose_merge(
      wanted, 2, [&] { return obstacle; }, kNoMap);
}

}  // namespace

TEST_CASE("numbers that are no plan or precision are refused", "[dcp]") {
  for (const MergePlan plan : kMergePlans) {
    CHECK_NOTHROW(validate({.plan = plan}));
  }
  CHECK_THROWS_MATCHES(validate({.plan = static_cast<MergePlan>(9)}), ConfigError,
                       says("MergeOptions.plan", "number 9"));
  CHECK_THROWS_MATCHES(validate({.staged_precision = static_cast<StagedPrecision>(2)}), ConfigError,
                       says("MergeOptions.staged_precision", "number 2"));
}

TEST_CASE("the kernel is taken where it can be", "[dcp]") {
  const auto can = choose(MergePlan::automatic, "");
  CHECK(can.plan == MergePlan::one_kernel);
  CHECK(can.why == Why::in_reach);
  const auto far = choose(MergePlan::automatic, std::nullopt);
  CHECK(far.plan == MergePlan::packed);
  CHECK(far.reason(kNoMap) == "no peer mapping: ranks out of peer reach");
  const auto wide = choose(MergePlan::automatic, "needs 16388 bytes");
  CHECK(wide.plan == MergePlan::packed);
  CHECK(wide.reason(kNoMap) == "needs 16388 bytes");
}

TEST_CASE("a plan that is wanted is taken or refused", "[dcp]") {
  for (const MergePlan plan : {MergePlan::staged, MergePlan::packed, MergePlan::one_kernel}) {
    const auto chosen = choose(plan, "");
    CHECK(chosen.plan == plan);
    CHECK(chosen.reason(kNoMap) == "chosen by the user");
  }
  CHECK_THROWS_MATCHES(choose(MergePlan::one_kernel, std::nullopt), ConfigError,
                       says("one_kernel: no peer mapping: ranks out of peer reach"));
  CHECK_THROWS_MATCHES(choose(MergePlan::one_kernel, "needs 16388 bytes"), ConfigError,
                       says("one_kernel: needs 16388 bytes"));
}

TEST_CASE("the kernels are asked only where they may be taken", "[dcp]") {
  const auto asked = [](MergePlan wanted, int ranks) {
    int times = 0;
    const auto obstacle = [&]() -> std::optional<std::string> {
      ++times;
      return "";
    };
    static_cast<void>(detail::choose_merge(wanted, ranks, obstacle, kNoMap));
    return times;
  };
  CHECK(asked(MergePlan::automatic, 2) == 1);
  CHECK(asked(MergePlan::one_kernel, 2) == 1);
  CHECK(asked(MergePlan::staged, 2) == 0);
  CHECK(asked(MergePlan::packed, 2) == 0);
  CHECK(asked(MergePlan::one_kernel, 1) == 0);
  const auto alone = detail::choose_merge(
      MergePlan::one_kernel, 1, [] { return std::nullopt; }, kNoMap);
  CHECK(alone.reason(kNoMap) == "single rank: a local copy");
  CHECK(ChosenMerge{}.reason(kNoMap).empty());
}

TEST_CASE("the staged plan adds up in fp32 or in the partials' type", "[dcp]") {
  CHECK(MergeOptions{}.staged_dtype(DType::bf16) == DType::f32);
  CHECK(MergeOptions{.staged_precision = StagedPrecision::partial}.staged_dtype(DType::bf16) ==
        DType::bf16);
}
