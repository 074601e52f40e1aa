// SPDX-License-Identifier: Apache-2.0
#include "cohort/decode_room.hpp"

#include <limits>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using detail::DecodeRoom;
using test::says;

// That the room suffices in every plan, frozen and in graphs: support/decode_checks.hpp.

namespace {

using Blocks = std::vector<std::size_t>;

constexpr DecodeShape kShape{.batch = 3, .heads = 4, .latent = 16, .rope = 8, .value = 32};

[[nodiscard]] DecodeShape with(MergeResult result, std::int64_t tokens = 0) {
  DecodeShape shape = kShape;
  shape.result = result;
  shape.tokens = tokens;
  return shape;
}

}  // namespace

TEST_CASE("a step's blocks are those that its calls allocate", "[dcp]") {
  const StepRoom room = DecodeRoom(kShape, 2, {}).step();
  // The query, what is merged, its LSEs, this rank's query, and pieces to and from two ranks.
  CHECK(room.blocks == Blocks{576, 384, 24, 288, 1024 + 1024});
  CHECK(room.scratch == 576 + 288);

  const StepRoom alone = DecodeRoom(kShape, 1, {}).step();
  CHECK(alone.blocks == Blocks{576, 768, 48, 1024});
  CHECK(alone.scratch == 576 + 576);
}

TEST_CASE("the staged plan needs the LSEs of all ranks and partials in its precision", "[dcp]") {
  const auto blocks = [](StagedPrecision precision) {
    return DecodeRoom(kShape, 2, {.plan = MergePlan::staged, .staged_precision = precision})
        .step()
        .blocks;
  };
  CHECK(blocks(StagedPrecision::f32) == Blocks{576, 384, 24, 288, 256 + 256 + 1536 + 768});
  CHECK(blocks(StagedPrecision::partial) == Blocks{576, 384, 24, 288, 256 + 256 + 768 + 512});
}

TEST_CASE("the parts of a merge's block lie one behind another", "[dcp]") {
  const detail::StagedScratch staged(2, 3, 4, 6, 32, DType::bf16);
  CHECK(staged.lses == 0);
  CHECK(staged.own_lse == 256);
  CHECK(staged.corrected == 512);
  CHECK(staged.sums == 512 + 768);
  CHECK(staged.parts.bytes == 512 + 768 + 512);
  const detail::PackedScratch packed(2, 832);
  CHECK(packed.mine == 0);
  CHECK(packed.theirs == 1024);
  CHECK(packed.parts.bytes == 2048);
  const detail::PackedScratch alone(1, 816);
  CHECK(alone.theirs == alone.mine);
  CHECK(alone.parts.bytes == 1024);
}

TEST_CASE("by token the rank with most tokens counts", "[dcp]") {
  const auto merged = [](std::int64_t tokens) {
    return DecodeRoom(with(MergeResult::by_token, tokens), 2, {}).step().blocks[1];
  };
  CHECK(merged(0) == 2 * 4 * 32 * 2);  // shared out evenly, rounded up
  CHECK(merged(1) == 3 * 2 * 32 * 2);  // by head
  CHECK(merged(3) == 3 * 4 * 32 * 2);
  CHECK(merged(9) == 3 * 4 * 32 * 2);  // no rank has more than there are
}

TEST_CASE("a replicated result needs its own rows as well as all", "[dcp]") {
  const StepRoom room = DecodeRoom(with(MergeResult::replicated), 2, {}).step();
  CHECK(room.blocks == Blocks{576, 512, 32, 768, 48, 288, 1280 + 1280});
  CHECK(room.scratch == 768 + 384);
}

TEST_CASE("there is room for the results before the one that is asked for", "[dcp]") {
  const auto rows = [](MergeResult result, std::int64_t tokens) {
    return DecodeRoom(with(result, tokens), 2, {}).step().blocks[1] / (32 * 2);
  };
  CHECK(rows(MergeResult::by_head, 3) == 3 * 2);
  CHECK(rows(MergeResult::by_token, 1) == 3 * 2);
  CHECK(rows(MergeResult::by_token, 0) == 2 * 4);
  CHECK(rows(MergeResult::replicated, 1) == 3 * 2);
  CHECK(rows(MergeResult::replicated, 0) == 2 * 4);
  CHECK(rows(MergeResult::replicated, 3) == 3 * 4);
}

TEST_CASE("by token and without a query the ranks need not divide the heads", "[dcp]") {
  DecodeShape shape{
      .batch = 4, .heads = 3, .value = 8, .dtype = DType::f32, .result = MergeResult::by_token};
  CHECK(DecodeRoom(shape, 2, {}).step().blocks[1] == 2 * 3 * 8 * 4);
  shape.rope = 16;
  CHECK_THROWS_MATCHES(DecodeRoom(shape, 2, {}), UsageError, says("2 ranks", "with a query"));
  shape.rope = 0;
  shape.result = MergeResult::replicated;
  CHECK_THROWS_MATCHES(DecodeRoom(shape, 2, {}), UsageError, says("2 ranks", "replicated"));
}

TEST_CASE("a query has the bytes of its parts' types", "[dcp]") {
  const auto query = [](std::optional<DType> nope, std::optional<DType> pe) {
    DecodeShape shape = kShape;
    shape.query_dtype = nope;
    shape.rope_dtype = pe;
    return DecodeRoom(shape, 2, {}).step().blocks[0];
  };
  CHECK(query({}, {}) == 12 * (16 + 8) * 2);
  CHECK(query(DType::f8_e4m3, {}) == 12 * (16 + 8));
  CHECK(query(DType::f8_e4m3, DType::f32) == 12 * (16 + 8 * 4));
  CHECK(query({}, DType::f32) == 12 * (16 * 2 + 8 * 4));
}

TEST_CASE("an inbox slot holds the query, pieces, or as much as every rank merges", "[dcp]") {
  CHECK(DecodeRoom(kShape, 2, {}).inbox_bytes(1 << 20) == 832);
  DecodeShape narrow = kShape;
  narrow.value = 8;
  CHECK(DecodeRoom(narrow, 2, {}).inbox_bytes(1 << 20) == 576);
  const DecodeRoom replicated(with(MergeResult::replicated), 2, {});
  CHECK(replicated.inbox_bytes(1 << 20) == 2 * 816);  // all rows
  CHECK(replicated.inbox_bytes(10 * 64) == 2 * 688);  // ten of them
  CHECK(replicated.inbox_bytes(100) == 1088);         // of one row less than of its own
}

TEST_CASE("shapes that cannot be are refused", "[dcp]") {
  const auto room = [](const DecodeShape& shape, int ranks = 2) {
    return DecodeRoom(shape, ranks, {}).step();
  };
  CHECK_THROWS_MATCHES(room({.batch = -1, .heads = 4}), UsageError, says("batch -1"));
  CHECK_THROWS_MATCHES(room({.batch = 1, .heads = 4, .tokens = -1}), UsageError,
                       says("sizes >= 0"));
  CHECK_THROWS_MATCHES(room(kShape, 3), UsageError, says("3 ranks"));
  CHECK_THROWS_MATCHES(room({.batch = 1, .dtype = DType::i8}), UsageError, says("i8"));
  constexpr std::int64_t kMany = std::int64_t{1} << 40;
  CHECK_THROWS_MATCHES(room({.batch = kMany, .heads = 1 << 21, .value = 512}), UsageError,
                       says("reserve_for batch, heads and latent", "2^59"));
  CHECK_THROWS_MATCHES(room({.batch = kMany, .heads = 1 << 21, .latent = 512}), UsageError,
                       says("reserve_for batch, heads and latent", "2^59"));
  CHECK_THROWS_MATCHES(room({.rope = std::numeric_limits<std::int64_t>::max()}), UsageError,
                       says("reserve_for batch, heads and rope", "2^59"));
  const auto no_type = static_cast<DType>(99);
  CHECK_THROWS_MATCHES(room({.query_dtype = no_type}), UsageError,
                       says("reserve_for query_dtype", "number 99"));
  CHECK_THROWS_MATCHES(room({.rope_dtype = no_type}), UsageError,
                       says("reserve_for rope_dtype", "number 99"));
  CHECK_THROWS_MATCHES(room({.result = static_cast<MergeResult>(9)}), UsageError,
                       says("reserve_for result", "number 9"));
  CHECK(room({}).scratch == 0);
}
