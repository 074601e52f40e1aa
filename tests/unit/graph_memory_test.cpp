// SPDX-License-Identifier: Apache-2.0
#include "cohort/graph_memory.hpp"

#include <algorithm>
#include <cohort/collective_arguments.hpp>
#include <cohort/graph_capture.hpp>
#include <cohort/graph_part.hpp>
#include <random>
#include <thread>
#include <vector>

#include "support/catch.hpp"
#include "support/workspace.hpp"

using namespace cohort;
using namespace cohort::test;

namespace {

/// A step of up to the blocks of `room`, in any order, of which it releases some; the others are
/// added to `alive`.
template <class Empty>
void random_step(const StepRoom& room, std::mt19937& random, std::vector<Tensor>& alive,
                 const Empty& empty) {
  auto blocks = room.blocks;
  if (random() % 2 == 0) {
    std::shuffle(blocks.begin(), blocks.end(), random);
  }
  const bool whole = random() % 3 == 0;
  for (const std::size_t block : blocks) {
    if (random() % 5 == 0) {
      continue;
    }
    alive.push_back(empty(static_cast<std::int64_t>(whole ? block : 1 + random() % block)));
    if (random() % 2 == 0) {
      alive.erase(alive.begin() + static_cast<std::ptrdiff_t>(random() % alive.size()));
    }
  }
  std::erase_if(alive, [&](const Tensor&) { return random() % 3 == 0; });
}

}  // namespace

TEST_CASE("a capture takes what was used eagerly without a word to the driver",
          "[arena][streams]") {
  Workspace work(4096);
  RecordingDriver driver;
  RecordingDriver::State states[3];
  const StreamRef warm(driver, &states[0]);
  const StreamRef captured(driver, &states[1]);
  const StreamRef other(driver, &states[2]);
  auto& arena = *work.arena;
  bytes_of(arena, 4096, warm).reset();
  states[1].capture = 5;
  const auto part = GraphPart::create(work.arena);
  arena.enter_capture(5, part);
  part->begin();
  bytes_of(arena, 4096, captured).reset();
  arena.leave_capture(5);
  states[1].capture = 0;
  CHECK(driver.waits.empty());
  CHECK(driver.synchronized.empty());

  // The graph's launch comes behind them; later ones follow it.
  states[0].capture = 6;
  CHECK_THROWS_MATCHES(arena.order_launch(captured), UsageError, says("being captured"));
  states[0].capture = 0;
  arena.order_launch(other);
  CHECK(driver.waits == std::vector<RecordingDriver::Wait>{{&states[2], &states[0]}});
  arena.order_launch(captured);
  CHECK(driver.waits.size() == 1);

  // A tensor of the graph is read eagerly, and its memory is used by the pool's next graph.
  states[1].capture = 7;
  arena.enter_capture(7, part);
  part->begin();
  auto kept = bytes_of(arena, 4096, captured);
  arena.leave_capture(7);
  states[1].capture = 0;
  arena.order_launch(captured);
  driver.waits.clear();
  kept.record_stream(warm);
  kept.reset();
  states[1].capture = 8;
  arena.enter_capture(8, part);
  part->begin();
  const auto next = bytes_of(arena, 4096, captured);
  arena.leave_capture(8);
  states[1].capture = 0;
  CHECK(driver.waits.empty());
  arena.order_launch(captured);
  CHECK(driver.waits == std::vector<RecordingDriver::Wait>{{&states[1], &states[0]}});
}

TEST_CASE("frozen arenas give out what destroyed graphs had, and messages tell of it", "[arena]") {
  Workspace work(4096);
  RecordingDriver driver;
  RecordingDriver::State state;
  const StreamRef stream(driver, &state);
  auto& arena = *work.arena;
  arena.reserve(kMiB);
  const auto capture = [&](std::int64_t bytes) {
    auto part = GraphPart::create(work.arena);
    state.capture = 9;
    arena.enter_capture(9, part);
    try {
      bytes_of(arena, bytes, stream).reset();
    } catch (...) {
      arena.leave_capture(9);
      state.capture = 0;
      throw;
    }
    arena.leave_capture(9);
    state.capture = 0;
    return part;
  };
  auto graph = capture(kMiB);
  arena.freeze();
  CHECK_THROWS_MATCHES(bytes_of(arena, kMiB / 2, stream), UsageError, says("frozen and exhausted"));
  graph.reset();
  CHECK(bytes_of(arena, kMiB / 2, stream).numel() == kMiB / 2);
  CHECK(arena.statistics().segments == 1);
  for (int i = 0; i < 3; ++i) {
    capture(kMiB).reset();  // without an audience nobody else need have ended it
  }
}

TEST_CASE("a pool in which nothing lives is as one that is gone", "[arena]") {
  Workspace work;
  RecordingDriver driver;
  RecordingDriver::State state{.capture = 5};
  auto& arena = *work.arena;
  arena.reserve(kMiB);
  auto part = GraphPart::create(work.arena);
  arena.enter_capture(5, part);
  part->begin();
  auto tensor = bytes_of(arena, 4096, {driver, &state});
  arena.leave_capture(5);
  const auto with_tensor = arena.history();
  state.capture = 0;
  tensor.reset();
  const auto empty = arena.history();
  CHECK(empty != with_tensor);
  part.reset();  // at a moment of its own on each rank; its memory comes back where all have ended
                 // it
  CHECK(arena.history() == empty);
  CHECK(arena.statistics().used == 4096);
}

TEST_CASE("graphs of a pool cost what the largest costs, whatever came first", "[arena]") {
  Workspace work(16 * kMiB);
  RecordingDriver driver;
  RecordingDriver::State state;
  const StreamRef stream(driver, &state);
  work.arena->reserve(16 * kMiB);
  const auto part = GraphPart::create(work.arena);
  for (CaptureId graph = 1; graph <= 40; ++graph) {
    state.capture = graph;
    part->begin();
    const auto bytes = static_cast<std::int64_t>(graph) * 10'240;
    const auto a = part->empty({bytes}, DType::u8, stream, graph);
    const auto b = part->empty({bytes / 2}, DType::u8, stream, graph);
  }
  CHECK(work.arena->statistics().used == 40 * (10'240 + 5'120));
}

TEST_CASE("a step's room suffices for eager steps and graphs of a pool side by side", "[arena]") {
  RecordingDriver driver;
  RecordingDriver::State state;
  const StreamRef stream(driver, &state);
  for (unsigned seed = 1; seed <= 3'000; ++seed) {
    std::mt19937 random(seed);
    StepRoom room;
    for (auto left = 1 + random() % 6; left > 0; --left) {
      room.blocks.push_back((1 + random() % (random() % 2 == 0 ? 4 : 30)) * 256);
    }
    Workspace work(256);
    SymmetricArena& arena = *work.arena;
    arena.reserve(room.bytes());
    arena.freeze();
    // Of what the segment's size was rounded up to nothing is left.
    const auto spare = arena.statistics().largest_free - room.bytes();
    const Tensor filler = spare > 0 ? bytes_of(arena, static_cast<std::int64_t>(spare)) : Tensor();
    const auto part = GraphPart::create(work.arena);
    std::vector<Tensor> eager;
    std::vector<Tensor> captured;
    INFO("seed " << seed);
    for (CaptureId step = 1; step <= 14; ++step) {
      if (random() % 2 == 0) {
        eager.clear();
        REQUIRE_NOTHROW(random_step(room, random, eager, [&](std::int64_t bytes) {
          return bytes_of(arena, bytes, stream);
        }));
      } else {
        captured.clear();
        state.capture = step;
        part->begin();
        REQUIRE_NOTHROW(random_step(room, random, captured, [&](std::int64_t bytes) {
          return part->empty({bytes}, DType::u8, stream, step);
        }));
        state.capture = 0;
      }
    }
    REQUIRE(arena.statistics().segments == 1);
  }
}

TEST_CASE("a graph's launch waits for the past of streams without marks", "[arena][streams]") {
  Workspace work(4096);
  RecordingDriver driver;
  std::vector<RecordingDriver::State> states(200);
  const auto stream = [&](std::size_t i) { return StreamRef(driver, &states[i]); };
  auto& arena = *work.arena;
  arena.reserve(2 * kMiB);
  auto taken =
      bytes_of(arena, static_cast<std::int64_t>(arena.statistics().largest_free), stream(0));
  taken.reset();
  auto marks = bytes_of(arena, 256, stream(1));
  const auto use = [&](std::size_t first, std::size_t end) {
    for (std::size_t i = first; i < end; ++i) {
      marks.record_stream(stream(i));
    }
  };
  // A graph has taken it, another of the pool takes it again, and a launch is still to wait: where
  // the mark is given up in between, none of them loses sight of the stream.
  const auto part = GraphPart::create(work.arena);
  states[199].capture = 5;
  arena.enter_capture(5, part);
  part->begin();
  auto kept = bytes_of(arena, 4096, stream(199));
  arena.leave_capture(5);
  states[199].capture = 0;
  use(2, 70);
  driver.behind.clear();
  arena.order_launch(stream(150));
  CHECK(std::count(driver.behind.begin(), driver.behind.end(),
                   RecordingDriver::Wait{&states[150], &states[0]}) == 1);
  kept.record_stream(stream(151));
  use(70, 140);
  kept.reset();
  states[199].capture = 6;
  arena.enter_capture(6, part);
  part->begin();
  kept = bytes_of(arena, 4096, stream(199));
  arena.leave_capture(6);
  states[199].capture = 0;
  driver.behind.clear();
  arena.order_launch(stream(150));
  CHECK(std::count(driver.behind.begin(), driver.behind.end(),
                   RecordingDriver::Wait{&states[150], &states[151]}) == 1);
}

TEST_CASE("tensors of a graph may be dropped on any thread, and go with their part", "[arena]") {
  Workspace work(4096);
  RecordingDriver driver;
  RecordingDriver::State states[StreamMarks::kStreams + 2];
  const StreamRef stream(driver, &states[0]);
  auto& arena = *work.arena;
  arena.reserve(kMiB);
  auto part = GraphPart::create(work.arena);
  const auto in_capture = [&](std::int64_t bytes) {
    states[0].capture = 9;
    arena.enter_capture(9, part);
    auto tensor = bytes_of(arena, bytes, stream);
    arena.leave_capture(9);
    states[0].capture = 0;
    return tensor;
  };
  auto first = in_capture(4096);
  void* const place = first.data();
  // The stream gives up its mark while another thread drops: both touch the arena's marks.
  std::thread dropper([&] { first.reset(); });
  for (auto& state : states) {
    bytes_of(arena, 256, StreamRef(driver, &state)).reset();
  }
  dropper.join();
  CHECK(in_capture(4096).data() == place);

  auto last = in_capture(4096);
  CHECK(arena.statistics().used >= 4096);
  part.reset();
  std::thread([&] { last.reset(); }).join();  // the part ends with it, before its block is freed
  arena.reclaim();
  CHECK(arena.statistics().used == 0);
}

TEST_CASE("what is taken after a graph waits for whoever used its tensors eagerly",
          "[arena][streams]") {
  const bool on_another_thread = GENERATE(false, true);
  Workspace work(4096);
  RecordingDriver driver;
  RecordingDriver::State states[3];
  const StreamRef captured(driver, &states[0]);
  const StreamRef reader(driver, &states[1]);
  const StreamRef next(driver, &states[2]);
  auto& arena = *work.arena;
  arena.reserve(4096);
  states[0].capture = 5;
  auto part = GraphPart::create(work.arena);
  arena.enter_capture(5, part);
  part->begin();
  Tensor result = bytes_of(arena, 4096, captured);
  const void* const place = result.data();
  arena.leave_capture(5);
  states[0].capture = 0;
  part.reset();
  result.record_stream(reader);
  const auto drop = [&] { result.reset(); };
  if (on_another_thread) {
    std::thread(drop).join();
  } else {
    drop();
  }
  arena.reclaim();
  driver.waits.clear();
  const Tensor taken = bytes_of(arena, 4096, next);
  CHECK(taken.data() == place);
  CHECK(driver.waits.size() == 2);  // for `captured` and `reader`
}

TEST_CASE("what is taken after a graph waits for no stream that used it in its capture alone",
          "[arena][streams]") {
  const bool dropped = GENERATE(false, true);
  Workspace work(4096);
  RecordingDriver driver;
  RecordingDriver::State states[2];
  const StreamRef captured(driver, &states[0]);
  const StreamRef next(driver, &states[1]);
  auto& arena = *work.arena;
  arena.reserve(4096);
  CaptureDomain domain;
  domain.add(work.arena);
  states[0].capture = 5;
  {
    CaptureScope scope(domain, captured);
    bytes_of(arena, 4096, captured).reset();
    if (dropped) {
      scope.drop();
    }
  }
  states[0].capture = 6;  // nobody could wait for the stream now
  arena.reclaim();
  driver.waits.clear();
  const Tensor taken = bytes_of(arena, 4096, next);
  CHECK(driver.waits.empty());
}
