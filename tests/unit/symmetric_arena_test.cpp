// SPDX-License-Identifier: Apache-2.0
#include "cohort/symmetric_arena.hpp"

#include <algorithm>
#include <cohort/collective_arguments.hpp>
#include <cohort/graph_part.hpp>
#include <cohort/host/host_backend.hpp>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "support/arena_checks.hpp"
#include "support/catch.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::test;

namespace {

/// Streams that only count what is asked of them. A stream's handle is the address of its state.
class CountingDriver : public StreamDriver {
 public:
  struct State {
    CaptureId capture = 0;
  };
  struct Event final : StreamEvent {
    void* stream = nullptr;
  };

  void submit(void*, std::function<void()> work) override { work(); }
  void wait_for(void* waiter, void* signaller) override {
    if (failing) {
      throw TimeoutError("the driver's own", {});
    }
    waits.emplace_back(waiter, signaller);
  }
  [[nodiscard]] std::unique_ptr<StreamEvent> make_event() override {
    return std::make_unique<Event>();
  }
  void record(StreamEvent& event, void* native) override {
    REQUIRE(capture_id(native) == 0);
    static_cast<Event&>(event).stream = native;
  }
  void wait(void* waiter, StreamEvent& event) override {
    behind.emplace_back(waiter, static_cast<Event&>(event).stream);
  }
  [[nodiscard]] CaptureId capture_id(void* native) const override {
    return static_cast<State*>(native)->capture;
  }
  void retain_in_capture(void*, std::shared_ptr<void>) override {}
  void begin_capture(void*) override {}
  [[nodiscard]] std::unique_ptr<ExecutableGraph> end_capture(void*) override { return nullptr; }
  void synchronize(void* native, std::chrono::milliseconds) override {
    synchronized.push_back(native);
  }

  bool failing = false;

  using Wait = std::pair<void*, void*>;
  std::vector<Wait> waits;
  std::vector<Wait> behind;  ///< An event of the second.
  std::vector<void*> synchronized;
};

constexpr std::size_t kMiB = std::size_t{1} << 20;

/// An arena without an audience, on the host.
struct Workspace {
  explicit Workspace(std::size_t growth = kMiB, HostOptions options = {})
      : backend(host_backend(std::move(options))),
        arena(SymmetricArena::create(*backend, "work", {}, {.growth_bytes = growth})) {}

  std::shared_ptr<Backend> backend;
  std::shared_ptr<SymmetricArena> arena;
};

Tensor bytes_of(SymmetricArena& arena, std::int64_t bytes, StreamRef stream = {}) {
  return arena.empty({bytes}, DType::u8, stream);
}

}  // namespace

TEST_CASE("an arena grows, reuses and counts", "[arena]") {
  Workspace work;
  auto& arena = *work.arena;
  CHECK(arena.statistics().reserved == 0);
  CHECK(arena.statistics().segments == 0);
  auto a = bytes_of(arena, 1000);
  auto b = bytes_of(arena, 1);
  CHECK(arena.statistics().reserved == kMiB);
  CHECK(arena.statistics().used == 1024 + 256);
  CHECK(arena.statistics().live_blocks == 2);
  CHECK(arena.statistics().largest_free == kMiB - 1280);
  CHECK(*arena.offset_of(a.data()) == 0);
  CHECK(*arena.offset_of(b.data()) == 1024);
  CHECK_FALSE(arena.offset_of(&arena));
  void* const first = a.data();
  a.reset();
  a = bytes_of(arena, 900);
  CHECK(a.data() == first);
  auto large = bytes_of(arena, 3 * static_cast<std::int64_t>(kMiB));
  CHECK(arena.statistics().segments == 2);
  CHECK(arena.statistics().reserved == 4 * kMiB);
  CHECK(*arena.offset_of(large.data()) == std::uint64_t{1} << 44);
  large.reset();
  a.reset();
  b.reset();
  CHECK(arena.statistics().used == 0);
  CHECK(arena.statistics().peak == 1280 + 3 * kMiB);
  CHECK(arena.statistics().largest_free == 3 * kMiB);
}

TEST_CASE("tensors of nothing are tensors", "[arena]") {
  Workspace work;
  const auto tensor = work.arena->empty({4, 0, 2}, DType::f32, {});
  CHECK(tensor.numel() == 0);
  CHECK(work.arena->statistics().live_blocks == 1);
}

TEST_CASE("reserving makes room, freezing keeps it", "[arena]") {
  Workspace work(4096);
  auto& arena = *work.arena;
  arena.reserve(100'000);
  CHECK(arena.statistics().segments == 1);
  CHECK(arena.statistics().largest_free >= 100'000);
  arena.reserve(100'000);
  CHECK(arena.statistics().segments == 1);
  arena.freeze();
  CHECK(arena.statistics().frozen);
  const auto reserved = arena.statistics().reserved;
  const auto half = bytes_of(arena, 51'200);
  CHECK_THROWS_MATCHES(
      bytes_of(arena, 102'400), UsageError,
      says("arena work is frozen and exhausted", "102400 bytes are needed",
           fmt::format("{} of {} are free", reserved - 51'200, reserved),
           fmt::format("at most {}", reserved - 51'200), "the peak so far is 51200"));
  CHECK_THROWS_MATCHES(arena.reserve(1'000'000), UsageError, says("frozen", "1000192"));
  arena.reserve(1000);  // fits
  CHECK(bytes_of(arena, 1000).numel() == 1000);
}

TEST_CASE("memory beyond the address space is refused", "[arena]") {
  Workspace work;
  CHECK_THROWS_MATCHES(bytes_of(*work.arena, std::int64_t{1} << 50), UsageError,
                       says("arena work", "too large"));
  CHECK_THROWS_AS(work.arena->empty({std::int64_t{1} << 62, 4}, DType::f64, {}), UsageError);
  CHECK_THROWS_AS(work.arena->empty({-1}, DType::f64, {}), UsageError);
  for (const std::size_t bytes : {~std::size_t{0}, ~std::size_t{0} - 511, std::size_t{1} << 61}) {
    CHECK_THROWS_MATCHES(work.arena->reserve(bytes), UsageError, says("arena work", "too large"));
  }
  CHECK(work.arena->statistics().segments == 0);
  CHECK(bytes_of(*work.arena, 10).numel() == 10);
}

TEST_CASE("a wait that fails loses no memory", "[arena][streams]") {
  Workspace work(4096);
  CountingDriver driver;
  CountingDriver::State states[2];
  bytes_of(*work.arena, 4096, {driver, &states[0]}).reset();
  driver.failing = true;
  CHECK_THROWS_AS(bytes_of(*work.arena, 4096, {driver, &states[1]}), TimeoutError);
  CHECK(work.arena->statistics().used == 0);
  driver.failing = false;
  CHECK(bytes_of(*work.arena, 4096, {driver, &states[1]}).numel() == 4096);
  CHECK(driver.waits.size() == 1);  // the user is remembered

  states[0].capture = 1;
  states[1].capture = 1;
  const auto part = GraphPart::create(work.arena);
  part->empty({4096}, DType::u8, {driver, &states[0]}, 1).reset();
  driver.failing = true;
  CHECK_THROWS_AS(part->empty({4096}, DType::u8, {driver, &states[1]}, 1), TimeoutError);
  driver.failing = false;
  CHECK(part->empty({4096}, DType::u8, {driver, &states[1]}, 1).numel() == 4096);
  CHECK(work.arena->statistics().used == 4096);
}

TEST_CASE("a capture takes what was used eagerly without a word to the driver",
          "[arena][streams]") {
  Workspace work(4096);
  CountingDriver driver;
  CountingDriver::State states[3];
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
  CHECK(driver.waits == std::vector<CountingDriver::Wait>{{&states[2], &states[0]}});
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
  CHECK(driver.waits == std::vector<CountingDriver::Wait>{{&states[1], &states[0]}});
}

TEST_CASE("frozen arenas give out what destroyed graphs had, and messages tell of it", "[arena]") {
  Workspace work(4096);
  CountingDriver driver;
  CountingDriver::State state;
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

TEST_CASE("graphs of a pool cost what the largest costs, whatever came first", "[arena]") {
  Workspace work(16 * kMiB);
  CountingDriver driver;
  CountingDriver::State state;
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

TEST_CASE("a step's room suffices for eager steps and graphs of a pool side by side", "[arena]") {
  CountingDriver driver;
  CountingDriver::State state;
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

TEST_CASE("a backend without memory says so", "[arena]") {
  Workspace work(kMiB, {.segment_limit = 2 * kMiB});
  const auto first = bytes_of(*work.arena, 10);
  CHECK_THROWS_AS(bytes_of(*work.arena, 2 * static_cast<std::int64_t>(kMiB)), TransportError);
  CHECK(bytes_of(*work.arena, 10).numel() == 10);
}

TEST_CASE("one stream needs no driver call", "[arena][streams]") {
  Workspace work;
  CountingDriver driver;
  CountingDriver::State state;
  const StreamRef stream(driver, &state);
  std::mt19937 random(3);
  std::vector<Tensor> live;
  for (int i = 0; i < 5000; ++i) {
    if (live.size() < 50 || random() % 2 == 0) {
      live.push_back(bytes_of(*work.arena, static_cast<std::int64_t>(random() % 20'000), stream));
    } else {
      live.erase(live.begin() + static_cast<std::ptrdiff_t>(random() % live.size()));
    }
  }
  CHECK(driver.waits.empty());
  CHECK(driver.synchronized.empty());
}

TEST_CASE("reuse on another stream waits for the users", "[arena][streams]") {
  Workspace work(4096);
  CountingDriver driver;
  CountingDriver::State states[3];
  const StreamRef a(driver, &states[0]);
  const StreamRef b(driver, &states[1]);
  const StreamRef c(driver, &states[2]);

  auto tensor = bytes_of(*work.arena, 4096, a);
  tensor.record_stream(b);
  tensor.record_stream(b);
  tensor.reset();
  tensor = bytes_of(*work.arena, 4096, a);  // a is the block's own stream; b is not
  CHECK(driver.waits == std::vector<CountingDriver::Wait>{{&states[0], &states[1]}});
  driver.waits.clear();

  tensor.reset();  // only a has used it since
  tensor = bytes_of(*work.arena, 4096, c);
  CHECK(driver.waits == std::vector<CountingDriver::Wait>{{&states[2], &states[0]}});
  driver.waits.clear();

  // Two blocks of two streams become one; whoever takes it waits for both.
  tensor.reset();
  auto left = bytes_of(*work.arena, 2048, c);
  auto right = bytes_of(*work.arena, 2048, c);
  left.record_stream(a);
  right.record_stream(b);
  driver.waits.clear();
  left.reset();
  right.reset();
  tensor = bytes_of(*work.arena, 4096, c);
  CHECK(driver.waits ==
        std::vector<CountingDriver::Wait>{{&states[2], &states[0]}, {&states[2], &states[1]}});
  CHECK(driver.synchronized.empty());
}

TEST_CASE("an allocation without a stream waits on the host", "[arena][streams]") {
  Workspace work(4096);
  CountingDriver driver;
  CountingDriver::State state;
  bytes_of(*work.arena, 4096, {driver, &state}).reset();
  const auto tensor = bytes_of(*work.arena, 4096);
  CHECK(driver.waits.empty());
  CHECK(driver.synchronized == std::vector<void*>{&state});
}

TEST_CASE("more streams than marks still wait for one another", "[arena][streams]") {
  Workspace work(4096);
  CountingDriver driver;
  std::vector<CountingDriver::State> states(100);
  const auto stream = [&](std::size_t i) { return StreamRef(driver, &states[i]); };
  auto tensor = bytes_of(*work.arena, 4096, stream(0));
  for (std::size_t i = 0; i < 100; ++i) {
    tensor.record_stream(stream(i));
  }
  tensor.reset();
  tensor = bytes_of(*work.arena, 4096, stream(0));
  // 63 gave up their marks, the first too, whose event no harm comes of.
  CHECK(std::set(driver.behind.begin(), driver.behind.end()).size() == 63);
  CHECK(driver.waits.size() == 37);
  driver.waits.clear();
  driver.behind.clear();
  tensor.reset();
  tensor = bytes_of(*work.arena, 4096, stream(80));
  CHECK(driver.waits == std::vector<CountingDriver::Wait>{{&states[80], &states[0]}});
  tensor.reset();
  driver.waits.clear();
  tensor = bytes_of(*work.arena, 4096, stream(90));
  CHECK(driver.waits == std::vector<CountingDriver::Wait>{{&states[90], &states[80]}});
  CHECK(driver.behind.empty());
}

TEST_CASE("a capture of one of many streams concerns nobody who did not share its memory",
          "[arena][streams]") {
  Workspace work(kMiB);
  CountingDriver driver;
  std::vector<CountingDriver::State> states(200);
  const auto stream = [&](std::size_t i) { return StreamRef(driver, &states[i]); };
  auto& arena = *work.arena;
  const auto whole = static_cast<std::int64_t>(kMiB);
  bytes_of(arena, whole, stream(0)).reset();
  for (std::size_t i = 1; i < 100; ++i) {
    bytes_of(arena, whole, stream(i)).reset();  // each waits for the one before it
  }
  for (std::size_t i = 70; i < 98; ++i) {
    states[i].capture = i;
  }
  driver.waits.clear();
  bytes_of(arena, whole, stream(98)).reset();
  CHECK(driver.waits == std::vector<CountingDriver::Wait>{{&states[98], &states[99]}});
  driver.waits.clear();

  // Those that are being captured keep their marks, and what they used is theirs.
  states[98].capture = 98;
  for (std::size_t i = 100; i < 200; ++i) {
    CHECK_THROWS_MATCHES(bytes_of(arena, whole, stream(i)), UsageError, says("being captured"));
  }
  CHECK(driver.waits.empty());
  states[98].capture = 0;
  bytes_of(arena, whole, stream(199)).reset();
  CHECK(driver.waits.size() + driver.behind.size() > 0);
  CHECK(arena.statistics().used == 0);
}

TEST_CASE("a graph's launch waits for the past of streams without marks", "[arena][streams]") {
  Workspace work(4096);
  CountingDriver driver;
  std::vector<CountingDriver::State> states(200);
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
                   CountingDriver::Wait{&states[150], &states[0]}) == 1);
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
                   CountingDriver::Wait{&states[150], &states[151]}) == 1);
}

TEST_CASE("streams that run at once are neither waited for nor remembered", "[arena][streams]") {
  class AtOnce final : public CountingDriver {
    [[nodiscard]] bool runs_at_once() const noexcept override { return true; }
  };
  Workspace work(4096);
  AtOnce driver;
  std::vector<CountingDriver::State> states(200);
  for (auto& state : states) {
    auto tensor = bytes_of(*work.arena, 4096, {driver, &state});
    tensor.record_stream({driver, &states[0]});
    state.capture = 1;  // as another stream at the same address might be
  }
  CHECK(bytes_of(*work.arena, 4096).numel() == 4096);
  CHECK(driver.waits.empty());
  CHECK(driver.behind.empty());
  CHECK(driver.synchronized.empty());
}

TEST_CASE("memory of a stream that is being captured is not taken from outside", "[arena]") {
  Workspace work(4096);
  CountingDriver driver;
  CountingDriver::State states[2];
  bytes_of(*work.arena, 4096, {driver, &states[0]}).reset();
  states[0].capture = 5;
  CHECK_THROWS_MATCHES(bytes_of(*work.arena, 4096, {driver, &states[1]}), UsageError,
                       says("arena work", "being captured"));
  CHECK(work.arena->statistics().live_blocks == 0);
  states[0].capture = 0;
  CHECK(bytes_of(*work.arena, 4096, {driver, &states[1]}).numel() == 4096);
  CHECK(driver.waits.size() == 1);
}

TEST_CASE("tensors outlive the arena's owner", "[arena]") {
  Workspace work;
  auto tensor = bytes_of(*work.arena, 1000);
  work.arena->close();
  CHECK_THROWS_MATCHES(bytes_of(*work.arena, 1), UsageError, says("arena work", "shut down"));
  CHECK_THROWS_AS(work.arena->reserve(1), UsageError);
  CHECK_THROWS_AS(work.arena->reclaim(), UsageError);
  work.arena.reset();
  std::memset(tensor.data(), 1, 1000);
  tensor.reset();
}

TEST_CASE("arenas of all audiences keep equal offsets on every rank", "[arena]") {
  for (const int n : {1, 2, 4, 8}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_audiences); }
  }
}

TEST_CASE("peers see one another's blocks at equal offsets", "[arena]") {
  for (const int n : {1, 2, 3, 4}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_equal_offsets); }
  }
}

TEST_CASE("growth, reservation, freezing and exhaustion of a group's arena", "[arena]") {
  for (const int n : {1, 2, 3}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_growth); }
  }
}

TEST_CASE("a tensor of DCP's arena is reduced over TP", "[arena]") {
  run_ranks(4, check_tensor_of_another_arena);
}
