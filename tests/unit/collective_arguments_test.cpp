// SPDX-License-Identifier: Apache-2.0
#include "cohort/collective_arguments.hpp"

#include <limits>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using cohort::test::says;

TEST_CASE("the sum of sizes names what is wrong with them", "[arguments]") {
  const Caller caller{"tp[0]", 1, 2};
  const std::vector<std::int64_t> good{3, 4};
  CHECK(total("sizes", caller, good) == 7);
  CHECK(offset_of(caller, good) == 3);
  const std::vector<std::int64_t> more{1, 2, 3};
  const std::vector<std::int64_t> negative{1, -2};
  const std::vector<std::int64_t> huge{std::numeric_limits<std::int64_t>::max(), 1};
  CHECK_THROWS_MATCHES(total("sizes", caller, more), UsageError, says("sizes", "expected 2"));
  CHECK_THROWS_MATCHES(total("sizes", caller, negative), UsageError, says("got -2"));
  CHECK_THROWS_MATCHES(total("sizes", caller, huge), UsageError, says("overflows"));
}

TEST_CASE("devices, ranks, dtypes and shapes that a call cannot take are named", "[arguments]") {
  const Caller caller{"tp[0]", 1, 2};
  std::vector<float> memory(64);
  const TensorView x(memory.data(), DType::f32, {8, 8});
  CHECK_NOTHROW(check_on_device("x", caller, x.device(), x));
  CHECK_THROWS_MATCHES(check_on_device("x", caller, Device{DeviceKind::cuda, 3}, x), UsageError,
                       says("x: group tp[0] works on cuda:3, got a tensor on"));
  const TensorView untyped(memory.data(), static_cast<DType>(99), {8, 8});
  CHECK_THROWS_MATCHES(check_on_device("x", caller, x.device(), untyped), UsageError,
                       says("x: expected an element type, got number 99"));
  CHECK_NOTHROW(check_op("op", ReduceOp::max));
  CHECK_THROWS_MATCHES(check_op("op", static_cast<ReduceOp>(77)), UsageError,
                       says("op: expected sum, prod, min or max, got number 77"));
  for (const int rank : {0, 1}) {
    CHECK_NOTHROW(check_member("root", caller, rank));
  }
  for (const int rank : {-1, 2}) {
    CHECK_THROWS_MATCHES(check_member("root", caller, rank), UsageError,
                         says("root: expected a rank in [0, 2) of group tp[0]"));
    CHECK_THROWS_AS(check_peer("to", caller, rank), UsageError);
  }
  CHECK_NOTHROW(check_peer("to", caller, 0));
  CHECK_THROWS_MATCHES(check_peer("to", caller, 1), UsageError,
                       says("to: rank 1 of group tp[0] cannot be its own peer"));
  CHECK_NOTHROW(check_alike("out", x, x, {8, 8}));
  CHECK_THROWS_MATCHES(check_alike("out", x, x, {8, 4}), UsageError, says("out: expected f32"));
  const TensorView other(memory.data(), DType::i32, {8, 8});
  CHECK_THROWS_MATCHES(check_alike("out", other, x, {8, 8}), UsageError, says("got i32"));
}

TEST_CASE("data that is not aligned to its type is named", "[arguments]") {
  const Caller caller{"tp[0]", 1, 2};
  alignas(16) std::byte memory[64];
  for (const auto dtype : {DType::u8, DType::f8_e4m3, DType::bf16, DType::f32, DType::i64}) {
    for (std::size_t offset = 0; offset < 16; ++offset) {
      const ConstTensorView x(memory + offset, dtype, {2});
      INFO(to_string(dtype) << " at " << offset);
      if (offset % size_of(dtype) == 0) {
        CHECK_NOTHROW(check_on_device("x", caller, x.device(), x));
      } else {
        CHECK_THROWS_MATCHES(
            check_on_device("x", caller, x.device(), x), UsageError,
            says("x: expected the data of", fmt::format("a multiple of {} bytes", size_of(dtype))));
      }
      const ConstTensorView nothing(memory + offset, dtype, {2, 0});
      CHECK_NOTHROW(check_on_device("x", caller, x.device(), nothing));
    }
  }
}

TEST_CASE("a result may lie on its input only where a call in place has it", "[arguments]") {
  std::vector<float> memory(64);
  const TensorView all(memory.data(), DType::f32, {64});
  const ConstTensorView x = all.slice(0, 0, 32);
  CHECK_NOTHROW(check_apart("out", all.slice(0, 32, 32), x));
  CHECK_THROWS_MATCHES(check_apart("out", all.slice(0, 0, 32), x), UsageError,
                       says("out: must not be the input itself"));
  CHECK_THROWS_MATCHES(check_apart("out", all.slice(0, 16, 32), x), UsageError,
                       says("out: must not overlap the input"));
  const auto begins_at = [&](std::int64_t first) {
    return [&all, &x, first] { return identical(all.slice(0, first, 32), x); };
  };
  CHECK_NOTHROW(check_in_place_or_apart("out", all, x, begins_at(0)));
  CHECK_THROWS_MATCHES(check_in_place_or_apart("out", all, x, begins_at(32)), UsageError,
                       says("out", "overlaps the input"));
  CHECK_NOTHROW(check_in_place_or_apart("out", all.slice(0, 32, 32), x, begins_at(32)));
  // In place, with parts of the input that share elements.
  const ConstTensorView rows(memory.data(), DType::f32, {2, 32}, {16, 1});
  const TensorView part(memory.data(), DType::f32, {1, 32});
  CHECK_THROWS_MATCHES(check_in_place_or_apart(
                           "out", part, rows, [&] { return identical(rows.slice(0, 0, 1), part); }),
                       UsageError, says("out", "overlaps the input"));
  CHECK_NOTHROW(check_in_place_or_apart("out", part.slice(0, 0, 0), rows, [&] { return true; }));
}

TEST_CASE("the room of calls counts their results and what they pack", "[arguments]") {
  const std::vector<CollectiveShape> calls{
      {.collective = Collective::all_gather, .shape = {4, 100}, .dim = 1},
      {.collective = Collective::all_gather, .shape = {4, 100}, .dim = 1, .widest = 200},
      {.collective = Collective::reduce_scatter, .shape = {6, 100}, .dtype = DType::bf16},
      {.collective = Collective::reduce_scatter, .shape = {7}, .widest = 5},
      {.collective = Collective::all_to_all, .shape = {8}},
      {.collective = Collective::all_reduce, .shape = {10'000}},
      {.collective = Collective::all_reduce_rms_norm, .shape = {2, 10}, .dtype = DType::bf16},
      {.collective = Collective::broadcast, .shape = {}}};
  const auto room = room_of(calls, 2);
  CHECK(room.blocks == std::vector<std::size_t>{3200, 6400, 600, 20, 32, 40, 40});
  CHECK(room.scratch == 80'000);
  const std::size_t sum = 3328 + 6400 + 768 + 256 + 256 + 256 + 256;
  CHECK(room.bytes() == 2 * sum);
  CHECK(StepRoom{}.bytes() == 0);
  StepRoom huge;
  huge.blocks = {std::size_t{1} << 60, std::size_t{1} << 60};
  CHECK(huge.bytes() == std::numeric_limits<std::size_t>::max());

  const auto refused = [](const CollectiveShape& call, std::string_view part) {
    CHECK_THROWS_MATCHES(room_of(std::vector{call}, 2), UsageError,
                         says("reserve_for_calls", std::string(part)));
  };
  refused({.collective = Collective::reduce_scatter, .shape = {3}}, "2 ranks divide");
  refused({.collective = Collective::all_to_all, .shape = {3}}, "2 ranks divide");
  refused({.collective = Collective::all_to_all, .shape = {}}, "");
  refused({.collective = Collective::all_reduce_rms_norm, .shape = {3}}, "[B, hidden]");
  refused({.collective = Collective::all_gather, .shape = {3}, .dim = 1}, "dim");
  refused({.collective = Collective::all_gather, .shape = {3}, .widest = -1}, "widest");
  refused({.shape = {-1}}, "reserve_for_calls shape: expected extents >= 0, got (-1)");
  constexpr std::int64_t kMany = std::int64_t{1} << 58;
  refused({.shape = {kMany, 2}}, "reserve_for_calls shape: expected fewer than 2^59 elements");
  refused({.shape = {1, 8}, .widest = kMany}, "reserve_for_calls widest");
  refused({.shape = {kMany}}, "reserve_for_calls shape of all ranks");
  refused({.shape = {4}, .dtype = static_cast<DType>(99)}, "reserve_for_calls dtype");
  refused({.collective = static_cast<Collective>(9), .shape = {4}}, "reserve_for_calls collective");
}

TEST_CASE("a number that is no collective is named", "[arguments]") {
  check_collective("path collective", Collective::all_reduce_rms_norm);
  CHECK_THROWS_MATCHES(check_collective("path collective", static_cast<Collective>(77)), UsageError,
                       says("path collective: expected a Collective, got number 77"));
}

TEST_CASE("what is gathered must have a size as well", "[arguments]") {
  const std::vector<std::int64_t> sizes{std::int64_t{1} << 58, std::int64_t{1} << 58};
  const ConstTensorView x(nullptr, DType::f32, {0, sizes[0]});
  CHECK_THROWS_MATCHES(gathered_shape(x, {"tp[0]", 0, 2}, sizes, 1), UsageError,
                       says("all_gather x of all ranks: expected fewer than 2^59 elements"));
}
