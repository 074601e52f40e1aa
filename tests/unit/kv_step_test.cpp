// SPDX-License-Identifier: Apache-2.0
#include "cohort/kv_step.hpp"

#include <cstdint>
#include <limits>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using cohort::dcp::KvShard;
using test::says;

TEST_CASE("what a step needs is refused by name where it is something else", "[kv_step]") {
  std::vector<std::int64_t> memory(200);
  const auto view = [&](std::size_t at, DType dtype, const Dims& shape) {
    return TensorView(memory.data() + at, dtype, shape);
  };
  const KvStep good{.lengths = view(0, DType::i32, {3}),
                    .counts = view(20, DType::i32, {3, 2}),
                    .slots = view(40, DType::i64, {3, 2}),
                    .pages = view(60, DType::i32, {3, 5}),
                    .page_tokens = 16};
  const KvShard shard(2);
  const Caller caller{"dcp[0]", 1, 2};
  const auto check = [&](const auto& change) {
    KvStep step = good;
    change(step);
    check_step(caller, Device{}, shard, step);
  };
  CHECK_NOTHROW(check([](KvStep&) {}));
  CHECK_NOTHROW(check([](KvStep& s) { s.slots.reset(), s.pages.reset(), s.page_tokens = 0; }));
  CHECK_NOTHROW(check([](KvStep& s) { s.counts.reset(); }));
  CHECK_NOTHROW(check([&](KvStep& s) { s.new_tokens = view(80, DType::i32, {3}); }));
  CHECK_NOTHROW(check([&](KvStep& s) { s.counts = view(20, DType::i32, {3}); }));
  CHECK_NOTHROW(check([&](KvStep& s) { s.pages = view(60, DType::i32, {3, 0}); }));
  CHECK(good.queries() == 2);
  const dcp::KvRows rows = good.rows(shard.placement(), 1);
  CHECK(rows.batch == 3);
  CHECK(rows.queries == 2);
  CHECK(rows.rank == 1);
  CHECK(rows.pages_of_sequence == 5);
  CHECK(rows.count_batch_stride == 2);

  CHECK_THROWS_MATCHES(check_step({"dcp[0]", 0, 4}, Device{}, shard, good), UsageError,
                       says("shard", "4 ranks, got 2"));
  const auto refused = [&](const auto& change, const char* argument, const char* what) {
    CHECK_THROWS_MATCHES(check(change), UsageError, says(argument, what));
  };
  refused([&](KvStep& s) { s.lengths = view(0, DType::i32, {3, 1}); }, "lengths", "[B]");
  refused([&](KvStep& s) { s.lengths = view(0, DType::i64, {3}); }, "lengths", "i64");
  refused(
      [&](KvStep& s) {
        s.lengths = ConstTensorView(memory.data(), DType::i32, {3}, {DeviceKind::cuda, 0});
      },
      "lengths", "works on");
  refused([&](KvStep& s) { s.new_tokens = view(80, DType::i64, {3}); }, "new_tokens", "i64");
  refused([&](KvStep& s) { s.new_tokens = view(80, DType::i32, {2}); }, "new_tokens", "(3)");
  refused([&](KvStep& s) { s.new_tokens = view(21, DType::i32, {3}); }, "counts", "overlap");
  refused([&](KvStep& s) { s.new_tokens = view(41, DType::i32, {3}); }, "slots", "overlap");
  refused([&](KvStep& s) { s.counts = view(20, DType::i64, {3, 2}); }, "counts", "i64");
  refused([&](KvStep& s) { s.counts = view(20, DType::i32, {3, 3}); }, "counts", "(3,2)");
  refused([&](KvStep& s) { s.counts = view(20, DType::i32, {2}); }, "counts", "(3)");
  refused([&](KvStep& s) { s.counts = view(0, DType::i32, {3}); }, "counts", "input itself");
  refused([&](KvStep& s) { s.counts = view(61, DType::i32, {3}); }, "counts", "overlap");
  refused([&](KvStep& s) { s.counts = TensorView(memory.data() + 20, DType::i32, {3}, {0}); },
          "counts", "lie apart");
  refused([&](KvStep& s) { s.slots = view(40, DType::i32, {3, 2}); }, "slots", "i32");
  refused([&](KvStep& s) { s.slots = view(40, DType::i64, {3}); }, "slots", "[B, q]");
  refused([&](KvStep& s) { s.slots = view(40, DType::i64, {3, 0}); }, "slots", "[B, q]");
  refused([&](KvStep& s) { s.slots = view(20, DType::i64, {3, 2}); }, "slots", "overlap");
  refused([&](KvStep& s) { s.pages = view(60, DType::i32, {3}); }, "pages", "(3,0)");
  refused([&](KvStep& s) { s.page_tokens = 0; }, "pages", "0 tokens");
  refused([&](KvStep& s) { s.page_tokens = KvStep::kMaxPageTokens + 1; }, "page_tokens", "at most");
  refused([&](KvStep& s) { s.pages.reset(); }, "pages", "no table");
  refused([&](KvStep& s) { s.slots.reset(); }, "pages", "no slots");
  refused(
      [&](KvStep& s) {
        s.slots.reset();
        s.counts.reset();
      },
      "place_step", "neither");
}

TEST_CASE("the slots of the last page of the largest size are exact", "[kv_step]") {
  constexpr std::int32_t kMost = std::numeric_limits<std::int32_t>::max();
  const std::int32_t length = kMost;
  const std::int32_t page = kMost;
  std::int64_t slot = 0;
  const KvStep step{.lengths = ConstTensorView(&length, DType::i32, {1}),
                    .slots = TensorView(&slot, DType::i64, {1, 1}),
                    .pages = ConstTensorView(&page, DType::i32, {1, 1}),
                    .page_tokens = KvStep::kMaxPageTokens};
  const KvShard shard(1);
  check_step({"dcp[0]", 0, 1}, Device{}, shard, step);
  step.rows(shard.placement(), 0).place(0, 0);
  CHECK(slot == (std::int64_t{kMost} << 32) + kMost - 1);
}
