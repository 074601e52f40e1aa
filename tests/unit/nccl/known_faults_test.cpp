// SPDX-License-Identifier: Apache-2.0
#include "cohort/nccl/known_faults.hpp"

#include "support/catch.hpp"

using namespace cohort;
using test::contains;

TEST_CASE("each trait begins and ends with the version that its source names", "[known_faults]") {
  const auto from_to = [](NcclTrait trait, int begin, int end) {
    CAPTURE(static_cast<int>(trait), begin, end);
    CHECK_FALSE(has_trait(trait, begin - 1));
    CHECK(has_trait(trait, begin));
    CHECK(has_trait(trait, end - 1));
    CHECK_FALSE(has_trait(trait, end));
  };
  from_to(NcclTrait::windows, 22703, kNoNccl);
  from_to(NcclTrait::early_start, 22800, 23007);
  from_to(NcclTrait::one_window_suffices, 22900, kNoNccl);
  from_to(NcclTrait::bulk_by_alignment, 23100, kNoNccl);
  from_to(NcclTrait::own_offset_for_all, 22703, kNoNccl);
  from_to(NcclTrait::unabortable, 22703, 22907);
  from_to(NcclTrait::sizes_not_compared, 22703, 23007);
  from_to(NcclTrait::capture_lost, 22703, 23007);
  from_to(NcclTrait::destroy_waits, 23102, kNoNccl);
}

TEST_CASE("every fact has versions, an effect and a source", "[known_faults]") {
  for (const NcclFact& fact : kNcclFacts) {
    CAPTURE(fact.effect);
    CHECK(fact.begin >= 22703);
    CHECK(fact.begin < fact.end);
    CHECK_FALSE(fact.effect.empty());
    CHECK_FALSE(fact.source.empty());
  }
}

TEST_CASE("a teardown that does not come back is explained by what the version does",
          "[known_faults]") {
  CHECK_THAT(why_teardown_waits(23203, false), contains("graph", "a rank of this host"));
  CHECK_THAT(why_teardown_waits(23203, true), contains("graph", "still running"));
  CHECK_THAT(why_teardown_waits(22803, true), contains("graph", "cannot abort"));
  CHECK_THAT(why_teardown_waits(22803, false), contains("graph", "still running"));
  CHECK_THAT(why_teardown_waits(22907, true), contains("still running"));
}

TEST_CASE("a version is described by what holds for it", "[known_faults]") {
  CHECK(describe_nccl(21903) == "NCCL 2.19.3");
  CHECK_THAT(describe_nccl(22907), contains("NCCL 2.29.7 has symmetric windows; starts ",
                                            "one buffer alone", "different sizes"));
  CHECK(describe_nccl(22907).find("abort") == std::string::npos);
  CHECK(describe_nccl(23203).find("visible") == std::string::npos);
}
